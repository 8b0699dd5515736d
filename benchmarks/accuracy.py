"""How far logits, losses and gradients are from float64, for every input and compute dtype.

    python benchmarks/accuracy.py                      C = 20,000, D = 512, scale 64
    python benchmarks/accuracy.py --device cuda

ArcFace on random classes and embeddings whose cosines to their classes run from 0 to 0.95, so that losses
run from below 1e-15 to 60. The truth is the float64 op on the same (rounded) inputs, which the tests hold to
independent references. Beside it: careful eager PyTorch under autocast, which does the same products. Logit:
absolute error over all logits. Loss: relative error of the rows. Gradients: relative error by norm (rms) and of
the worst row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as TF

import torchmargin
import torchmargin.functional as F

SCALE, MARGIN = 64.0, 0.5
ARCFACE = {"scale": SCALE, "m2": MARGIN}


def eager_logits(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The margin on [B] cosines, scattered back: in the dtypes that autocast chooses."""
    cosine = TF.linear(TF.normalize(x), TF.normalize(w))
    target = cosine.gather(1, y[:, None])
    sine = (1 - target.square()).clamp(min=0).sqrt()
    psi = target * math.cos(MARGIN) - sine * math.sin(MARGIN)
    return SCALE * cosine.scatter(1, y[:, None], psi.to(cosine.dtype))


def eager(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = eager_logits(x, w, y)
    return logits, TF.cross_entropy(logits, y, reduction="none")


def ours(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        logits = F.margin_logits(x, w, y, **ARCFACE)
    return logits, F.linear_margin_cross_entropy(x, w, y, reduction="none", **ARCFACE)


def problem(rows: int, features: int, classes: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(classes, features, generator=generator, dtype=torch.float64)
    y = torch.randint(0, classes, (rows,), generator=generator)
    own = TF.normalize(w[y])
    away = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    away = TF.normalize(away - (away * own).sum(1, keepdim=True) * own)
    cosine = torch.linspace(0, 0.95, rows, dtype=torch.float64)[:, None]
    x = 20 * (cosine * own + (1 - cosine**2).sqrt() * away)
    return x.to(device), w.to(device), y.to(device)


def measure(function, autocast, dtype: torch.dtype, x64: Tensor, w64: Tensor, y: Tensor) -> dict:
    x, w = (t.to(dtype).requires_grad_() for t in (x64, w64))
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    true_logits, true_loss = ours(*wide, y)
    true_gradients = torch.autograd.grad(true_loss.mean(), wide)
    with autocast():
        logits, loss = function(x, w, y)
    gradients = torch.autograd.grad(loss.mean(), (x, w))
    error = (logits.detach().double() - true_logits).abs()
    relative = ((loss.detach().double() - true_loss.detach()) / true_loss.detach()).abs()
    result = {
        "logit_rms": error.square().mean().sqrt().item(),
        "logit_max": error.max().item(),
        "loss_rms": relative.square().mean().sqrt().item(),
        "loss_max": relative.max().item(),
    }
    for name, got, true, rows in (
        ("input", gradients[0], true_gradients[0], slice(None)),
        ("weight", gradients[1], true_gradients[1], y.unique()),
    ):
        difference = got.double() - true
        result[f"grad_{name}_rms"] = (difference.norm() / true.norm()).item()
        result[f"grad_{name}_max"] = (difference[rows].norm(dim=1) / true[rows].norm(dim=1)).max().item()
    return result


def table(results: list[dict]) -> str:
    columns = ["logit", "loss", "grad_input", "grad_weight"]
    lines = [
        "| parameters | products | who | logit rms, max | loss rms, max | grad_input rms, max | grad_weight rms, max |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for r in results:
        cells = " | ".join(f"{r[f'{c}_rms']:.1e}, {r[f'{c}_max']:.1e}" for c in columns)
        lines.append(f"| {r['parameters']} | {r['products']} | {r['who']} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--classes", type=int, default=20_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    x, w, y = problem(options.rows, options.features, options.classes, options.device)

    def autocast(dtype):
        return lambda: torch.autocast(options.device, dtype=dtype)

    cases = [(torch.float64, None), (torch.float32, None)]
    cases += [(torch.float32, dtype) for dtype in (torch.bfloat16, torch.float16)]
    cases += [(dtype, None) for dtype in (torch.bfloat16, torch.float16)]
    results = []
    for parameters, products in cases:
        context = contextlib.nullcontext if products is None else autocast(products)
        for who, function in (("torchmargin", ours), ("eager", eager)):
            figures = measure(function, context, parameters, x, w, y)
            names = [str(dtype).removeprefix("torch.") for dtype in (parameters, products or parameters)]
            allowed = f"{names[1]} allowed" if products else names[1]
            results.append({"parameters": names[0], "products": allowed, "who": who, **figures})
    print(table(results))
    if options.json:
        report = {
            "what": "errors against float64, ArcFace at scale 64",
            "sizes": {"rows": options.rows, "features": options.features, "classes": options.classes},
            "device": options.device,
            "torch": torch.__version__,
            "torchmargin": torchmargin.__version__,
            "results": results,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
