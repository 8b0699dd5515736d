"""The table: how well embeddings of each loss tell classes apart that were never trained on."""

from __future__ import annotations

from statistics import mean, pstdev
from typing import NamedTuple

import torch

from torchmargin.demo.data import Images, rotating_splits
from torchmargin.demo.settings import LOSSES, TITLES
from torchmargin.demo.train import Trainer, accuracy, embed
from torchmargin.evaluation import Verification, all_pairs, pair_scores, verify

__all__ = ["Comparison", "Row", "compare", "sentences", "text_table"]

FEATURES = 64
FAR = 1e-2
# All pairs of so many images: two million.
MOST_IMAGES = 2000


class Row(NamedTuple):
    """One loss; a list holds a number for each split."""

    name: str
    parameters: str
    accuracy: list[float]  # on held-out images of the classes trained on
    auc: list[float]
    eer: list[float]
    tar: list[float]


class Comparison(NamedTuple):
    rows: list[Row]
    trained: int  # classes in each split
    verified: int
    pairs: int  # of a split
    epochs: int
    seed: int


def _verify(network: torch.nn.Module, images: Images, seed: int) -> Verification:
    if len(images) > MOST_IMAGES:
        images, _ = images.split(MOST_IMAGES / len(images), seed)
    first, second, same = all_pairs(images.labels)
    return verify(pair_scores(embed(network, images), first, second), same, far=(FAR,))


def compare(
    images: Images, losses: list[str], trainer: Trainer, epochs: int, splits: int, fraction: float
) -> Comparison:
    rows = {name: Row(TITLES[name], "", [], [], [], []) for name in losses}
    chosen = rotating_splits(len(images.names), fraction, splits)
    for turn, (seen, unseen) in enumerate(chosen):
        training, held_out = images.of_classes(seen).split(0.9, trainer.seed)
        strangers = images.of_classes(unseen)
        for name in losses:
            title = f"table, split {turn + 1} of {splits}: {name}"
            network, loss = trainer.train(LOSSES[name], FEATURES, training, epochs, title)
            result = _verify(network, strangers, trainer.seed)
            row = rows[name]._replace(parameters=loss.describe_margin())
            row.accuracy.append(accuracy(loss, embed(network, held_out), held_out.labels))
            row.auc.append(result.auc)
            row.eer.append(result.eer)
            row.tar.append(result.tar[FAR])
            rows[name] = row
    return Comparison(list(rows.values()), len(seen), len(unseen), result.pairs, epochs, trainer.seed)


def cell(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {pstdev(values):.3f}"


HEADER = ["loss", "accuracy, held out", "AUC", "EER", f"TAR at FAR {FAR:g}"]


def cells(row: Row) -> list[str]:
    return [row.name, cell(row.accuracy), cell(row.auc), cell(row.eer), cell(row.tar)]


def text_table(comparison: Comparison) -> str:
    lines = [HEADER] + [cells(row) for row in comparison.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines)


def sentences(comparison: Comparison) -> list[str]:
    """What the table says, and what it does not."""
    rows = comparison.rows
    splits = len(rows[0].auc)
    said = [
        f"Mean ± standard deviation over {splits} rotating split{'s' if splits > 1 else ''}: trained on "
        f"{comparison.trained} classes for {comparison.epochs} epochs, verified on all {comparison.pairs:,} pairs of "
        f"images of the other {comparison.verified}, by the cosine of {FEATURES}-D embeddings; seed {comparison.seed}."
    ]
    best = max(rows, key=lambda row: mean(row.auc))
    # Every loss has the same splits: what counts is the difference within a split.
    apart = {row.name: [b - a for a, b in zip(row.auc, best.auc)] for row in rows if row is not best}
    close = [name for name, gaps in apart.items() if mean(gaps) <= pstdev(gaps)]
    clear = [name for name in apart if name not in close]
    if splits > 1 and close:
        said.append(
            f"{best.name} has the largest mean AUC, but its lead over {', '.join(close)} lies within one deviation of "
            "the differences between splits: on this data they cannot be told apart."
        )
    if splits > 1 and clear:
        said.append(f"Its lead over {', '.join(clear)} is larger than that.")
    return said
