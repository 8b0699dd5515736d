"""Verification: do two images show the same class? By the cosine of their embeddings."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

__all__ = ["Verification", "verify_pairs"]


class Verification(NamedTuple):
    auc: float  # area under the ROC curve
    eer: float  # equal error rate: where as many pairs are wrongly accepted as refused
    tar: float  # true accept rate at a false accept rate of 1e-2
    pairs: int


def verify_pairs(embeddings: Tensor, labels: Tensor) -> Verification:
    """All pairs of the rows of `embeddings` [N, D]; `labels` [N] may be of classes never trained on."""
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    first, second = torch.triu_indices(len(labels), len(labels), offset=1)
    scores = (unit @ unit.T)[first, second].numpy()
    same = (labels[first] == labels[second]).numpy()
    false_accepts, true_accepts, _ = roc_curve(same, scores)
    crossing = np.argmin(np.abs(false_accepts - (1 - true_accepts)))
    return Verification(
        auc=float(roc_auc_score(same, scores)),
        eer=float((false_accepts[crossing] + 1 - true_accepts[crossing]) / 2),
        tar=float(np.interp(1e-2, false_accepts, true_accepts)),
        pairs=len(same),
    )
