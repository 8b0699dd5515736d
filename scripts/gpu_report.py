"""Gathers what gpu_check.sh left in its folder into report.json and a one-page report.md."""

import json
import re
import sys
from pathlib import Path


def read_json(path: Path):
    """The last line of a log that is JSON, or the file itself; None if there is none."""
    if not path.exists():
        return None
    text = path.read_text()
    for candidate in (text, *reversed(text.strip().splitlines())):
        try:
            return json.loads(candidate)
        except ValueError:
            continue
    return None


def summary(folder: Path, name: str) -> str:
    """What a test run counted."""
    log = folder / f"{name}.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    counted = [line for line in lines if re.search(r"(\d+|all) (passed|failed)|PASSED|FAILED|ERROR SUMMARY", line)]
    return counted[-1].strip(" =") if counted else ""


def main() -> None:
    folder = Path(sys.argv[1])
    steps = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()]
    report = {
        "machine": read_json(folder / "versions.log"),
        "steps": [
            {"name": name, "result": result, "seconds": int(seconds), "summary": summary(folder, name)}
            for name, result, seconds in steps
        ],
        "accuracy": read_json(folder / "accuracy.json"),
        **{name: read_json(folder / f"{name}.json") for name in ("benchmark", "details", "benchmark_sizes")},
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    machine = report["machine"] or {}
    lines = [f"# GPU check: {machine.get('gpu', 'no GPU')}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in machine.items()), ""]
    lines += ["| step | result | seconds | |", "|---|---|---|---|"]
    lines += [f"| {s['name']} | {s['result']} | {s['seconds']} | {s['summary']} |" for s in report["steps"]]
    for name in ("ops", "benchmark", "details", "benchmark_sizes", "accuracy"):
        log = folder / f"{name}.log"
        if log.exists():
            table = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("|")]
            lines += ["", f"## {name}", "", *table] if table else []
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
