"""The library's ops on a GPU beside the CPU, with torch and the shared library alone: no package, no test framework.

    python scripts/gpu_ops.py build/torch-2.11/libtorchmargin.so [--device cpu]

Prints one line a case and ends non-zero if one of them disagrees.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch
from torch import Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    torch.ops.load_library(options.library)
    ops = torch.ops.torchmargin
    numbers = lambda *of: torch.tensor(of, dtype=torch.float64)
    heads: dict[str, tuple[Any, dict[str, Any]]] = {
        "arcface": (ops.linear_margin_cross_entropy, {"m2": 0.5, "extension": "linear", "label_smoothing": 0.1}),
        "curricularface": (
            ops.linear_margin_cross_entropy,
            {"m2": 0.5, "extension": "linear", "hard_coefficients": numbers(1.0, 0.3, 0.0)},
        ),
        "inter-top-k": (ops.linear_margin_cross_entropy, {"m2": 0.2, "hardest": 5, "hardest_margin": 0.06}),
        "sub-centers": (ops.linear_margin_cross_entropy, {"m2": 0.5, "sub_centers": 3}),
        "sphereface2": (ops.linear_margin_binary_cross_entropy, {"margin": 0.2, "power": 3.0}),
    }
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    bad = 0
    for (name, (op, given)), dtype, (rows, features, classes) in itertools.product(
        heads.items(), dtypes, [(5, 7, 33), (300, 129, 4800)]
    ):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(rows, features, generator=generator, dtype=torch.float64).to(dtype)
        w = torch.randn(classes, features, generator=generator, dtype=torch.float64).to(dtype)
        y = torch.randint(0, classes // given.get("sub_centers", 1), (rows,), generator=generator)

        def run(x: Tensor, w: Tensor, y: Tensor, op: Any = op, given: dict[str, Any] = given) -> list[Tensor]:
            moved = {key: of.to(x.device) if isinstance(of, Tensor) else of for key, of in given.items()}
            leaves = [x.requires_grad_(), w.requires_grad_()]
            loss = op(*leaves, y, None, scale=32.0, **moved)
            return [each.detach().double().cpu() for each in (loss, *torch.autograd.grad(loss, leaves))]

        try:
            got = run(*(each.detach().to(options.device) for each in (x, w, y)))
            true = run(x.double(), w.double(), y)
            # By norm. Narrow dtypes: roundings of logits of 32, and classes at a threshold that flip.
            apart = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, true))
            most = {torch.float64: 1e-11, torch.float32: 1e-2}.get(dtype, 0.3)
            word = "ok" if apart <= most else "WRONG"
        except Exception as error:
            apart, word = float("nan"), f"FAILED: {type(error).__name__}: {error}".splitlines()[0][:150]
        bad += word != "ok"
        print(f"{name}, {str(dtype)[6:]}, {rows} x {features} x {classes}: {apart:.1e} {word}", flush=True)
    print(f"{bad} failed" if bad else "all passed")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
