"""Pairs of images: the lists that face sets come with, and the cosines of pairs of embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torchmargin.evaluation.checks import check_count, check_embeddings, check_labels, check_places, unit

__all__ = ["Pair", "all_pairs", "pair_scores", "read_lfw_pairs", "read_pairs"]


class Pair(NamedTuple):
    """One line of a pair list."""

    first: str  # path, relative to the folder of images
    second: str
    same: bool  # one class?


def all_pairs(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every pair of different rows once: indices of the first and of the second, and whether their labels agree.

    N (N - 1) / 2 of each for labels [N] of an integer dtype; meant for some thousand rows.
    """
    labels = check_labels("labels", labels)
    first, second = torch.triu_indices(len(labels), len(labels), offset=1, device=labels.device)
    return first, second, labels[first] == labels[second]


@torch.no_grad()
def pair_scores(embeddings: Tensor, first: Tensor, second: Tensor, *, block: int = 1 << 18) -> Tensor:
    """The cosine [P] of each pair of rows of `embeddings` [N, D]; `first` and `second` [P] are indices.

    float64 for float64 embeddings, else float32. `block` pairs are gathered at a time.
    """
    check_embeddings("embeddings", embeddings)
    block = check_count("block", block)
    rows = unit("embeddings", embeddings)
    first = check_places("first", first, len(rows)).to(rows.device)
    second = check_places("second", second, len(rows)).to(rows.device)
    if len(first) != len(second):
        raise ValueError(f"expected first and second to have one length, but got {len(first)} and {len(second)}")
    parts = [(rows[a] * rows[b]).sum(1) for a, b in zip(first.split(block), second.split(block))]
    return torch.cat(parts) if parts else rows.new_empty(0)


def read_lfw_pairs(path: str | Path, *, suffix: str = ".jpg") -> list[Pair]:
    """LFW's pairs.txt: lines `name i j` (one person) and `name i other j`, after a line of counts.

    The paths are LFW's own, `name/name_0001.jpg`. The order is kept: :func:`kfold_accuracy` needs it. A line with tabs
    is split at its tabs alone, so that names may have blanks.
    """

    def image(name: str, number: str) -> str:
        return f"{name}/{name}_{int(number):04d}{suffix}"

    pairs = []
    for number, line, fields in lines_of(path):
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
            raise ValueError(f"{path}:{number}: expected 'name i j' or 'name i other j', but got {line!r}") from None
    return pairs


# SITW's keys have tgt and imp, NIST's and Kaldi's lists target and nontarget.
_LABELS = {"1": True, "true": True, "target": True, "tgt": True}
_LABELS |= {"0": False, "false": False, "nontarget": False, "imp": False}


def read_pairs(path: str | Path, *, label_first: bool = False) -> list[Pair]:
    """A list with a pair a line: `first second label`, or `label first second` as VoxCeleb has it.

    The label is 1, true, target or tgt for one class, 0, false, nontarget or imp for two, in capitals or not. Fields
    are separated by blanks, or by tabs alone in a line that has tabs.
    """
    pairs = []
    for number, line, fields in lines_of(path):
        label = _LABELS.get((fields[0] if label_first else fields[-1]).lower())
        if len(fields) != 3 or label is None:
            order = "label first second" if label_first else "first second label"
            raise ValueError(
                f"{path}:{number}: expected '{order}' with one of the labels {', '.join(_LABELS)}, but got {line!r}"
            )
        first, second = fields[1:] if label_first else fields[:2]
        pairs.append(Pair(first, second, label))
    return pairs


def lines_of(path: str | Path) -> Iterator[tuple[int, str, list[str]]]:
    """(line number, line, fields) of every line that is not empty. Names may have blanks in a line with tabs."""
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        line = line.strip()
        fields = line.split("\t") if "\t" in line else line.split()
        if line:
            yield number, line, [field.strip() for field in fields if field.strip()]
