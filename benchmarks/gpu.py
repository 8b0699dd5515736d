"""ArcFace forward and backward on a GPU beside what people run today.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --rows 1024 --classes 360232 --runs 11

CUDA events, contenders interleaved, medians, the L2 cache flushed before each run. D = 512. Columns: ms forward, ms
forward + backward, ps per logit (forward + backward), share of the floor (four bare 16-bit products of these
sizes, measured in the same run), peak MiB beyond inputs and gradients, largest error of a logit. A contender that does
not fit is named as such. Peers get the same embeddings and weights; "InsightFace order" is its fp16 product, then fp32.
Fused losses of language models, where they are installed, know no margin: they get 16-bit unit vectors, made once, and
their normalisation and its gradient are not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as TF
from tqdm import tqdm

import torchmargin
import torchmargin.functional as F

from peers import MARGIN, SCALE, eager, fused_language_model_losses, insightface_order

FEATURES = 512


def ours(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.linear_margin_cross_entropy(x, w, y, scale=SCALE, m2=MARGIN)


def contenders(dtype: torch.dtype) -> dict:
    """name -> loss(x, w, y), each under autocast to `dtype` where the weights are float32."""

    def under_autocast(loss):
        def run(x, w, y):
            with torch.autocast("cuda", dtype=dtype, enabled=w.dtype == torch.float32):
                return loss(x, w, y)

        return run

    compiled = torch.compile(eager, dynamic=False)
    return {
        "torchmargin": under_autocast(ours),
        "eager": under_autocast(eager),
        "InsightFace order": under_autocast(insightface_order),
        "torch.compile": under_autocast(compiled),
        **fused_language_model_losses(),
    }


def floor(x: Tensor, w: Tensor, dtype: torch.dtype):
    """The four bare products: logits twice, and each gradient's, in chunks of 8192 classes."""
    x16, w16 = x.detach().to(dtype), w.detach().to(dtype)

    def run():
        for part in w16.split(8192):
            logits = x16 @ part.T
            logits = x16 @ part.T
            logits.T @ x16
            logits @ part

    return run


def timed(run, scrap: Tensor) -> float:
    """Milliseconds of one run with a cold L2 cache."""
    scrap.zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def logit_error(x: Tensor, w: Tensor, y: Tensor, dtype: torch.dtype) -> float:
    """The largest error of our logits on the first rows and classes, against float64."""
    x, w, y = x.detach()[:64], w.detach()[:20_000], torch.full_like(y[:64], -1)
    with torch.autocast("cuda", dtype=dtype, enabled=w.dtype == torch.float32):
        got = F.margin_logits(x, w, y, scale=SCALE)
    true = SCALE * TF.normalize(x.double()) @ TF.normalize(w.double()).T
    return (got.double() - true).abs().max().item()


def measure(rows: int, classes: int, parameters: torch.dtype, dtype: torch.dtype, runs: int) -> list[dict]:
    torch.manual_seed(0)
    x = torch.randn(rows, FEATURES, device="cuda").to(parameters).requires_grad_()
    w = (0.01 * torch.randn(classes, FEATURES, device="cuda")).to(parameters).requires_grad_()
    y = torch.randint(0, classes, (rows,), device="cuda")
    scrap = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    runners, results = {}, []
    given_x, given_w = x, w
    prenormalised = fused_language_model_losses()
    unit_x = unit_w = None
    if prenormalised:
        unit_x, unit_w = (TF.normalize(t.detach()).to(dtype).requires_grad_() for t in (x, w))
    for name, loss in contenders(dtype).items():
        result = {"name": name, "rows": rows, "classes": classes, "parameters": str(parameters), "compute": str(dtype)}
        results.append(result)
        x, w = (unit_x, unit_w) if name in prenormalised else (given_x, given_w)
        try:
            torch.cuda.empty_cache()
            torch.autograd.grad(loss(x, w, y), (x, w))  # warm up
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            grads = torch.autograd.grad(loss(x, w, y), (x, w))
            used = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads)
            result["peak_mib"] = round(used / 2**20)
            del grads
        except torch.OutOfMemoryError:
            result["not_run"] = "out of memory"
            continue
        except Exception as error:  # a peer that does not take this problem is no reason to stop
            if name not in prenormalised:
                raise
            result["not_run"] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
            continue
        runners[name] = (
            lambda loss=loss, x=x, w=w: loss(x, w, y),
            lambda loss=loss, x=x, w=w: torch.autograd.grad(loss(x, w, y), (x, w)),
        )
    x, w = given_x, given_w
    products = floor(x, w, dtype)
    products()
    times = {name: ([], []) for name in runners}
    floors = []
    for _ in range(runs):
        floors.append(timed(products, scrap))
        for name, both in runners.items():
            for kept, run in zip(times[name], both):
                kept.append(timed(run, scrap))
    bare = statistics.median(floors)
    for result in results:
        if result["name"] not in times:
            continue
        forward, whole = (statistics.median(kept) for kept in times[result["name"]])
        result.update(
            ms_forward=round(forward, 3),
            ms=round(whole, 3),
            ps_per_logit=round(1e9 * whole / (rows * classes), 2),
            share_of_floor=round(bare / whole, 3),
            ms_floor=round(bare, 3),
        )
        if result["name"] == "torchmargin":
            result["logit_error"] = logit_error(x, w, y, dtype)
    return results


def table(results: list[dict]) -> str:
    columns = ["N", "C", "parameters", "compute", "contender", "ms fwd", "ms fwd+bwd", "ps per logit", "share of floor"]
    columns += ["peak MiB", "logit error"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for r in results:
        row = f"| {r['rows']} | {r['classes']:,} | {r['parameters'][6:]} | {r['compute'][6:]} | {r['name']} "
        if "not_run" in r:
            lines.append(f"{row}| {r['not_run']} | | | | | |")
            continue
        error = f"{r['logit_error']:.1e}" if "logit_error" in r else ""
        lines.append(
            f"{row}| {r['ms_forward']:.2f} | {r['ms']:.2f} | {r['ps_per_logit']:.2f} | {r['share_of_floor']:.2f} "
            f"| {r['peak_mib']:,} | {error} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1024, 4096])
    parser.add_argument("--classes", type=int, nargs="+", default=[93_431, 360_232, 2_059_906])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a GPU; benchmarks/cpu.py does not")
    cases = [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)]
    results = []
    sizes = [(rows, classes) for classes in options.classes for rows in options.rows]
    for rows, classes in tqdm(sizes, file=sys.stderr):
        for parameters, dtype in cases:
            torch._dynamo.reset()
            results += measure(rows, classes, parameters, dtype, options.runs)
    print(table(results))
    if options.json:
        report = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "torchmargin": torchmargin.__version__,
            "runs": options.runs,
            "results": results,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
