"""``eval``: how good an embedder is, and from which cosine on to take two faces for one person's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from recipes.face import protocols
from recipes.face.embedders import load_embedder
from recipes.face.errors import RecipeError
from recipes.face.protocols import Pairs
from torchmargin.evaluation import Thresholds


def evaluate(
    embedder_file: Path,
    out: Path,
    *,
    bins: list[Path] | None = None,
    lfw: tuple[Path, Path] | None = None,
    ijb: tuple[Path, str] | None = None,
    flip: bool | None = None,
    thresholds: Thresholds = "exact",
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Writes report.json and roc.png to ``out``, and the thresholds into the embedder (those of single images: not
    IJB's templates). Returns the report. flip: with mirror images or not; None: as the embedder says."""
    bins = bins or []
    if not bins and lfw is None and ijb is None:
        raise RecipeError("expected pairs to evaluate on: --bin, --lfw or --ijb")
    if len({path.stem for path in bins}) < len(bins):
        raise RecipeError("two of the --bin sets have one name")
    embedder = load_embedder(embedder_file, device)
    if flip is not None:
        embedder.flip = flip  # thresholds are of such embeddings
    images: dict[str, Pairs] = {}
    for path in bins:
        images[path.stem] = protocols.bin_pairs(embedder, path, progress=progress)
    if lfw is not None:
        images["lfw pairs"] = protocols.lfw_pairs(embedder, *lfw, progress=progress)
    report: dict[str, Any] = {name: protocols.report(pairs, thresholds) for name, pairs in images.items()}
    curves = dict(images)
    if ijb is not None:
        name = f"IJB-{ijb[1]}"
        curves[name] = protocols.ijb_pairs(embedder, *ijb, progress=progress)
        report[name] = protocols.ijb_report(curves[name])
    result: dict[str, Any] = {"embedder": str(embedder_file), "flip": embedder.flip, "sets": report}
    if images:
        embedder.thresholds = protocols.thresholds_of(images.values())
        embedder.save(embedder_file)
        result["threshold_at_far"] = embedder.thresholds
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (out / "roc.png").write_bytes(protocols.roc_picture(curves))
    return result


def add_commands(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    """``eval`` to the recipe's."""
    made = commands.add_parser("eval", help="accuracy, EER and TAR at FAR of an embedder; saves its thresholds in it")
    made.add_argument("embedder", type=Path)
    made.add_argument("--bin", type=Path, nargs="+", default=[], metavar="BIN", help="verification sets")
    made.add_argument("--lfw", type=Path, nargs=2, metavar=("ROOT", "PAIRS"), help="aligned images and pairs.txt")
    made.add_argument("--ijb", nargs=2, metavar=("ROOT", "B|C"), help="IJB-B or IJB-C as InsightFace packs it")
    made.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="embeddings with those of mirror images (default: as the embedder says)",
    )
    made.add_argument(
        "--thresholds", choices=["exact", "insightface"], default="exact", help="that the ten folds choose from"
    )
    made.add_argument("--out", type=Path, help="for report.json and roc.png (default: beside the embedder)")
    made.add_argument("--device", default="cpu")
    made.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.ijb is not None and options.ijb[1] not in ("B", "C"):
        raise RecipeError(f"expected --ijb ROOT B or C, but got {options.ijb[1]!r}")
    result = evaluate(
        options.embedder,
        options.out or options.embedder.parent,
        bins=options.bin,
        lfw=None if options.lfw is None else (options.lfw[0], options.lfw[1]),
        ijb=None if options.ijb is None else (Path(options.ijb[0]), options.ijb[1]),
        flip=options.flip,
        thresholds=options.thresholds,
        device=options.device,
    )
    for name, found in result["sets"].items():
        accuracy = (
            f"accuracy {found['accuracy']:.4f} ± {found['accuracy_deviation']:.4f}, " if "accuracy" in found else ""
        )
        rates = ", ".join(f"TAR {tar:.4f} at FAR {far}" for far, tar in found["tar_at_far"].items())
        print(f"{name}: {accuracy}EER {found['eer']:.4f}, {rates or 'too few pairs for a FAR'}")
    for far, threshold in result.get("threshold_at_far", {}).items():
        print(f"cosine of at least {threshold:.4f} for FAR {far}")
    return 0
