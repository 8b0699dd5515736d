"""Verification: given scores of pairs, how well do they tell one class from two?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from torchmargin.evaluation.checks import check_count, check_rates

__all__ = ["KFoldAccuracy", "Roc", "Thresholds", "Verification", "kfold_accuracy", "roc", "tar_nearest", "verify"]

Thresholds = Literal["exact", "insightface"]  # those that kfold_accuracy chooses from


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
    threshold: dict[float, float]  # for each false accept rate, the lowest score that may be accepted; inf: none may


class KFoldAccuracy(NamedTuple):
    mean: float
    deviation: float  # of the folds, as LFW's tables give it beside the mean
    accuracy: list[float]  # of each fold, with the threshold that is best on the others
    threshold: list[float]


def _numbers(name: str, values: Tensor | np.ndarray) -> np.ndarray:
    values = values.detach().cpu() if isinstance(values, Tensor) else np.asarray(values)
    kind = "c" if isinstance(values, Tensor) and values.is_complex() else getattr(values.dtype, "kind", "f")
    if kind not in "biuf" or values.ndim != 1:
        raise ValueError(
            f"expected {name} to be a vector of numbers, but got {values.dtype} of shape {list(values.shape)}"
        )
    numbers: np.ndarray = values.double().numpy() if isinstance(values, Tensor) else values.astype(np.float64)
    return numbers


def check_scores(scores: Tensor | np.ndarray, same: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as vectors [P]: float64 scores, bool same."""
    scores, labels = _numbers("scores", scores), _numbers("same", same)
    if len(scores) != len(labels):
        raise ValueError(f"expected scores and same to have one length, but got {len(scores)} and {len(labels)}")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise ValueError(
            f"expected scores to be finite, but {len(bad)} of {len(scores)} are NaN or infinite; the first is "
            f"scores[{bad[0]}] = {scores[bad[0]]}"
        )
    bad = np.flatnonzero(~np.isin(labels, (-1, 0, 1)))
    if len(bad):
        raise ValueError(
            f"expected same to hold booleans, 0 and 1, or -1 and 1, but {len(bad)} of {len(labels)} are something "
            f"else; the first is same[{bad[0]}] = {labels[bad[0]]:g}"
        )
    if {-1, 0} <= set(labels):
        raise ValueError("expected same to hold either 0 or -1 for pairs of two classes, but got both")
    agree: np.ndarray = labels == 1
    if agree.all() or not agree.any():
        raise ValueError(f"expected pairs of one class and of two, but all {len(agree)} pairs are alike")
    return scores, agree


def roc(scores: Tensor | np.ndarray, same: Tensor | np.ndarray) -> Roc:
    """The ROC curve of `scores` [P] (larger: more alike) for `same` [P], with every distinct score as a threshold.

    `same` is bool, or 1 for one class and 0, or else -1, for two: so everywhere here.
    """
    return roc_curve_of(*check_scores(scores, same))


def roc_curve_of(scores: np.ndarray, same: np.ndarray) -> Roc:
    from sklearn.metrics import roc_curve

    return Roc(*roc_curve(same, scores, drop_intermediate=False))


def verify(
    scores: Tensor | np.ndarray, same: Tensor | np.ndarray, *, far: Sequence[float] = (1e-2, 1e-3, 1e-4)
) -> Verification:
    """AUC, equal error rate and true accept rates of `scores` [P] for `same` [P], as :func:`roc` takes them.

    A false accept rate below 1 / (pairs of two classes) can only be had with no false accept at all.
    """
    from sklearn.metrics import auc

    rates = check_rates("far", far)
    scores, same = check_scores(scores, same)
    curve = roc_curve_of(scores, same)
    refused = 1 - curve.true_accept_rate
    # false accepts - false refusals rises along the curve, from -1 to 1.
    eer = np.interp(0.0, curve.false_accept_rate - refused, curve.false_accept_rate)
    # Both rates rise along the curve, so the last allowed place is the best one.
    last = {rate: int(np.flatnonzero(curve.false_accept_rate <= rate)[-1]) for rate in rates}
    return Verification(
        auc=float(auc(curve.false_accept_rate, curve.true_accept_rate)),
        eer=float(eer),
        tar={rate: float(curve.true_accept_rate[place]) for rate, place in last.items()},
        pairs=len(same),
        same_pairs=int(same.sum()),
        threshold={rate: float(curve.threshold[place]) for rate, place in last.items()},
    )


def tar_nearest(
    scores: Tensor | np.ndarray,
    same: Tensor | np.ndarray,
    *,
    far: Sequence[float] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
) -> dict[float, float]:
    """The true accept rate at that place of the ROC curve whose false accept rate is nearest to each of ``far``.

    As InsightFace's IJB tables have it: the false accept rate may lie above the one asked for, so these are no
    promise; :func:`verify` has the largest true accept rate that keeps it. Of equally near places the one with the
    lowest threshold counts, and of runs where one rate alone changes only the ends.
    """
    from sklearn.metrics import roc_curve

    rates = check_rates("far", far)
    scores, same = check_scores(scores, same)
    accepted_wrongly, accepted, _ = roc_curve(same, scores)
    backwards, found = accepted_wrongly[::-1], accepted[::-1]
    return {rate: float(found[np.argmin(np.abs(backwards - rate))]) for rate in rates}


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


_SQUARED_DISTANCES = np.arange(0, 4, 0.01)  # of unit vectors, as InsightFace tries them


def _best_of_grid(distances: np.ndarray, same: np.ndarray) -> float:
    """The first of the squared distances below which most pairs are rightly accepted."""
    order = np.sort(distances[same]), np.sort(distances[~same])
    accepted, wrongly = (np.searchsorted(of, _SQUARED_DISTANCES, side="left") for of in order)
    return float(_SQUARED_DISTANCES[np.argmax(accepted - wrongly)])


def kfold_accuracy(
    scores: Tensor | np.ndarray, same: Tensor | np.ndarray, *, folds: int = 10, thresholds: Thresholds = "exact"
) -> KFoldAccuracy:
    """Accuracy by LFW's protocol: each fold is decided with the threshold that is best on the other folds.

    The folds are consecutive pairs in the given order, as LFW's list has its ten sets of 300 + 300. ``thresholds``:
    "exact" finds the best of all; "insightface" takes the first best of the squared distances 0, 0.01, ... 3.99 and
    accepts what lies below, so that numbers compare with those of the face literature (the two differ by some 0.0005).
    Scores are cosines then.
    """
    from sklearn.model_selection import KFold

    if thresholds not in ("exact", "insightface"):
        raise ValueError(f'expected thresholds to be "exact" or "insightface", but got {thresholds!r}')
    scores, same = check_scores(scores, same)
    folds = check_count("folds", folds, len(scores), "list of pairs", smallest=2)
    on_grid = thresholds == "insightface"
    if on_grid and np.abs(scores).max() > 1 + 1e-5:
        raise ValueError(
            f'expected scores to be cosines for thresholds="insightface", but got {scores[np.abs(scores).argmax()]:g}'
        )
    distances = 2 - 2 * scores
    accuracies, found = [], []
    for others, fold in KFold(folds).split(scores):
        if on_grid:
            largest = _best_of_grid(distances[others], same[others])
            threshold, accept = 1 - largest / 2, distances[fold] < largest  # NB: refused at the threshold itself
        else:
            threshold = _best_threshold(scores[others], same[others])
            accept = scores[fold] >= threshold
        found.append(threshold)
        accuracies.append(float(np.mean(accept == same[fold])))
    return KFoldAccuracy(float(np.mean(accuracies)), float(np.std(accuracies)), accuracies, found)
