"""How far logits, losses and gradients are from float64, for every input and compute dtype.

    python benchmarks/accuracy.py                      C = 20,000, D = 512, scale 64
    python benchmarks/accuracy.py --device cuda
    python benchmarks/accuracy.py --hard               one hard negative a row, C = 64 and 200,000

ArcFace on random classes and embeddings whose cosines to their classes run from 0 to 0.95, so that losses
run from below 1e-15 to 60. The truth is the float64 op on the same (rounded) inputs, which the tests hold to
independent references. Beside it: careful eager PyTorch under autocast, which does the same products. Logit:
absolute error over all logits. Loss: relative error of the rows. Gradients: relative error by norm (rms) and of
the worst row.

--hard: a cosine of 0.7 to the own class and of 0.5 to one other, whose softmax weight is nearly 1, so that the gradient
is nearly one product and an error common to a row's softmax weights is not hidden by the products' own. Float32; the
truth is eager float64.
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


# Options of the op, and whether there is a bias.
HARD_CASES = {
    "CosFace": ({"scale": SCALE, "m3": 0.35}, False),
    "CosFace, bias": ({"scale": SCALE, "m3": 0.35}, True),
    "softmax, |x| = 64": ({"normalize_input": False, "normalize_weight": False}, False),
    "softmax, |x| = 64, bias": ({"normalize_input": False, "normalize_weight": False}, True),
}


def hard_problem(rows: int, features: int, classes: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit weights, embeddings of length 64, their targets, and a bias, in float64."""
    generator = torch.Generator().manual_seed(0)
    w = TF.normalize(torch.randn(classes, features, generator=generator, dtype=torch.float64))
    y = torch.randperm(classes, generator=generator)[:rows]
    pair = torch.stack([w[y], w[(y + 1) % classes]], 1)  # [B, 2, D]
    gram = pair @ pair.transpose(1, 2)
    away = torch.randn(rows, features, 1, generator=generator, dtype=torch.float64)
    away = (away - pair.transpose(1, 2) @ torch.linalg.solve(gram, pair @ away)).squeeze(2)
    cosines = torch.tensor([0.7, 0.5], dtype=torch.float64).expand(rows, 2).unsqueeze(2)
    near = (pair * torch.linalg.solve(gram, cosines)).sum(1)
    x = near + (1 - near.square().sum(1, keepdim=True)).sqrt() * TF.normalize(away)
    bias = 0.5 * torch.randn(classes, generator=generator, dtype=torch.float64)
    return tuple(t.to(device) for t in (64 * x, w, y, bias))


def hard_eager(x: Tensor, w: Tensor, y: Tensor, b: Tensor | None, options: dict, label_smoothing: float) -> Tensor:
    normalized = "normalize_input" not in options
    logits = options.get("scale", 1.0) * (
        TF.linear(TF.normalize(x), TF.normalize(w)) if normalized else TF.linear(x, w)
    )
    logits = logits if b is None else logits + b
    margin = torch.full_like(x[:, :1], options.get("scale", 1.0) * options.get("m3", 0.0))
    return TF.cross_entropy(logits.scatter_add(1, y[:, None], -margin), y, label_smoothing=label_smoothing)


def measure_hard(case: str, label_smoothing: float, problem: tuple[Tensor, ...]) -> dict:
    options, with_bias = HARD_CASES[case]
    x32, w32, b32 = (problem[i].float() for i in (0, 1, 3))
    y = problem[2]

    def gradients(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x32, w32, *([b32] if with_bias else []))]
        loss = function(leaves[0], leaves[1], y, leaves[2] if with_bias else None)
        return loss.detach().double(), [g.double() for g in torch.autograd.grad(loss, leaves)]

    def theirs(x, w, y, b):
        return hard_eager(x, w, y, b, options, label_smoothing)

    def ours(x, w, y, b):
        return F.linear_margin_cross_entropy(x, w, y, b, label_smoothing=label_smoothing, **options)

    true_loss, true = gradients(theirs, torch.float64)
    result = {"case": case, "label_smoothing": label_smoothing, "classes": len(w32)}
    for who, function in (("torchmargin", ours), ("eager", theirs)):
        loss, found = gradients(function, torch.float32)
        result[f"{who}_loss"] = ((loss - true_loss) / true_loss).abs().item()
        rows = torch.cat([y, (y + 1) % len(w32)]).unique()  # of the weight: the other gradients are next to 0
        for name, got, expected, some in zip(("input", "weight", "bias"), found, true, (slice(None), rows, rows)):
            result[f"{who}_{name}_rms"] = ((got - expected).norm() / expected.norm()).item()
            if got.dim() == 2:
                each = (got - expected)[some].norm(dim=1) / expected[some].norm(dim=1)
                result[f"{who}_{name}_max"] = each.max().item()
    return result


def hard_table(results: list[dict]) -> str:
    lines = ["| C | loss | smoothing | who | loss | grad_input rms, max | grad_weight rms, max | grad_bias rms |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in results:
        for who in ("torchmargin", "eager"):
            pairs = [f"{r[f'{who}_{n}_rms']:.1e}, {r[f'{who}_{n}_max']:.1e}" for n in ("input", "weight")]
            bias = f"{r[f'{who}_bias_rms']:.1e}" if f"{who}_bias_rms" in r else ""
            start = f"| {r['classes']:,} | {r['case']} | {r['label_smoothing']} | {who} | {r[f'{who}_loss']:.1e} |"
            lines.append(f"{start} {' | '.join(pairs)} | {bias} |")
    return "\n".join(lines)


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
    parser.add_argument("--hard", action="store_true", help="one hard negative a row")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--classes", type=int, default=20_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.hard:
        results = []
        for classes in (64, 200_000):
            tensors = hard_problem(min(options.rows, 64), options.features, classes, options.device)
            results += [measure_hard(case, eps, tensors) for case in HARD_CASES for eps in (0.0, 0.1, 1.0)]
        print(hard_table(results))
        return
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
