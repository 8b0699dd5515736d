"""What each head costs beside the plain op, and beside itself written out in eager PyTorch.

    python benchmarks/heads.py
    python benchmarks/heads.py --rows 64 --classes 100000 --runs 15

Forward + backward in float32 on the CPU, contenders in turn (benchmarks/cpu.py says how). "its time / plain" is that of
ours and of the plain op, ArcFace, in the same rounds; "eager / ours" that of the head in eager PyTorch, whose loss must
equal ours before it is timed. Peak memory is beyond inputs. With K sub-centers a class has K products, so that K = 3
is beside three times the plain op's products.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from measure import MiB, available, resident_peak, rounded_ms, time_in_turn, write_report
from torch import Tensor
from torch.nn import functional as nnf

import torchmargin.functional as F

from peers import MARGIN, SCALE, eager

T = 0.3  # CurricularFace's, in the midst of training
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Head(NamedTuple):
    ours: Loss
    eager: Loss
    centers: int = 1


def _cosine(x: Tensor, w: Tensor, centers: int = 1) -> Tensor:
    cosine = nnf.linear(nnf.normalize(x), nnf.normalize(w))
    return cosine if centers == 1 else cosine.unflatten(1, (-1, centers)).amax(2)


def _arc(own: Tensor, margin: float) -> Tensor:
    m = torch.tensor(margin)
    return own * m.cos() - (1 - own.square()).clamp(min=0).sqrt() * m.sin()


def _entropy(cosine: Tensor, y: Tensor, own: Tensor) -> Tensor:
    return nnf.cross_entropy(SCALE * cosine.scatter(1, y[:, None], own), y)


def _curricular(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    cosine = _cosine(x, w)
    own = _arc(cosine.gather(1, y[:, None]), MARGIN)
    return _entropy(torch.where(cosine > own, cosine * (T + cosine), cosine), y, own)


def _mv(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    cosine = _cosine(x, w)
    own = _arc(cosine.gather(1, y[:, None]), MARGIN)
    return _entropy(torch.where(cosine > own, 1.2 * cosine + 0.2, cosine), y, own)


def _filtered(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    cosine = _cosine(x, w)
    own = _arc(cosine.gather(1, y[:, None]), MARGIN)
    return _entropy(torch.where(cosine > 0.1, 0.0, cosine), y, own)


def _sub_centers(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    cosine = _cosine(x, w, 3)
    return _entropy(cosine, y, _arc(cosine.gather(1, y[:, None]), MARGIN))


def _top_k(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    cosine = _cosine(x, w)
    places = cosine.detach().scatter(1, y[:, None], -2.0).topk(5).indices
    nearer = _arc(cosine.gather(1, places), -0.06)
    return _entropy(cosine.scatter(1, places, nearer), y, _arc(cosine.gather(1, y[:, None]), MARGIN))


def _sphereface2(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    curve = 2 * ((_cosine(x, w) + 1) / 2) ** 3 - 1
    others = nnf.softplus(32 * (curve + 0.2)).scatter(1, y[:, None], 0.0).sum(1)
    return (0.7 * nnf.softplus(-32 * (curve.gather(1, y[:, None]).squeeze(1) - 0.2)) + 0.3 * others).mean()


def _ours(**head) -> Loss:
    return lambda x, w, y: F.linear_margin_cross_entropy(x, w, y, scale=SCALE, m2=MARGIN, extension="linear", **head)


def _coefficients(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


HEADS = {
    "plain (ArcFace)": Head(_ours(), eager),
    "CurricularFace": Head(_ours(hard_coefficients=_coefficients(1, T, 0)), _curricular),
    "MV-Softmax": Head(_ours(hard_coefficients=_coefficients(0, 1.2, 0.2)), _mv),
    "inter-class filter": Head(
        _ours(hard_threshold=_coefficients(0.1)[0], hard_coefficients=_coefficients(0, 0, 0)), _filtered
    ),
    "inter-top-k, k = 5": Head(_ours(hardest=5, hardest_margin=0.06), _top_k),
    "sub-centers, K = 3": Head(_ours(sub_centers=3), _sub_centers, 3),
    "SphereFace2": Head(
        lambda x, w, y: F.linear_margin_binary_cross_entropy(
            x, w, y, scale=32.0, margin=0.2, power=3.0, positive_weight=0.7, negative_weight=0.3
        ),
        _sphereface2,
    ),
}
PLAIN = next(iter(HEADS))


def measure(rows: int, features: int, classes: int, runs: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=generator).requires_grad_()
    weights = {
        centers: torch.randn(classes * centers, features, generator=generator).requires_grad_()
        for centers in sorted({head.centers for head in HEADS.values()})
    }
    y = torch.randint(0, classes, (rows,), generator=generator)
    contenders, results = {}, []
    for name, head in HEADS.items():
        w = weights[head.centers]

        def step(loss: Loss, w: Tensor = w) -> Callable[[], object]:
            return lambda: torch.autograd.grad(loss(x, w, y), (x, w))

        contenders[name] = step(head.ours)
        results.append({"head": name})
        need = 4 * (8 * rows * classes * head.centers + 3 * classes * head.centers * features)
        if need < 0.85 * available():
            with torch.no_grad():  # float32 products, and sums over C classes
                torch.testing.assert_close(head.eager(x, w, y), head.ours(x, w, y), rtol=1e-4, atol=0)
            contenders[f"eager {name}"] = step(head.eager)
    peaks = {name: resident_peak(run) for name, run in contenders.items()}
    times = time_in_turn(contenders, runs, f"B={rows} C={classes}")
    plain = times[PLAIN]
    paired = lambda one, other: round(statistics.median(a / b for a, b in zip(one, other)), 2)
    for result in results:
        name = result["head"]
        result.update(
            rows=rows,
            features=features,
            classes=classes,
            ms=rounded_ms(1e3 * statistics.median(times[name])),
            beside_plain=paired(times[name], plain),
            peak_mib=round(peaks[name] / MiB),
        )
        if f"eager {name}" in times:
            result["eager_beside_ours"] = paired(times[f"eager {name}"], times[name])
            result["eager_peak_mib"] = round(peaks[f"eager {name}"] / MiB)
    return results


def table(results: list[dict]) -> str:
    lines = [
        "| B | D | C | head | ms | its time / plain | eager / ours | peak MiB: ours, eager |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        cells = [r["rows"], r["features"], f"{r['classes']:,}", r["head"], f"{r['ms']:,}", f"{r['beside_plain']:.2f}"]
        peak = f"{r['eager_peak_mib']:,}" if "eager_peak_mib" in r else "-"
        cells += [r.get("eager_beside_ours", "-"), f"{r['peak_mib']:,}, {peak}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[256])
    parser.add_argument("--classes", type=int, nargs="+", default=[40_000])
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for classes in options.classes:
        for rows in options.rows:
            results += measure(rows, options.features, classes, options.runs)
    print(table(results))
    write_report("heads, forward + backward, float32", options, results)


if __name__ == "__main__":
    main()
