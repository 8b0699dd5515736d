"""ArcFace forward and backward on a GPU beside what people run today.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --rows 1024 --classes 360232 --runs 11
    python benchmarks/gpu.py --details      what tells where the time goes, instead

CUDA events, contenders interleaved, medians, the L2 cache flushed before each run. D = 512. Columns: ms forward, ms
forward + backward, the same as the GPU alone takes it (behind a pause in which the host runs ahead: where it is less
than the column before, the host is too slow), ps per logit (forward + backward), share of the floor (four bare 16-bit
products of these sizes with 16-bit results, measured in the same run; the other floor has float32 results in buffers
made before), peak MiB beyond inputs and gradients, largest error of a logit. A contender that fails is named with its
reason. Peers get the same embeddings and weights; "InsightFace order" is its fp16 product, then fp32. Fused losses of
language models, where they are installed, know no margin: they get 16-bit unit vectors, made once, and their
normalisation and its gradient are not counted.

Needs torch and nothing else. With --json the figures so far are written after each case. --device cpu rehearses it all
on a few rows and classes; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as TF

import torchmargin
import torchmargin.functional as F

from peers import MARGIN, SCALE, eager, fused_language_model_losses, insightface_order

FEATURES = 512
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CASES = [("float32", "float16"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]
PAUSE = 50_000_000  # cycles: longer than the host needs for a step


def ours(x: Tensor, w: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.linear_margin_cross_entropy(x, w, y, scale=SCALE, m2=MARGIN, **options)


class Clock:
    """Times of a device; a CPU's, in a rehearsal."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.scrap = torch.empty((256 if device == "cuda" else 1) << 20, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def ms(self, run: Callable[[], object], ahead: bool = False) -> float:
        """Of one run with a cold L2 cache; `ahead`: the host has queued all of it before the GPU begins."""
        self.scrap.zero_()
        if self.device != "cuda":
            began = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - began)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if ahead:
            torch.cuda._sleep(PAUSE)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak(self, run: Callable[[], list[Tensor]]) -> int:
        """Bytes beyond what is there and the results."""
        if self.device != "cuda":
            run()
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - sum(each.nbytes for each in results)


def reason_of(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def under_autocast(loss, device: str, dtype: torch.dtype):
    def run(x, w, y):
        with torch.autocast(device, dtype=dtype, enabled=w.dtype == torch.float32):
            return loss(x, w, y)

    return run


def contenders(device: str, dtype: torch.dtype) -> dict:
    """name -> loss(x, w, y), each under autocast to `dtype` where the weights are float32."""
    own = {
        "torchmargin": ours,
        "eager": eager,
        "InsightFace order": insightface_order,
        "torch.compile": torch.compile(eager, dynamic=False),
    }
    found = {name: under_autocast(loss, device, dtype) for name, loss in own.items()}
    return found if device == "cpu" else {**found, **fused_language_model_losses()}


def floors(x: Tensor, w: Tensor, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The four bare products, logits twice and each gradient's, in chunks of 8192 classes."""
    x16, w16 = x.detach().to(dtype), w.detach().to(dtype)
    chunk = min(8192, len(w16))

    def narrow():
        for part in w16.split(chunk):
            logits = x16 @ part.T
            logits = x16 @ part.T
            logits.T @ x16
            logits @ part

    logits = torch.empty(len(x16), chunk, device=x.device)
    of_part = torch.empty(chunk, x16.shape[1], device=x.device)
    of_rows = torch.empty(x16.shape, device=x.device)
    weights = torch.zeros(len(x16), chunk, device=x.device, dtype=dtype)

    def wide():
        for part in w16.split(chunk):
            count = len(part)
            for _ in range(2):
                torch.mm(x16, part.T, out_dtype=torch.float32, out=logits[:, :count])
            torch.mm(weights[:, :count].T, x16, out_dtype=torch.float32, out=of_part[:count])
            torch.mm(weights[:, :count], part, out_dtype=torch.float32, out=of_rows)

    return {"16-bit results": narrow} if x.device.type == "cpu" else {"16-bit results": narrow, "float32 results": wide}


def logit_error(x: Tensor, w: Tensor, dtype: torch.dtype) -> float:
    """The largest error of our logits on the first rows and classes, against float64."""
    x, w = x.detach()[:64], w.detach()[:20_000]
    with torch.autocast(x.device.type, dtype=dtype, enabled=w.dtype == torch.float32):
        got = F.margin_logits(x, w, None, scale=SCALE)
    true = SCALE * TF.normalize(x.double()) @ TF.normalize(w.double()).T
    return (got.double() - true).abs().max().item()


def problem(rows: int, classes: int, parameters: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(rows, FEATURES, device=device).to(DTYPES[parameters]).requires_grad_()
    w = (0.01 * torch.randn(classes, FEATURES, device=device)).to(DTYPES[parameters]).requires_grad_()
    return x, w, torch.randint(0, classes, (rows,), device=device)


def measure(rows: int, classes: int, parameters: str, compute: str, runs: int, clock: Clock) -> list[dict]:
    x, w, y = problem(rows, classes, parameters, clock.device)
    dtype = DTYPES[compute]
    prenormalised = fused_language_model_losses() if clock.device == "cuda" else {}
    unit_x = unit_w = None
    if prenormalised:
        unit_x, unit_w = (TF.normalize(t.detach()).to(dtype).requires_grad_() for t in (x, w))
    runners, results = {}, []
    for name, loss in contenders(clock.device, dtype).items():
        result = {"name": name, "rows": rows, "classes": classes, "parameters": parameters, "compute": compute}
        results.append(result)
        of_x, of_w = (unit_x, unit_w) if name in prenormalised else (x, w)
        step = lambda loss=loss, x=of_x, w=of_w: torch.autograd.grad(loss(x, w, y), (x, w))
        try:
            step()  # warm up
            clock.synchronize()
            result["peak_mib"] = round(clock.peak(step) / 2**20)
        except Exception as error:  # one that does not take this problem is no reason to stop
            result["not_run"] = reason_of(error)
            continue
        runners[name] = (lambda loss=loss, x=of_x, w=of_w: loss(x, w, y)), step
    bare: dict[str, list[float]] = {}
    usable = {}
    for name, products in floors(x, w, dtype).items():
        try:
            products()
            clock.synchronize()
            usable[name], bare[name] = products, []
        except Exception as error:
            results.append({"name": f"floor, {name}", "rows": rows, "classes": classes, "parameters": parameters})
            results[-1].update(compute=compute, not_run=reason_of(error))
    times: dict[str, list[list[float]]] = {name: [[], [], []] for name in runners}
    for _ in range(runs):
        for name, products in usable.items():
            bare[name].append(clock.ms(products))
        for name, (forward, step) in runners.items():
            for kept, run, ahead in zip(times[name], (forward, step, step), (False, False, True)):
                kept.append(clock.ms(run, ahead))
    floor_ms = {name: statistics.median(kept) for name, kept in bare.items()}
    for result in results:
        if result["name"] not in times:
            continue
        forward, whole, alone = (statistics.median(kept) for kept in times[result["name"]])
        result.update(
            ms_forward=round(forward, 3),
            ms=round(whole, 3),
            ms_gpu_alone=round(alone, 3),
            ps_per_logit=round(1e9 * whole / (rows * classes), 2),
            ms_floors={name: round(ms, 3) for name, ms in floor_ms.items()},
        )
        if "16-bit results" in floor_ms:
            result["share_of_floor"] = round(floor_ms["16-bit results"] / whole, 3)
        if result["name"] == "torchmargin":
            result["logit_error"] = logit_error(x, w, dtype)
    return results


# ---- where the time goes -----------------------------------------------------------------------------------------


def details(runs: int, clock: Clock, report: dict, write: Callable[[], None]) -> None:
    """Cases of their own, each written as soon as it is there."""
    device, small = clock.device, clock.device == "cpu"
    rows, classes = (16, 500) if small else (1024, 360_232)
    x, w, y = problem(rows, classes, "float32", device)
    half = {"compute_dtype": torch.float16} if device == "cuda" else {}

    def step(loss=ours, x=x, w=w, y=y, **options):
        return lambda: torch.autograd.grad(loss(x, w, y, **{**half, **options}), (x, w))

    def lse(x, w, y, **options):
        return F.linear_margin_lse(x, w, y, scale=SCALE, m2=MARGIN, **options)[0].sum()

    few = problem(64 if small else 4096, 10, "float32", device)
    many = problem(32 if small else 4096, 200 if small else 93_431, "float32", device)
    turned = w.detach().t().contiguous().t().requires_grad_()
    cases = {
        "as it is": step(),
        "label smoothing": step(label_smoothing=0.1),
        "linear_margin_lse": step(lse),
        "weights as they are (no normalize_weight)": step(normalize_weight=False, normalize_input=False),
        "weights in column order": step(w=turned),
        f"C = 10, B = {len(few[0])}": lambda: torch.autograd.grad(ours(*few, **half), few[:2]),
        f"C = {len(many[1]):,}, B = {len(many[0])}": lambda: torch.autograd.grad(ours(*many, **half), many[:2]),
        "float32 products": step(compute_dtype=None),
        "CurricularFace": step(hard_coefficients=torch.tensor([1.0, 0.3, 0.0], device=device)),
        "hardest = 5": step(hardest=5, hardest_margin=0.06),
        "sub_centers = 2": lambda: torch.autograd.grad(ours(x, w, y // 2, sub_centers=2, **half), (x, w)),
    }
    found = report.setdefault("details", [])

    def record(name: str, run: Callable[[], object]) -> None:
        try:
            run()
            clock.synchronize()
            times = [(clock.ms(run), clock.ms(run, ahead=True)) for _ in range(runs)]
            both, alone = (round(statistics.median(kept), 3) for kept in zip(*times))
            found.append({"case": name, "ms": both, "ms_gpu_alone": alone})
        except Exception as error:
            found.append({"case": name, "not_run": reason_of(error)})
        write()

    for name, run in cases.items():
        record(name, run)
    # Other chunks and more or fewer kept products: the plan follows the workspace.
    for mib in (16, 64, 256, 1024):
        with torchmargin.workspace_limit(mib << 20, device):
            plan = torchmargin.plan(rows, FEATURES, classes, dtype=torch.float32, device=device, **half)
            record(f"workspace {mib} MiB: chunks of {plan.class_chunk:,}, {plan.kept_classes:,} kept", step())
    if device == "cuda":
        record("two streams, a step each", two_streams(step()))
        report["profile"] = profile(step())
        write()


def two_streams(run: Callable[[], object]) -> Callable[[], None]:
    streams = [torch.cuda.Stream() for _ in range(2)]

    def both() -> None:
        current = torch.cuda.current_stream()
        for stream in streams:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                run()
        for stream in streams:
            current.wait_stream(stream)

    return both


def profile(run: Callable[[], object]) -> list[dict]:
    """The kernels of a step, the longest first."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        kernels = sorted(profiler.key_averages(), key=lambda each: -each.self_device_time_total)
        return [
            {"kernel": each.key[:90], "calls": each.count, "us": round(each.self_device_time_total, 1)}
            for each in kernels[:25]
        ]
    except Exception as error:
        return [{"not_run": reason_of(error)}]


# ---- what is printed -----------------------------------------------------------------------------------------------


def table(results: list[dict]) -> str:
    columns = ["N", "C", "parameters", "compute", "contender", "ms fwd", "ms fwd+bwd", "GPU alone", "ps per logit"]
    columns += ["share of floor", "peak MiB", "logit error"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for r in results:
        row = f"| {r['rows']} | {r['classes']:,} | {r['parameters']} | {r['compute']} | {r['name']} "
        if "not_run" in r:
            lines.append(f"{row}| {r['not_run']} | | | | | | |")
            continue
        error = f"{r['logit_error']:.1e}" if "logit_error" in r else ""
        share = f"{r['share_of_floor']:.2f}" if "share_of_floor" in r else ""
        lines.append(
            f"{row}| {r['ms_forward']:.2f} | {r['ms']:.2f} | {r['ms_gpu_alone']:.2f} | {r['ps_per_logit']:.2f} "
            f"| {share} | {r['peak_mib']:,} | {error} |"
        )
    return "\n".join(lines)


def details_table(report: dict) -> str:
    lines = ["| case | ms fwd+bwd | GPU alone |", "|---|---|---|"]
    for r in report.get("details", []):
        lines.append(
            f"| {r['case']} | {r['not_run']} | |"
            if "not_run" in r
            else f"| {r['case']} | {r['ms']:.2f} | {r['ms_gpu_alone']:.2f} |"
        )
    if report.get("profile"):
        lines += ["", "| kernel | calls | us |", "|---|---|---|"]
        lines += [
            f"| {r.get('kernel', r.get('not_run'))} | {r.get('calls', '')} | {r.get('us', '')} |"
            for r in report["profile"]
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1024, 4096])
    parser.add_argument("--classes", type=int, nargs="+", default=[93_431, 360_232, 2_059_906])
    parser.add_argument("--cases", nargs="+", default=[f"{p}:{c}" for p, c in CASES], help="parameters:compute")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--details", action="store_true", help="where the time goes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a GPU; benchmarks/cpu.py does not")
    clock = Clock(options.device)
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else "none: a rehearsal on the CPU",
        "torch": torch.__version__,
        "torchmargin": torchmargin.__version__,
        "runs": options.runs,
        "results": [],
    }

    def write() -> None:
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")

    if options.details:
        details(options.runs, clock, report, write)
        print(details_table(report))
        return
    sizes = [(rows, classes) for classes in options.classes for rows in options.rows]
    if options.device == "cpu":
        sizes = [(16, 300)]
    for rows, classes in sizes:
        for case in options.cases:
            parameters, compute = case.split(":")
            torch._dynamo.reset()
            try:
                report["results"] += measure(rows, classes, parameters, compute, options.runs, clock)
            except Exception as error:  # inputs that do not fit, say
                result = {"name": "all", "rows": rows, "classes": classes, "parameters": parameters, "compute": compute}
                report["results"].append({**result, "not_run": reason_of(error)})
            write()
            print(f"{rows} x {classes:,}, {case}: done", flush=True)
    print(table(report["results"]))


if __name__ == "__main__":
    main()
