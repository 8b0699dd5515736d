"""The field's evaluations of an embedder: ten folds of pairs, LFW's list, IJB-B and IJB-C."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from recipes.face.align import align_face
from recipes.face.alignment import AlignmentError
from recipes.face.detection import Face
from recipes.face.embedders import Embedder
from recipes.face.errors import RecipeError
from recipes.face.photos import BadImageError, decode, read_photo
from recipes.face.verification_sets import read_verification_set
from torchmargin import evaluation
from torchmargin.evaluation import Thresholds, Verification

FAR = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


class ProtocolError(RecipeError):
    """Files of a protocol that are not as it has them."""


class Pairs(NamedTuple):
    """A verification's cosines [P] and which pairs are of one person."""

    scores: Tensor
    same: Tensor


def two_by_two(embeddings: Tensor, same: list[bool]) -> Pairs:
    """Of embeddings [2 P, D] of which two that follow each other are a pair."""
    first = torch.arange(0, len(embeddings), 2)
    return Pairs(evaluation.pair_scores(embeddings, first, first + 1), torch.tensor(same))


def thresholds_of(several: Iterable[Pairs]) -> dict[str, float]:
    """The lowest cosine to accept at each false accept rate, of the pairs of all sets together."""
    scores, same = (torch.cat(parts) for parts in zip(*several))
    return _thresholds(evaluation.verify(scores, same, far=_rates(same)))


def _thresholds(measured: Verification) -> dict[str, float]:
    return {f"{rate:g}": value for rate, value in measured.threshold.items() if math.isfinite(value)}


def _rates(same: Tensor) -> list[float]:
    return rates_of(int((~same).sum()))


def rates_of(pairs: int) -> list[float]:
    """The false accept rates that so many pairs of two persons can show: at least one of them is accepted."""
    return [rate for rate in FAR if rate * pairs >= 1 - 1e-9]


def report(pairs: Pairs, thresholds: Thresholds = "exact") -> dict[str, Any]:
    """What a report says of pairs, in their order."""
    result: dict[str, Any] = {}
    folds = min(10, len(pairs.scores))
    if folds == 10:
        found = evaluation.kfold_accuracy(pairs.scores, pairs.same, folds=10, thresholds=thresholds)
        result["accuracy"] = found.mean
        result["accuracy_deviation"] = found.deviation
        result["thresholds"] = thresholds
    measured = evaluation.verify(pairs.scores, pairs.same, far=_rates(pairs.same))
    result["pairs"], result["same_pairs"] = measured.pairs, measured.same_pairs
    result["auc"], result["eer"] = measured.auc, measured.eer
    result["tar_at_far"] = {f"{rate:g}": value for rate, value in measured.tar.items()}
    result["threshold_at_far"] = _thresholds(measured)
    return result


# ---- verification sets ---------------------------------------------------------------------------------------------


def embed_set(embedder: Embedder, images: list[bytes], what: str, flip: bool | None, progress: bool) -> Tensor:
    """Of a set's images in their order: an image that is there several times is embedded once."""
    first: dict[bytes, int] = {}  # where each image stands first
    for place, data in enumerate(images):
        first.setdefault(data, place)

    def decoded() -> Iterator[Image.Image]:
        for data, place in tqdm(first.items(), desc=what, unit="image", leave=False, disable=not progress):
            try:
                yield decode(data).convert("RGB")
            except BadImageError as error:
                raise ProtocolError(f"{what}, image {place}: {error}") from None

    found = embedder.embed(decoded(), flip=flip)
    rows = {data: row for row, data in enumerate(first)}
    return found[torch.tensor([rows[data] for data in images], dtype=torch.int64)]


def bin_pairs(embedder: Embedder, path: Path, *, flip: bool | None = None, progress: bool = True) -> Pairs:
    """Of a ``.bin``: image + mirror image, then unit length."""
    images, same = read_verification_set(path)
    embeddings = embed_set(embedder, images, path.name, flip, progress)
    return two_by_two(embeddings, same)


def lfw_pairs(embedder: Embedder, root: Path, pairs: Path, *, flip: bool | None = None, progress: bool = True) -> Pairs:
    """LFW's list, of images aligned beforehand under ``root``; those of other endings than .jpg too."""
    listed = evaluation.read_lfw_pairs(pairs)
    if not listed:
        raise ProtocolError(f"{pairs} has no pairs")
    places: dict[str, int] = {}
    for pair in listed:
        for name in (pair.first, pair.second):
            places.setdefault(name, len(places))
    paths = []
    for name in places:
        path = root / name
        found = next((each for each in (path, path.with_suffix(".png")) if each.is_file()), None)
        if found is None:
            raise ProtocolError(f"{pairs} names {name}, which is not in {root}")
        paths.append(found)
    shown = tqdm(paths, desc="lfw", unit="image", leave=False, disable=not progress)
    embeddings = embedder.embed((read_photo(path) for path in shown), flip=flip)
    first = torch.tensor([places[pair.first] for pair in listed])
    second = torch.tensor([places[pair.second] for pair in listed])
    return Pairs(evaluation.pair_scores(embeddings, first, second), torch.tensor([pair.same for pair in listed]))


# ---- IJB -----------------------------------------------------------------------------------------------------------


class IjbFiles(NamedTuple):
    """What the three lists of meta/ say: rows of the images, and of the pairs of templates."""

    names: list[str]
    templates: Tensor  # [N]
    media: Tensor  # [N]
    first: Tensor  # [P], numbers of templates
    second: Tensor
    same: Tensor  # [P] bool
    landmarks: list[tuple[tuple[float, float], ...]]
    scores: Tensor  # [N], the detector's


def _table(path: Path, columns: int) -> list[list[str]]:
    if not path.is_file():
        raise ProtocolError(f"{path} is no file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != columns:
            raise ProtocolError(f"{path}, line {number}: expected {columns} fields, but got {len(fields)}")
        rows.append(fields)
    if not rows:
        raise ProtocolError(f"{path} has no lines")
    return rows


def _numbers(rows: list[list[str]], path: Path, first: int, kind: type) -> np.ndarray:
    try:
        return np.array([[kind(value) for value in row[first:]] for row in rows])
    except ValueError as error:
        raise ProtocolError(f"{path}: {error}") from None


def read_ijb(root: Path, which: str) -> IjbFiles:
    """``which``: "B" or "C". Landmarks and lists of images have one order, and a line for each image."""
    prefix = {"B": "ijbb", "C": "ijbc"}[which]
    meta = root / "meta"
    members_file, pairs_file, points_file = (
        meta / f"{prefix}_{name}.txt" for name in ("face_tid_mid", "template_pair_label", "name_5pts_score")
    )
    members, points = _table(members_file, 3), _table(points_file, 12)
    if len(members) != len(points):
        raise ProtocolError(f"{members_file} has {len(members):,} lines, but {points_file} {len(points):,}")
    for number, (member, point) in enumerate(zip(members, points), 1):
        if member[0] != point[0]:
            raise ProtocolError(f"line {number} is of {member[0]} in {members_file}, of {point[0]} in {points_file}")
    of_image = torch.from_numpy(_numbers(members, members_file, 1, int))
    of_pair = torch.from_numpy(_numbers(_table(pairs_file, 3), pairs_file, 0, int))
    numbers = _numbers(points, points_file, 1, float)
    known = of_image[:, 0].unique()
    stranger = of_pair[:, :2][~torch.isin(of_pair[:, :2], known)]
    if len(stranger):
        raise ProtocolError(f"{pairs_file} names template {int(stranger[0])}, which {members_file} has not")
    return IjbFiles(
        [member[0] for member in members],
        of_image[:, 0].contiguous(),
        of_image[:, 1].contiguous(),
        of_pair[:, 0].contiguous(),
        of_pair[:, 1].contiguous(),
        of_pair[:, 2] == 1,
        [tuple((row[2 * k], row[2 * k + 1]) for k in range(5)) for row in numbers.tolist()],
        torch.from_numpy(numbers[:, 10].copy()),
    )


def ijb_pairs(embedder: Embedder, root: Path, which: str, *, flip: bool | None = None, progress: bool = True) -> Pairs:
    """Image + mirror image as long as they are, times the detector's score; pooled by media into templates."""
    files = read_ijb(root, which)
    shown = tqdm(files.names, desc=f"IJB-{which}", unit="image", leave=False, disable=not progress)

    def faces() -> Iterator[Image.Image]:
        for name, points in zip(shown, files.landmarks):
            photo = read_photo(root / "loose_crop" / name)
            try:
                yield align_face(photo, Face((0, 0, 0, 0), 1.0, points), embedder.network.size, embedder.template)[0]
            except AlignmentError as error:
                raise ProtocolError(f"{root / 'loose_crop' / name}: {error}") from None

    embeddings = embedder.embed(faces(), flip=flip)
    pooled, numbers = evaluation.pool_templates(embeddings, files.templates, files.media, weights=files.scores.float())
    first, second = (torch.searchsorted(numbers, side) for side in (files.first, files.second))
    return Pairs(evaluation.pair_scores(pooled, first, second), files.same)


def ijb_report(pairs: Pairs) -> dict[str, Any]:
    """With the field's tables beside ours: at the nearest rate, which may be larger, and at the largest that is not."""
    found = report(pairs)
    for name in ("accuracy", "accuracy_deviation", "thresholds"):
        found.pop(name, None)  # the order of templates says nothing
    nearest = evaluation.tar_nearest(pairs.scores, pairs.same, far=sorted(FAR))
    found["tar_at_nearest_far"] = {f"{rate:g}": value for rate, value in nearest.items()}
    return found


# ---- pictures ------------------------------------------------------------------------------------------------------


def png_of(draw: Callable[[Any], None], size: tuple[float, float]) -> bytes:
    """A figure, in inches of 100 pixels, that ``draw`` is given."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()


def roc_picture(curves: dict[str, Pairs]) -> bytes:
    """PNG: true accept rate over false accept rate, on a logarithmic axis."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        lowest = 1.0
        for name, pairs in curves.items():
            curve = evaluation.roc(pairs.scores, pairs.same)
            least = 1 / max(1, int((~pairs.same).sum()))
            lowest = min(lowest, least)
            axes.plot(np.maximum(curve.false_accept_rate, least / 2), curve.true_accept_rate, label=name)
        axes.set(xscale="log", xlim=(lowest / 2, 1), ylim=(0, 1.01))
        axes.set(xlabel="false accept rate", ylabel="true accept rate")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")

    return png_of(draw, (6, 4.5))
