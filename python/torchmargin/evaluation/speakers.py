"""Speaker verification: the detection cost of NIST's evaluations, scores normalised by a cohort, enrolment lists."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchmargin.evaluation.checks import check_count, check_embeddings, check_places, is_number, unit
from torchmargin.evaluation.identification import top_k_of_units
from torchmargin.evaluation.pairs import lines_of, pair_scores
from torchmargin.evaluation.verification import check_scores, roc_curve_of

__all__ = ["MinDcf", "act_dcf", "as_norm", "min_dcf", "read_enrolment"]


class MinDcf(NamedTuple):
    cost: float  # normalised: 1 is what accepting all or none costs, whichever is less
    threshold: float  # scores of at least this are accepted; inf: none


def min_dcf(
    scores: Tensor | np.ndarray,
    same: Tensor | np.ndarray,
    *,
    p_target: float = 0.01,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
) -> MinDcf:
    """The minimum of the normalised detection cost over all thresholds, for `scores` [P] and `same` [P] as in `verify`.

        (c_miss P_miss p_target + c_fa P_fa (1 - p_target)) / min(c_miss p_target, c_fa (1 - p_target))

    NIST's parameters (c_miss and c_fa 1 where not said): SRE 2008 p_target 0.01 and c_miss 10; SRE 2010 0.001; SRE
    2016, and telephone speech of 2018 and 2019, the mean of the costs at 0.01 and 0.005; video of 2018 (VAST) 0.05.
    VoxCeleb's papers have 0.01, VoxSRC 0.05. Equal scores are decided alike, and accepting all or none are among the
    thresholds: the cost is at most 1. Of equal costs the highest threshold counts.
    """
    of_miss, of_false = _weights(p_target, c_miss, c_fa)
    accepted_wrongly, accepted, thresholds = roc_curve_of(*check_scores(scores, same))
    costs = of_miss * (1 - accepted) + of_false * accepted_wrongly
    best = int(np.argmin(costs))
    return MinDcf(float(costs[best] / min(of_miss, of_false)), float(thresholds[best]))


def act_dcf(
    scores: Tensor | np.ndarray,
    same: Tensor | np.ndarray,
    *,
    threshold: float | None = None,
    p_target: float = 0.01,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
) -> float:
    """The actual detection cost, normalised as in :func:`min_dcf`: that of accepting scores of at least `threshold`.

    None is Bayes' threshold, log(c_fa (1 - p_target) / (c_miss p_target)), for scores that are natural logarithms of
    likelihood ratios, as NIST decides them. Cosines are none: give them what `min_dcf` found on other trials. The cost
    may be above 1.
    """
    of_miss, of_false = _weights(p_target, c_miss, c_fa)
    if threshold is None:
        threshold = math.log(of_false) - math.log(of_miss)
    elif not is_number(threshold) or math.isnan(threshold):
        raise ValueError(f"expected threshold to be a number, but got {threshold!r}")
    scores, same = check_scores(scores, same)
    accepted = scores >= float(threshold)
    cost = of_miss * (1 - accepted[same].mean()) + of_false * accepted[~same].mean()
    return float(cost / min(of_miss, of_false))


def _weights(p_target: float, c_miss: float, c_fa: float) -> tuple[float, float]:
    """What a detection cost multiplies the two rates by: c_miss p_target and c_fa (1 - p_target)."""
    if not is_number(p_target) or not 0 < p_target < 1:
        raise ValueError(f"expected p_target in (0, 1), but got {p_target!r}")
    for name, cost in (("c_miss", c_miss), ("c_fa", c_fa)):
        if not is_number(cost) or not 0 < cost <= sys.float_info.max:
            raise ValueError(f"expected {name} to be finite and positive, but got {cost!r}")
    of_miss, of_false = float(c_miss) * float(p_target), float(c_fa) * (1 - float(p_target))
    if min(of_miss, of_false) == 0:  # it underflows
        raise ValueError(
            f"expected c_miss * p_target and c_fa * (1 - p_target) above 0, but got {of_miss:g} and {of_false:g}"
        )
    return of_miss, of_false


@torch.no_grad()
def as_norm(
    embeddings: Tensor,
    first: Tensor,
    second: Tensor,
    cohort: Tensor,
    *,
    top: int | None = 300,
    block: int = 4096,
) -> Tensor:
    """The cosines [P] of pairs of rows of `embeddings` [N, D], normalised by a cohort [M, D] from both sides.

        ((s - mean_first) / std_first + (s - mean_second) / std_second) / 2

    AS-norm (Matejka et al., Interspeech 2017): mean and standard deviation of a side's ``top`` largest cosines with the
    cohort; None is S-norm, over all of it. The deviation is the population's, as wespeaker has it; SpeechBrain's
    recipe divides by one less. `first` and `second` [P] are indices as for :func:`pair_scores`. The cohort holds
    utterances of other speakers or, as wespeaker has it, the mean of each. At most ``block`` x ``block`` cosines are
    held at a time. float64 for float64 embeddings, else float32; the statistics are float64. A side whose cosines are
    all alike is a ValueError.
    """
    check_embeddings("embeddings", embeddings)
    check_embeddings("cohort", cohort)
    block = check_count("block", block)
    if cohort.shape[1] != embeddings.shape[1] or cohort.device != embeddings.device:
        raise ValueError(
            f"expected cohort to have {embeddings.shape[1]} features on {embeddings.device}, as embeddings, but got "
            f"{cohort.shape[1]} on {cohort.device}"
        )
    top = len(cohort) if top is None else check_count("top", top, len(cohort), "cohort")
    if top < 2:
        raise ValueError(f"expected at least 2 cohort embeddings for a standard deviation, but got {top}")
    scores, others = pair_scores(embeddings, first, second), unit("cohort", cohort)
    if not len(scores):
        return scores
    # NB: as int64; uint8 would select rows as a mask.
    ends = [check_places("first", first, len(embeddings)), check_places("second", second, len(embeddings))]
    sides, places = torch.cat([end.to(embeddings.device) for end in ends]).unique(return_inverse=True)
    rows = unit("embeddings", embeddings[sides])
    dtype = torch.promote_types(rows.dtype, others.dtype)
    rows, others = rows.to(dtype), others.to(dtype)
    means, deviations = [], []
    for part in rows.split(block):
        if top == len(others):
            mean, deviation = _all_statistics(part, others, block)
        else:
            nearest = top_k_of_units(part, others, top, block)[0].double()
            mean, deviation = nearest.mean(1), nearest.std(1, correction=0)
        means.append(mean)
        deviations.append(deviation)
    mean, deviation = torch.cat(means), torch.cat(deviations)
    flat = deviation <= 8 * torch.finfo(dtype).eps  # a cosine's own rounding
    if flat.any():
        row = int(sides[flat.nonzero()[0]])
        raise ValueError(
            f"expected cohort cosines that differ, but those of row {row} of embeddings are all alike: there is "
            f"nothing to divide by"
        )
    wide, count = scores.double(), len(scores)
    of_first, of_second = places[:count], places[count:]
    both = (wide - mean[of_first]) / deviation[of_first] + (wide - mean[of_second]) / deviation[of_second]
    return (both / 2).to(scores.dtype)


def _all_statistics(rows: Tensor, cohort: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the cosines with all of the cohort: two passes over it, for the digits of small ones."""

    def total(shift: Tensor, power: int) -> Tensor:
        parts = [((rows @ some.T).double() - shift[:, None]).pow(power).sum(1) for some in cohort.split(block)]
        return torch.stack(parts).sum(0)

    mean = total(rows.new_zeros(len(rows), dtype=torch.float64), 1) / len(cohort)
    return mean, (total(mean, 2) / len(cohort)).sqrt()


def read_enrolment(path: str | Path) -> dict[str, list[str]]:
    """The files of each enrolled name: lines `name file ...`, as CN-Celeb's enroll.lst and enroll.map have them.

    A name may come again, and then has the files of all its lines, in order. Blanks separate, or tabs alone in a line
    that has tabs.
    """
    files: dict[str, list[str]] = {}
    for number, line, fields in lines_of(path):
        if len(fields) < 2:
            raise ValueError(f"{path}:{number}: expected 'name file ...', but got {line!r}")
        files.setdefault(fields[0], []).extend(fields[1:])
    return files
