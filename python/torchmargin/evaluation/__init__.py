"""How good are embeddings? Verification (are two images of one class?) and identification (of which class?).

Everything here takes embeddings [N, D] (any length, compared by their cosine) on the CPU or a GPU
and returns plain numbers. docs/evaluation.md shows the use with LFW's pair lists and with folders.
"""

from torchmargin.evaluation.gallery import Gallery
from torchmargin.evaluation.identification import Identification, identify, top_k
from torchmargin.evaluation.pairs import Pair, all_pairs, pair_scores, read_lfw_pairs, read_pairs
from torchmargin.evaluation.speakers import MinDcf, act_dcf, as_norm, min_dcf, read_enrolment
from torchmargin.evaluation.templates import pool_templates
from torchmargin.evaluation.verification import (
    KFoldAccuracy,
    Roc,
    Thresholds,
    Verification,
    kfold_accuracy,
    roc,
    tar_nearest,
    verify,
)

__all__ = [
    "Gallery",
    "Identification",
    "KFoldAccuracy",
    "MinDcf",
    "Pair",
    "Roc",
    "Thresholds",
    "Verification",
    "act_dcf",
    "all_pairs",
    "as_norm",
    "identify",
    "kfold_accuracy",
    "min_dcf",
    "pair_scores",
    "pool_templates",
    "read_enrolment",
    "read_lfw_pairs",
    "read_pairs",
    "roc",
    "tar_nearest",
    "top_k",
    "verify",
]
