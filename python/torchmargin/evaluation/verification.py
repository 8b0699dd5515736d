"""Verification: given scores of pairs, how well do they tell one class from two?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["KFoldAccuracy", "Roc", "Verification", "kfold_accuracy", "roc", "verify"]


class Roc(NamedTuple):
    """A pair is accepted if its score is at least the threshold. Falling thresholds, the first one is infinite."""

    false_accept_rate: np.ndarray  # share of the pairs of two classes that are accepted
    true_accept_rate: np.ndarray  # share of the pairs of one class that are accepted
    threshold: np.ndarray


class Verification(NamedTuple):
    auc: float  # area under the ROC curve
    eer: float  # equal error rate: false accepts = false refusals, between two thresholds by interpolation
    tar: dict[float, float]  # for each false accept rate, the largest true accept rate that does not exceed it
    pairs: int
    same_pairs: int


class KFoldAccuracy(NamedTuple):
    mean: float
    deviation: float  # of the folds, as LFW's tables give it beside the mean
    accuracy: list[float]  # of each fold, with the threshold that is best on the others
    threshold: list[float]


def _check(scores: Tensor | np.ndarray, same: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as vectors [P]: float64 scores, bool same."""
    scores = scores.detach().double().cpu().numpy() if isinstance(scores, Tensor) else np.asarray(scores, np.float64)
    same = same.detach().cpu().numpy() if isinstance(same, Tensor) else np.asarray(same)
    same = same.astype(bool)
    if scores.ndim != 1 or scores.shape != same.shape:
        raise ValueError(
            f"expected scores and same to be vectors of one length, but got shapes {list(scores.shape)} "
            f"and {list(same.shape)}"
        )
    if np.isnan(scores).any():
        raise ValueError(f"expected scores to be numbers, but {int(np.isnan(scores).sum())} of them are NaN")
    if same.all() or not same.any():
        raise ValueError(f"expected pairs of one class and of two, but all {len(same)} pairs are alike")
    return scores, same


def roc(scores: Tensor | np.ndarray, same: Tensor | np.ndarray) -> Roc:
    """The ROC curve of `scores` [P] (larger: more alike) for `same` [P], with every distinct score as a threshold."""
    from sklearn.metrics import roc_curve

    scores, same = _check(scores, same)
    return Roc(*roc_curve(same, scores, drop_intermediate=False))


def verify(
    scores: Tensor | np.ndarray, same: Tensor | np.ndarray, *, far: Sequence[float] = (1e-2, 1e-3, 1e-4)
) -> Verification:
    """AUC, equal error rate and true accept rates of `scores` [P] for `same` [P] bool.

    A false accept rate below 1 / (pairs of two classes) can only be had with no false accept at all.
    """
    from sklearn.metrics import auc

    for rate in far:
        if not 0 <= rate <= 1:
            raise ValueError(f"expected false accept rates in [0, 1], but got {rate}")
    curve = roc(scores, same)
    refused = 1 - curve.true_accept_rate
    # false accepts - false refusals rises along the curve, from -1 to 1.
    eer = np.interp(0.0, curve.false_accept_rate - refused, curve.false_accept_rate)
    allowed = {rate: curve.true_accept_rate[curve.false_accept_rate <= rate] for rate in far}
    return Verification(
        auc=float(auc(curve.false_accept_rate, curve.true_accept_rate)),
        eer=float(eer),
        tar={rate: float(rates.max()) for rate, rates in allowed.items()},
        pairs=len(same),
        same_pairs=int(torch.as_tensor(same).bool().sum()),
    )


def _best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    """The threshold with the most right decisions: halfway between two scores, the lowest such."""
    order = np.argsort(scores, kind="stable")
    ordered, positive = scores[order], same[order]
    # right[i]: the first i pairs are refused, the others accepted.
    right = np.concatenate(([0], np.cumsum(~positive))) + np.concatenate((np.cumsum(positive[::-1])[::-1], [0]))
    # Equal scores are decided alike.
    possible = np.concatenate(([True], ordered[1:] != ordered[:-1], [True]))
    best = int(np.argmax(np.where(possible, right, -1)))
    if best == 0:
        return float(ordered[0])
    if best == len(ordered):
        return float(np.nextafter(ordered[-1], np.inf))
    middle = float((ordered[best - 1] + ordered[best]) / 2)
    return middle if middle > ordered[best - 1] else float(ordered[best])


def kfold_accuracy(scores: Tensor | np.ndarray, same: Tensor | np.ndarray, *, folds: int = 10) -> KFoldAccuracy:
    """Accuracy by LFW's protocol: each fold is decided with the threshold that is best on the other folds.

    The folds are consecutive pairs in the given order, as LFW's list has its ten sets of 300 + 300.
    """
    from sklearn.model_selection import KFold

    scores, same = _check(scores, same)
    if not 2 <= folds <= len(scores):
        raise ValueError(f"expected folds between 2 and the number of pairs, {len(scores)}, but got {folds}")
    accuracies, thresholds = [], []
    for others, fold in KFold(folds).split(scores):
        threshold = _best_threshold(scores[others], same[others])
        thresholds.append(threshold)
        accuracies.append(float(np.mean((scores[fold] >= threshold) == same[fold])))
    return KFoldAccuracy(float(np.mean(accuracies)), float(np.std(accuracies)), accuracies, thresholds)
