"""Classes over ranks on gloo: memory a class, what travels, and time beside InsightFace's order of steps.

    python benchmarks/distributed.py                       two ranks, one thread each
    python benchmarks/distributed.py --only memory --classes 400000 --ranks 4

Memory: the resident peak of a training step of the head, and what stays between steps, in bytes a class of a rank at
D = 512; from them how many identities fit 8 GPUs of 32 GB beside a network of 4,718 MiB and 256 MiB of workspace.
Time: forward + backward of ArcFace on every rank, without the network, medians of interleaved runs; the peer's loss is
first shown equal to ours. Bytes: what a rank receives (an all_reduce counted as the ring's two passes).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import MiB, resident_peak
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import torchmargin
from torchmargin.distributed import ClassParallel, ClassSampler, attach_row_optimizer, step_in_backward

from peers import MARGIN, SCALE, PartialFcOrder

GPUS, GPU_MIB, BESIDE_MIB = 8, 32_300, 4_718 + 256


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


def sgd_by_block(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4, foreach=False)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


# name -> optimizer, blocks, whether it steps in the backward, the sampler's rate
CASES = {
    "dense, SGD (foreach)": (sgd, 1, False, None),
    "16 blocks, SGD (foreach=False)": (sgd_by_block, 16, False, None),
    "4 blocks, SGD, step in backward": (sgd, 4, True, None),
    "16 blocks, SGD, step in backward": (sgd, 16, True, None),
    "16 blocks, AdamW (fused), step in backward": (adamw, 16, True, None),
    "sampled 0.1, SGD": (sgd, 1, False, 0.1),
}


class Traffic(TorchDispatchMode):
    """Collectives and the bytes that a rank receives by them."""

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks, self.calls, self.bytes = ranks, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        if namespace in ("c10d", "_c10d_functional") and "wait" not in name:
            self.calls += 1
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            largest, others = max(t.nbytes for t in tensors), self.ranks - 1
            if name.startswith(("all_gather", "allgather")):  # of what a rank gives
                self.bytes += largest * others
            elif name.startswith(("all_reduce", "allreduce")):
                self.bytes += 2 * largest * others // self.ranks
            else:
                self.bytes += largest * others // self.ranks
        return result


def head_of(mesh, features, classes, rows, blocks=1, sampler=None):
    torch.manual_seed(0)
    loss = torchmargin.ArcFaceLoss(features, classes, scale=SCALE, margin=MARGIN, device="meta")
    return ClassParallel(loss, mesh, blocks=blocks, max_rows=rows, sampler=sampler, input_grad_scale=1.0)


def batch_of(rank, rows, features, classes):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(rows, features, generator=generator).requires_grad_()
    return x, torch.randint(0, classes, (rows,), generator=generator)


def memory(rank, mesh, case, rows, features, classes):
    make, blocks, in_backward, rate = CASES[case]
    head = head_of(mesh, features, classes, rows, blocks, None if rate is None else ClassSampler(rate))
    optimizer = make(head.parameters())
    if in_backward:
        step_in_backward(head, optimizer)
    elif rate is not None:
        attach_row_optimizer(head, optimizer)
    x, y = batch_of(rank, rows, features, classes)

    def step():
        loss = head(x, y)
        if not in_backward:
            optimizer.zero_grad()
        loss.backward()
        if not in_backward:
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(2):
        step()
    gc.collect()
    own = sum(count for _, count in head.class_ranges)
    peak = resident_peak(step)
    states = sum(1 for state in optimizer.state_dict()["state"].values() for t in state.values() if _is_of_rows(t))
    weights = 1 + (max(states // blocks, 0) if rate is None else 1)  # W, and the optimizer's state of every row
    per_class = weights * 4 * features + peak / own
    return {"case": case, "rest": weights * 4 * features, "peak": peak / own, "vectors": per_class / (4 * features)}


def _is_of_rows(tensor) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.dim() == 2


def timing(rank, mesh, rows, features, classes, runs):
    head = head_of(mesh, features, classes, rows)
    x, y = batch_of(rank, rows, features, classes)
    (weight,) = (block.to_local().detach().clone().requires_grad_() for block in head.weight)
    theirs = PartialFcOrder(mesh.get_group(), head.class_ranges[0][0])
    contenders = {"ours": lambda: head(x, y), "InsightFace's PartialFC order": lambda: theirs(x, weight, y)}
    values = [contender().item() for contender in contenders.values()]
    assert abs(values[0] - values[1]) < 1e-4 * abs(values[0]), values
    times, traffic = {name: [] for name in contenders}, {}
    for _ in range(runs):
        for name, contender in contenders.items():
            for _ in range(2):  # the second counts: see cpu.py
                head.zero_grad()
                x.grad = weight.grad = None
                dist.barrier()
                begin = time.perf_counter()
                contender().backward()
                end = time.perf_counter()
            times[name].append(1e3 * (end - begin))
    for name, contender in contenders.items():
        with Traffic(mesh.size()) as seen:
            contender().backward()
        traffic[name] = {"calls": seen.calls, "bytes": seen.bytes}
    medians = {name: statistics.median(found) for name, found in times.items()}
    ratios = {name: statistics.median(a / b for a, b in zip(times[name], times["ours"])) for name in contenders}
    return [
        {"name": name, "rows": rows, "features": features, "classes": classes, "ms": round(medians[name], 1),
         "ratio": round(ratios[name], 2), **traffic[name]}
        for name in contenders
    ]  # fmt: skip


def as_rank(rank, ranks, store, function, arguments, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    found = function(rank, init_device_mesh("cpu", (ranks,)), *arguments)
    if rank == 0:
        Path(results).write_text(json.dumps(found))
    gc.collect()  # what holds the process group has to go before it
    dist.destroy_process_group()


def on_ranks(ranks, function, *arguments):
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed leaves the resident set
    with tempfile.TemporaryDirectory() as folder:
        results = f"{folder}/results"
        mp.spawn(as_rank, args=(ranks, f"{folder}/store", function, arguments, results), nprocs=ranks)
        return json.loads(Path(results).read_text())


def identities(vectors: float) -> float:
    """At D = 512 on the GPUs above, in millions."""
    return GPUS * (GPU_MIB - BESIDE_MIB) * MiB / (2048 * vectors) / 1e6


def memory_table(results) -> str:
    lines = ["| | numbers of D a class, at the peak | bytes a class at D = 512 | million identities on 8 x 32 GB |"]
    lines.append("|---|---|---|---|")
    for r in results:
        bytes_ = 2048 * r["vectors"]
        lines.append(f"| {r['case']} | {r['vectors']:.2f} | {bytes_:,.0f} | {identities(r['vectors']):.0f} |")
    return "\n".join(lines)


def time_table(results) -> str:
    lines = [
        "| rows a rank | D | C | | ms | its time / ours | collectives | KiB received |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r['rows']} | {r['features']} | {r['classes']:,} | {r['name']} | {r['ms']} | {r['ratio']} "
            f"| {r['calls']} | {r['bytes'] / 1024:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", choices=["memory", "time"])
    parser.add_argument("--classes", type=int, default=200_000, help="for the memory, of all ranks")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    report = {"torchmargin": torchmargin.__version__, "torch": torch.__version__, "ranks": options.ranks}
    if options.only != "time":
        report["memory"] = [on_ranks(options.ranks, memory, case, 16, 512, options.classes) for case in CASES]
        print(memory_table(report["memory"]), flush=True)
    if options.only != "memory":
        sizes = [(64, 512, 20_000), (128, 512, 100_000)]
        report["time"] = [row for size in sizes for row in on_ranks(options.ranks, timing, *size, options.runs)]
        print(time_table(report["time"]))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
