"""How benchmarks on the CPU measure: contenders in turn, and resident memory."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import torchmargin

MiB = 1 << 20
SHORTEST = 0.01  # seconds that are timed at a time


def _status(field: str) -> int:
    """A memory figure of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def available() -> int:
    """Bytes that this machine could still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    raise KeyError("MemAvailable")


def resident_peak(run: Callable[[], object]) -> int:
    """Bytes that `run` adds to the resident set at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def time_in_turn(contenders: dict[str, Callable[[], object]], runs: int, label: str) -> dict[str, list[float]]:
    """Seconds of each contender in each of `runs` rounds, all of them in turn.

    Each runs twice in a row and the second run counts: see benchmarks/cpu.py. Short ones are timed as a few in a row.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    steps = {}
    for name, run in contenders.items():
        began = time.perf_counter()
        run()
        steps[name] = max(1, round(SHORTEST / (time.perf_counter() - began)))
    for _ in tqdm(range(runs), desc=label, leave=False, file=sys.stderr):
        for name, run in contenders.items():
            run()
            began = time.perf_counter()
            for _ in range(steps[name]):
                run()
            times[name].append((time.perf_counter() - began) / steps[name])
    return times


def rounded_ms(ms: float) -> float:
    return round(ms, 1 if ms >= 10 else 3)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def write_report(what: str, options: argparse.Namespace, results: list[dict]) -> None:
    """To --json, where it is given: the figures, and what they were measured with."""
    if options.json is None:
        return
    report = {
        "what": what,
        "torchmargin": torchmargin.__version__,
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "threads": options.threads,
        "runs": options.runs,
        "workspace_limit": torchmargin.get_workspace_limit(),
        "results": results,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
