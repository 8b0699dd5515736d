"""``verify``, ``enroll`` and ``identify``: photographs in, decisions out."""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from recipes.face.align import align_face, choose
from recipes.face.alignment import AlignmentError
from recipes.face.detection import Detector
from recipes.face.embedders import Embedder, load_embedder, load_plain, save_whole
from recipes.face.errors import RecipeError
from recipes.face.photos import BadImageError, bad, classes_of, images_in, read_photo
from torchmargin import evaluation

_GALLERY = "torchmargin.recipes.face.gallery/1"
UNKNOWN = "unknown"


class RecognitionError(RecipeError):
    """A photograph without a face, or a gallery that is none."""


class Faces:
    """Photographs to aligned faces and embeddings; with ``aligned`` they are aligned already."""

    def __init__(
        self, embedder: Embedder, *, aligned: bool = False, min_face: float = 20, min_score: float = 0.9
    ) -> None:
        self.embedder = embedder
        self.detector = None if aligned else Detector(min_face, min_score)

    def face(self, path: Path) -> Image.Image:
        """The largest face of a photograph; RecognitionError where there is none."""
        photo = read_photo(path)
        if self.detector is None:
            return photo
        found = choose(self.detector(photo), "largest", photo.size)
        if not found:
            raise RecognitionError(f"{path}: no face found")
        try:
            return align_face(photo, found[0], self.embedder.network.size, self.embedder.template)[0]
        except AlignmentError as error:
            raise RecognitionError(f"{path}: {error}") from None

    def embed(self, paths: Sequence[Path], on_bad: str = "fail", progress: bool = False) -> tuple[Tensor, list[Path]]:
        """Embeddings [N, D], and which photographs they are of: without those that are skipped."""
        kept: list[Path] = []

        def faces() -> Any:
            for path in tqdm(paths, unit="photo", leave=False, disable=not progress):
                try:
                    face = self.face(path)
                except (RecognitionError, BadImageError) as error:
                    if on_bad == "fail":
                        raise
                    tqdm.write(f"skipped {error}", file=sys.stderr)
                    continue
                kept.append(path)
                yield face

        return self.embedder.embed(faces()), kept


# ---- verify --------------------------------------------------------------------------------------------------------


class Decision(NamedTuple):
    cosine: float
    threshold: float
    same: bool


def verify(faces: Faces, first: Path, second: Path, threshold: float) -> Decision:
    """Are two photographs of one person?"""
    embeddings, _ = faces.embed([first, second])
    cosine = float(evaluation.pair_scores(embeddings, torch.tensor([0]), torch.tensor([1])))
    return Decision(cosine, threshold, cosine >= threshold)


# ---- enroll and identify -------------------------------------------------------------------------------------------


class Gallery(NamedTuple):
    """Known people: one embedding of unit length each."""

    names: list[str]
    embeddings: Tensor  # [G, D]
    images: list[int]  # of each
    embedder: str  # which one's embeddings they are


def enroll(faces: Faces, folder: Path, on_bad: str = "skip", progress: bool = True) -> Gallery:
    """Of a folder with a subfolder of photographs for each person."""
    names: list[str] = []
    parts: list[Tensor] = []
    counts: list[int] = []
    owners: list[int] = []
    people = classes_of(folder)
    shown = tqdm(people.items(), desc="enroll", unit="person", leave=False, disable=not progress)
    for name, paths in shown:
        embeddings, kept = faces.embed(paths, on_bad)
        if not kept:
            bad(folder / name, RecognitionError("no face in any photograph"), on_bad)
            continue
        owners += [len(names)] * len(kept)
        names.append(name)
        parts.append(torch.nn.functional.normalize(embeddings.double(), dim=1, eps=1e-12).float())
        counts.append(len(kept))
    if not names:
        raise RecognitionError(f"{folder}: no face in any photograph")
    owner = torch.tensor(owners)
    pooled, _ = evaluation.pool_templates(torch.cat(parts), owner, torch.arange(len(owner)))
    return Gallery(names, pooled, counts, fingerprint(faces.embedder))


def fingerprint(embedder: Embedder) -> str:
    """The same for the same weights and the same use of them."""
    import hashlib

    digest = hashlib.sha256(repr((embedder.network, embedder.mean, embedder.deviation, embedder.colors)).encode())
    digest.update(repr((embedder.flip, embedder.template)).encode())
    for name, value in embedder.model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_gallery(gallery: Gallery, path: Path) -> None:
    save_whole({"format": _GALLERY, **gallery._asdict()}, path)


def load_gallery(path: Path, embedder: Embedder) -> Gallery:
    """RecognitionError for another embedder's: its cosines would say nothing."""
    found = load_plain(path)
    if not isinstance(found, dict) or found.get("format") != _GALLERY:
        raise RecognitionError(f"{path} is no gallery that `enroll` wrote")
    gallery = Gallery(*(found[name] for name in Gallery._fields))
    if gallery.embedder != fingerprint(embedder):
        raise RecognitionError(f"{path} is of another embedder; enroll again")
    return gallery


def identify(
    faces: Faces,
    gallery: Gallery,
    probes: Sequence[Path],
    top: int = 5,
    unknown: float = -math.inf,
    on_bad: str = "skip",
    progress: bool = True,
) -> list[dict[str, Any]]:
    """For each probe its best people, best first: rank, name and cosine. Whom the best cosine is below ``unknown`` is
    nobody of the gallery: one line says so."""
    embeddings, kept = faces.embed(probes, on_bad, progress)
    if not kept:
        raise RecognitionError("no face in any of the probes")
    cosines, places = evaluation.top_k(embeddings, gallery.embeddings, min(top, len(gallery.names)))
    rows: list[dict[str, Any]] = []
    for path, scores, found in zip(kept, cosines.tolist(), places.tolist()):
        if scores[0] < unknown:
            rows.append({"probe": str(path), "rank": 1, "name": UNKNOWN, "cosine": scores[0]})
            continue
        for rank, (score, place) in enumerate(zip(scores, found), 1):
            rows.append({"probe": str(path), "rank": rank, "name": gallery.names[place], "cosine": score})
    return rows


# ---- commands ------------------------------------------------------------------------------------------------------


def add_commands(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    """``verify``, ``enroll`` and ``identify`` to the recipe's."""
    pair = commands.add_parser(
        "verify", help="are two photographs of one person? exit status 0: yes, 1: no, 2: an error"
    )
    pair.add_argument("first", type=Path)
    pair.add_argument("second", type=Path)
    gallery = commands.add_parser("enroll", help="a folder of people to a gallery")
    gallery.add_argument("gallery", type=Path, help="a folder with a subfolder of photographs for each person")
    gallery.add_argument("out", type=Path, help="the gallery's file, .pt")
    who = commands.add_parser("identify", help="who of a gallery is on a photograph?")
    who.add_argument("gallery", type=Path, help="what enroll wrote, or a folder of people")
    who.add_argument("probe", type=Path, nargs="+", help="photographs, or folders of them")
    who.add_argument("--top", type=int, default=5, help="of the most similar people (%(default)s)")
    who.add_argument(
        "--unknown",
        nargs="?",
        type=float,
        const=math.nan,
        default=-math.inf,
        metavar="COSINE",
        help="below this cosine a probe is nobody's (without a number: the embedder's threshold)",
    )
    who.add_argument("--format", choices=["csv", "json"], default="csv")
    who.add_argument("--out", type=Path, help="a file (default: standard output)")
    for each in (pair, gallery, who):
        each.add_argument("--embedder", type=Path, required=True)
        each.add_argument("--aligned", action="store_true", help="the photographs are aligned faces already")
        each.add_argument("--min-face", type=float, default=20, help="the smallest face in pixels (%(default)s)")
        each.add_argument("--min-score", type=float, default=0.9, help="of the detector (%(default)s)")
        each.add_argument("--device", default="cpu")
    for each in (pair, who):
        each.add_argument("--far", type=float, help="take the embedder's threshold for this false accept rate")
    pair.add_argument("--threshold", type=float, help="a cosine, in place of the embedder's")
    for each in (gallery, who):
        each.add_argument("--on-bad", choices=["skip", "fail"], default="skip", help="photographs without a face")
    pair.set_defaults(run=_run_verify)
    gallery.set_defaults(run=_run_enroll)
    who.set_defaults(run=_run_identify)


def _faces(options: argparse.Namespace) -> Faces:
    embedder = load_embedder(options.embedder, options.device)
    return Faces(embedder, aligned=options.aligned, min_face=options.min_face, min_score=options.min_score)


def _run_verify(options: argparse.Namespace) -> int:
    faces = _faces(options)
    threshold = faces.embedder.threshold(options.far) if options.threshold is None else options.threshold
    found = verify(faces, options.first, options.second, threshold)
    word = "one person" if found.same else "two persons"
    print(f"cosine {found.cosine:.4f}, threshold {found.threshold:.4f}: {word}")
    return 0 if found.same else 1


def _run_enroll(options: argparse.Namespace) -> int:
    gallery = enroll(_faces(options), options.gallery, options.on_bad)
    save_gallery(gallery, options.out)
    print(f"{options.out}: {len(gallery.names):,} people by {sum(gallery.images):,} photographs")
    return 0


def _run_identify(options: argparse.Namespace) -> int:
    if options.top < 1:
        raise RecognitionError(f"expected --top of at least 1, but got {options.top}")
    faces = _faces(options)
    unknown = faces.embedder.threshold(options.far) if math.isnan(options.unknown) else options.unknown
    if options.gallery.is_dir():
        gallery = enroll(faces, options.gallery, options.on_bad)
    else:
        gallery = load_gallery(options.gallery, faces.embedder)
    probes = [path for each in options.probe for path in (images_in(each) if each.is_dir() else [each])]
    rows = identify(faces, gallery, probes, options.top, unknown, options.on_bad)
    file = sys.stdout if options.out is None else options.out.open("w", newline="", encoding="utf-8")
    try:
        if options.format == "json":
            json.dump(rows, file, indent=2)
            file.write("\n")
        else:
            table = csv.DictWriter(file, ["probe", "rank", "name", "cosine"])
            table.writeheader()
            table.writerows([{**row, "cosine": f"{row['cosine']:.6f}"} for row in rows])
    finally:
        if file is not sys.stdout:
            file.close()
    return 0
