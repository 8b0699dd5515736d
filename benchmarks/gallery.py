"""Identification against a large gallery: the built-in search, faiss's exact one and its cells, and the C++ example's.

    python benchmarks/gallery.py                     # a million entries of 128 numbers
    python benchmarks/gallery.py --entries 100000 --program build/consumer/search_gallery

Entries are drawn around centers (people of some images each), probes are entries with noise; all are unit vectors.
Every exact search must find what the first one does before anything is timed. Times are of one search of all probes,
contenders in turn (benchmarks/measure.py); "index" is the time to make it, "MiB" what that adds to the resident set at
its peak. The C++ program is tests/consumer/search_gallery.cpp, built with CMake, with times of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from measure import MiB, resident_peak, rounded_ms, time_in_turn, write_report
from torch import Tensor

from torchmargin.evaluation import Gallery


def drawn(entries: int, features: int, probes: int, each: int = 10) -> tuple[Tensor, Tensor]:
    """Unit vectors: entries around entries / each centers, and probes around some of the entries."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize
    centers = unit(torch.randn(-(-entries // each), features, generator=generator))
    gallery = centers.repeat_interleave(each, 0)[:entries]
    gallery = unit(gallery + 0.7 * unit(torch.randn(gallery.shape, generator=generator)))
    chosen = torch.randint(entries, (probes,), generator=generator)
    return unit(gallery[chosen] + 0.7 * unit(torch.randn(probes, features, generator=generator))), gallery


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--probes", type=int, default=256)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--program", type=Path, help="tests/consumer's search_gallery, built")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        import faiss

        faiss.omp_set_num_threads(options.threads)
        indices = ("builtin", "exact", "ivf")
    except ImportError:
        print("faiss is not installed: the built-in search alone")
        indices = ("builtin",)
    probes, entries = drawn(options.entries, options.features, options.probes)

    galleries: dict[str, Gallery] = {}
    made: dict[str, tuple[float, int]] = {}
    for index in indices:
        began = time.perf_counter()

        def make(index: str = index) -> None:
            galleries[index] = Gallery(entries, index=index)  # type: ignore[arg-type]

        peak = resident_peak(make)
        made[index] = time.perf_counter() - began, peak
    contenders = {name: lambda of=of: of.search(probes, options.k) for name, of in galleries.items() if name != "ivf"}
    first = galleries["builtin"].search(probes, options.k)
    for name, search in contenders.items():
        found = search()
        assert (found[0] - first[0]).abs().max() < 1e-5, name
        assert (found[1] == first[1]).double().mean() > 0.999, name  # but where two cosines are equal
    recalls = {name: 1.0 for name in contenders}
    if "ivf" in galleries:
        of = galleries["ivf"]
        for visits in sorted({1, max(1, of.cells // 256), max(1, of.cells // 64), max(1, of.cells // 16)}):
            name = f"ivf, {visits} of {of.cells} cells"

            def search(visits: int = visits, of: Gallery = of) -> object:
                of.visits = visits
                return of.search(probes, options.k)

            found = search()
            recalls[name] = (found[1][:, 0] == first[1][:, 0]).double().mean().item()
            contenders[name] = search
    times = time_in_turn(contenders, options.runs, f"{options.entries:,} entries")
    medians = {name: 1000 * statistics.median(of) for name, of in times.items()}
    if options.program is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "inputs.pt"
            torch.save({"probes": probes, "gallery": entries}, path)
            environment = {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
            ran = subprocess.run(
                [options.program, path, str(options.k)], env=environment, capture_output=True, text=True, check=True
            )
        lines = ran.stdout.splitlines()
        places = torch.tensor([[int(word) for word in line.split()] for line in lines[1:]])
        assert (places == first[1]).double().mean() > 0.999
        medians["C++ example"] = 1000 * statistics.median(map(float, lines[0].split()[1:]))
        recalls["C++ example"] = 1.0

    results = []
    print(
        f"{options.entries:,} x {options.features}, {options.probes} probes, k = {options.k}, {options.threads} threads"
    )
    print(f"{'':26}{'search ms':>12}{'builtin / it':>14}{'recall@1':>10}{'index s':>9}{'MiB':>8}")
    for name, ms in medians.items():
        seconds, peak = made.get(name.split(",")[0], (0.0, 0))
        ratio = medians["builtin"] / ms
        print(f"{name:26}{ms:12.1f}{ratio:14.2f}{recalls[name]:10.3f}{seconds:9.1f}{peak / MiB:8.0f}")
        results.append(
            {"search": name, "ms": rounded_ms(ms), "builtin_over_it": round(ratio, 2), "recall_at_1": recalls[name]}
            | {"index_seconds": round(seconds, 1), "peak_mib": round(peak / MiB)}
            | {"entries": options.entries, "features": options.features, "probes": options.probes, "k": options.k}
        )
    write_report("identification against a gallery", options, results)


if __name__ == "__main__":
    main()
