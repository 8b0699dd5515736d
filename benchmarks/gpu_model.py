"""What a step costs on a GPU by counting: launches, bytes, instructions, and the time that they need at least.

    python benchmarks/gpu_model.py                       B = 1024, D = 512, C = 360,232 on the GPUs below
    python benchmarks/gpu_model.py --rows 256 --gpu "A100 SXM" --chunk 8448

ArcFace of float32 parameters with float16 products, forward + backward, chunk by chunk as the library's plan cuts it
for that GPU. Each launch takes the longest of: its bytes at the memory's rate, its bytes at the L2 cache's, its flop at
the tensor cores' rate (with output tiles in whole waves), its instructions at one a cycle and lane. The instructions of
the hot loops are what scripts/machine_code.py counts (docs/gpu.md); of other kernels only the bytes count. Nothing here
is measured: no launch ever reaches these rates, and what the caches do is assumed. It tells which launch a step waits
for, and what a change of the plan would bring.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

from torchmargin import _C


class Gpu(NamedTuple):
    """From data sheets, but for the cache's rate, which they do not give: about that of published measurements."""

    processors: int
    l2_mib: int
    fused: bool  # has the kernel that makes logits and what becomes of them (cuda/hopper)
    ghz: float
    memory: float  # bytes a second
    cache: float  # bytes a second
    tensor: float  # float16 products with float32 sums, dense, flop a second


GPUS = {
    "H200 SXM": Gpu(132, 60, True, 1.83, 4.8e12, 5.5e12, 989e12),
    "H100 SXM": Gpu(132, 50, True, 1.83, 3.35e12, 5.5e12, 989e12),
    "A100 SXM": Gpu(108, 40, False, 1.41, 2.0e12, 3.5e12, 312e12),
    "RTX 4090": Gpu(128, 72, False, 2.52, 1.0e12, 5.0e12, 165e12),
    "B200": Gpu(148, 126, False, 1.85, 8.0e12, 9.0e12, 2250e12),
}
# Instructions a logit, rare branches with them (sm_90).
SUM, SOFTMAX = 6.0, 7.8
GAP = 1e-6  # seconds between two launches of one stream


class Launch(NamedTuple):
    name: str
    memory: float = 0.0  # bytes
    cache: float = 0.0
    instructions: float = 0.0
    flop: float = 0.0
    tiles: int = 0  # output tiles of its product; 0: as it suits cuBLAS

    def seconds(self, gpu: Gpu) -> dict[str, float]:
        """By what it may be bound."""
        bound = {
            "memory": self.memory / gpu.memory,
            "cache": self.cache / gpu.cache,
            "instructions": self.instructions / (gpu.processors * 128 * gpu.ghz * 1e9),
        }
        if self.flop:  # without tiles of ours in whole waves
            waves = math.ceil(self.tiles / gpu.processors) * gpu.processors / self.tiles if self.tiles else 1.0
            bound["products"] = waves * self.flop / gpu.tensor
        return bound


def tiles(rows: int, columns: int, wide: int = 256) -> int:
    return math.ceil(rows / 128) * math.ceil(columns / wide)


def launches(rows: int, features: int, chunk: int, fused: bool) -> dict[str, list[Launch]]:
    """Of one chunk."""
    logits, weights = rows * chunk, chunk * features
    flop = 2.0 * logits * features
    load = Launch("load weights", memory=4.0 * weights, cache=2.0 * weights)
    if fused:  # tiles of 128 x 256, and what two of them share is read once
        read = tiles(rows, chunk) * 2.0 * (128 + 128) * features
        forward = [load, Launch("logits and their sums", cache=read, flop=flop, tiles=tiles(rows, chunk))]
        again = [Launch("logits and softmax weights", cache=read + 2.0 * logits, flop=flop, tiles=tiles(rows, chunk))]
    else:
        product = Launch("logits' product", cache=4.0 * logits, flop=flop, tiles=tiles(rows, chunk))
        forward = [load, product, Launch("sum of exponentials", cache=4.0 * logits, instructions=SUM * logits)]
        again = [product, Launch("softmax weights", cache=6.0 * logits, instructions=SOFTMAX * logits)]
    backward = [
        load,
        *again,
        Launch("input's gradient", cache=2.0 * logits, flop=flop),  # cuBLAS takes smaller tiles, or parts of the sum
        Launch("weights' gradient", cache=2.0 * logits, flop=flop, tiles=tiles(chunk, features, 128)),
        Launch("finish classes", memory=8.0 * weights, cache=4.0 * weights),
    ]
    return {"forward": forward, "backward": backward}


def report(rows: int, features: int, classes: int, chunk: int | None, name: str) -> str:
    gpu = GPUS[name]
    plan = _C.plan_for_gpu(rows, features, classes, gpu.processors, gpu.l2_mib << 20, gpu.fused)
    size = chunk or plan["class_chunk"]
    chunks = math.ceil(classes / size)
    recomputed = 1 - plan["kept_classes"] / classes
    lines = [
        f"{name}: B = {rows:,}, D = {features}, C = {classes:,}; {chunks} chunks of {size:,} classes, "
        f"{1 - recomputed:.0%} of the products kept",
        "",
        "| launch of a chunk | MB of memory | MB of cache | instructions a logit | bound by | us |",
        "|---|---|---|---|---|---|",
    ]
    total, count = 0.0, 0.0
    for direction, found in launches(rows, features, size, gpu.fused).items():
        for each in found:
            share = recomputed if direction == "backward" and each.name == "logits' product" else 1.0
            bound = each.seconds(gpu)
            by = max(bound, key=lambda key: bound[key])
            total += share * bound[by]
            count += share
            lines.append(
                f"| {direction}: {each.name} | {each.memory / 1e6:.1f} | {each.cache / 1e6:.1f} | "
                f"{each.instructions / (rows * size):.1f} | {by if bound[by] else ''} | {1e6 * bound[by]:.1f} |"
            )
    flop = 2.0 * rows * size * features
    seconds = chunks * (total + count * GAP)
    lines += [
        f"| gaps between {count:.1f} launches | | | | | {1e6 * count * GAP:.1f} |",
        "",
        f"At least {1e3 * seconds:.2f} ms, {1e12 * seconds / (rows * classes):.1f} ps a logit; the four products alone "
        f"{1e12 * chunks * 4 * flop / gpu.tensor / (rows * classes):.1f}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--classes", type=int, default=360_232)
    parser.add_argument("--chunk", type=int, help="classes in a chunk, instead of the plan's")
    parser.add_argument("--gpu", nargs="+", choices=sorted(GPUS), default=list(GPUS))
    options = parser.parse_args()
    reports = [report(options.rows, options.features, options.classes, options.chunk, name) for name in options.gpu]
    print("\n\n".join(reports))


if __name__ == "__main__":
    main()
