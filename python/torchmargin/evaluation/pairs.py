"""Pairs of images: the lists that face sets come with, and the cosines of pairs of embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Pair", "all_pairs", "check_embeddings", "pair_scores", "read_lfw_pairs", "read_pairs"]


class Pair(NamedTuple):
    """One line of a pair list."""

    first: str  # path, relative to the folder of images
    second: str
    same: bool  # one class?


def check_embeddings(name: str, embeddings: Tensor) -> None:
    if embeddings.dim() != 2 or not embeddings.is_floating_point():
        raise ValueError(
            f"expected {name} to be a floating-point tensor of shape [N, D], but got {embeddings.dtype} "
            f"of shape {list(embeddings.shape)}"
        )


def unit(embeddings: Tensor) -> Tensor:
    """Rows of unit length in float32 or better; a zero row stays zero."""
    wide = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    return torch.nn.functional.normalize(wide, dim=1)


def all_pairs(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every pair of different rows once: indices of the first and of the second, and whether their labels agree.

    N (N - 1) / 2 of each for labels [N]; meant for some thousand rows.
    """
    first, second = torch.triu_indices(len(labels), len(labels), offset=1, device=labels.device)
    return first, second, labels[first] == labels[second]


@torch.no_grad()
def pair_scores(embeddings: Tensor, first: Tensor, second: Tensor, *, block: int = 1 << 18) -> Tensor:
    """The cosine [P] of each pair of rows of `embeddings` [N, D]; `first` and `second` [P] are indices.

    float64 for float64 embeddings, else float32. `block` pairs are gathered at a time.
    """
    check_embeddings("embeddings", embeddings)
    if first.shape != second.shape or first.dim() != 1:
        raise ValueError(
            f"expected first and second to be index vectors of one length, but got shapes {list(first.shape)} "
            f"and {list(second.shape)}"
        )
    rows = unit(embeddings)
    parts = [(rows[a] * rows[b]).sum(1) for a, b in zip(first.split(block), second.split(block))]
    return torch.cat(parts) if parts else rows.new_empty(0)


def read_lfw_pairs(path: str | Path, *, suffix: str = ".jpg") -> list[Pair]:
    """LFW's pairs.txt: lines `name i j` (one person) and `name i other j`, after a line of counts.

    The paths are LFW's own, `name/name_0001.jpg`. The order is kept: :func:`kfold_accuracy` needs it.
    """

    def image(name: str, number: str) -> str:
        return f"{name}/{name}_{int(number):04d}{suffix}"

    pairs = []
    for number, fields in _lines(path):
        if number == 1 and len(fields) <= 2 and all(field.isdigit() for field in fields):
            continue
        try:
            if len(fields) == 3:
                name, i, j = fields
                pairs.append(Pair(image(name, i), image(name, j), True))
            elif len(fields) == 4:
                name, i, other, j = fields
                pairs.append(Pair(image(name, i), image(other, j), False))
            else:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{path}:{number}: expected 'name i j' or 'name i other j', but got {' '.join(fields)!r}"
            ) from None
    return pairs


def read_pairs(path: str | Path, *, label_first: bool = False) -> list[Pair]:
    """A list with a pair a line: `first second label`, or `label first second` as VoxCeleb has it.

    The label is 1 for one class, 0 for two; fields are separated by blanks.
    """
    pairs = []
    for number, fields in _lines(path):
        label = fields[0] if label_first else fields[-1]
        if len(fields) != 3 or label not in ("0", "1"):
            order = "label first second" if label_first else "first second label"
            raise ValueError(f"{path}:{number}: expected '{order}' with label 0 or 1, but got {' '.join(fields)!r}")
        first, second = fields[1:] if label_first else fields[:2]
        pairs.append(Pair(first, second, label == "1"))
    return pairs


def _lines(path: str | Path):
    """(line number, fields) of every line that is not empty."""
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            yield number, line.split()
