"""Forward + backward of ArcFace on the CPU beside what people run today.

    python benchmarks/cpu.py                 all sizes, few classes first
    python benchmarks/cpu.py --only small    few classes (--only large: many)
    python benchmarks/cpu.py --only large --rows 256 --classes 100000 --runs 15

Every round runs each contender in turn, so that a noisy machine disturbs all of them, and the
medians of the rounds are compared. A contender runs twice in a row and the second run counts:
in training a step follows its like and finds the memory that the last one freed, while memory
that another contender freed seconds ago may have to be fetched from the host again. A peer's
loss must equal ours before it is timed. Peak memory is the process's resident peak during one
run, beyond what it held before (inputs are held, gradients are not). A peer that cannot fit is
named with its estimated need and not run. A step that takes less than some milliseconds is timed as a few
of them in a row.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

import torch
from measure import MiB, available, resident_peak, rounded_ms, time_in_turn, write_report
from torch import Tensor

import torchmargin
import torchmargin.functional as F

from peers import MARGIN, SCALE, bytes_needed, chunked_products, peers, whole_products

# B, D, C: what a call costs, and steps that a row's features make and not its classes.
SMALL = [(32, 64, 10), (128, 128, 100), (256, 512, 100), (4096, 512, 100), (64, 512, 1000), (2048, 128, 1000)]


def ours(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.linear_margin_cross_entropy(x, w, y, scale=SCALE, m2=MARGIN, extension="linear")


def measure(rows: int, features: int, classes: int, runs: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=generator).requires_grad_()
    w = (0.01 * torch.randn(classes, features, generator=generator)).requires_grad_()
    y = torch.randint(0, classes, (rows,), generator=generator)
    plan = torchmargin.plan(rows, features, classes)

    def step(loss):
        return lambda: torch.autograd.grad(loss(x, w, y), (x, w))

    with torch.no_grad():
        expected = ours(x, w, y)
    results = [{"name": "torchmargin"}]
    contenders = {"torchmargin": step(ours)}
    for name, peer in peers().items():
        result = {"name": name}
        results.append(result)
        need = bytes_needed(name, rows, features, classes)
        if need > 0.85 * available():
            result["not_run"] = f"needs about {need / 2**30:.0f} GiB"
            continue
        loss = peer(x, w, y)
        # float32 products and sums over C classes: a few 1e-6 of a loss near 40.
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
        del loss
        contenders[name] = step(peer)
    with torch.no_grad():
        contenders["bare products, in chunks"] = chunked_products(x.detach(), w.detach(), plan)
        results.append({"name": "bare products, in chunks"})
        if 4 * classes * (rows + features) < 0.4 * available():
            contenders["bare products, whole"] = whole_products(x.detach(), w.detach())
            results.append({"name": "bare products, whole"})

    peaks = {name: resident_peak(run) for name, run in contenders.items()}  # this run is also the warm-up
    for result in results:
        if result["name"] in peaks:
            result["peak_mib"] = round(peaks[result["name"]] / MiB)
    times = time_in_turn(contenders, runs, f"B={rows} C={classes}")
    own = statistics.median(times["torchmargin"])
    for result in results:
        result.update(rows=rows, features=features, classes=classes, kept_classes=plan.kept_classes)
        if result["name"] in times:
            taken = times[result["name"]]
            result.update(
                ms=rounded_ms(1e3 * statistics.median(taken)),
                ms_min=rounded_ms(1e3 * min(taken)),
                ratio=round(statistics.median(taken) / own, 2),
                # round by round: what the machine did to both in that round cancels
                ratio_paired=round(statistics.median(t / o for t, o in zip(taken, times["torchmargin"])), 2),
            )
    return results


def table(results: list[dict]) -> str:
    lines = ["| B | D | C | contender | ms | its time / ours | peak MiB |", "|---|---|---|---|---|---|---|"]
    for r in results:
        size = f"| {r['rows']} | {r['features']} | {r['classes']:,} | {r['name']} "
        if "not_run" in r:
            lines.append(f"{size}| {r['not_run']} | | |")
        else:
            lines.append(f"{size}| {r['ms']:,} | {r['ratio_paired']:.2f} | {r['peak_mib']:,} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--classes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--only", choices=["small", "large"], help="few classes, or the sizes that the others name")
    parser.add_argument("--runs", type=int, default=7, help="rounds at each size (at least 3 count)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    sizes = [] if options.only == "large" else list(SMALL)
    if options.only != "small":
        sizes += [(rows, options.features, classes) for classes in options.classes for rows in options.rows]
    results = []
    for rows, features, classes in sizes:
        torch._dynamo.reset()
        measured = measure(rows, features, classes, options.runs)
        print(table(measured), flush=True)
        results += measured
    write_report("ArcFace forward + backward, float32", options, results)
    print("\n" + table(results))


if __name__ == "__main__":
    main()
