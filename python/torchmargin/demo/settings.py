"""The demo's losses with the parameters that fit the dimension of the embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from torchmargin import (
    ArcFaceLoss,
    CombinedMarginLoss,
    CosFaceLoss,
    CurricularFaceLoss,
    InterTopKArcFaceLoss,
    LargeMarginSoftmaxLoss,
    MarginLoss,
    ModifiedSoftmaxLoss,
    MVSoftmaxLoss,
    NormalizedSoftmaxLoss,
    SoftmaxLoss,
    SphereFace2Loss,
    SphereFaceLoss,
    SubCenterArcFaceLoss,
    UniFaceLoss,
)

__all__ = ["DEFAULT_LOSSES", "LOSSES", "TITLES", "annealed_sphereface"]

SCALE = 16.0
# On a circle ten classes are 36 degrees apart: a margin of cosines above 0.19 cannot be kept.
# A sphere has more room, 64 dimensions have plenty.
COSINE_MARGIN = {2: 0.1, 3: 0.15}
ANGLE_MARGIN = {2: 0.1, 3: 0.2}
COMBINED_MARGIN = {2: (0.05, 0.05), 3: (0.1, 0.08)}
# SphereFace's lambda falls from 1000 to this during the first half of the training.
LAMBDA_BASE, LAMBDA_MIN = 1000.0, 2.0


class _Annealing(TypedDict):
    lambda_base: float
    lambda_gamma: float
    lambda_min: float


def _annealing(steps: int) -> _Annealing:
    return {
        "lambda_base": LAMBDA_BASE,
        "lambda_gamma": round((LAMBDA_BASE / LAMBDA_MIN - 1) / max(steps // 2, 1), 3),
        "lambda_min": LAMBDA_MIN,
    }


def annealed_sphereface(features: int, classes: int, steps: int, margin: float = 4.0) -> MarginLoss:
    """A-Softmax with its margin annealed over half of `steps` training steps."""
    return SphereFaceLoss(features, classes, margin=margin, **_annealing(steps))


def _sub_center(features: int, classes: int, steps: int) -> MarginLoss:
    margin = ANGLE_MARGIN.get(features, 0.3)
    return SubCenterArcFaceLoss(features, classes, scale=SCALE, margin=margin, sub_centers=2)


def _inter_top_k(features: int, classes: int, steps: int) -> MarginLoss:
    margin = ANGLE_MARGIN.get(features, 0.3)
    return InterTopKArcFaceLoss(features, classes, scale=SCALE, margin=margin, sub_centers=1, hardest=2)


def _combined(features: int, classes: int, steps: int) -> MarginLoss:
    m2, m3 = COMBINED_MARGIN.get(features, (0.15, 0.1))
    return CombinedMarginLoss(features, classes, scale=SCALE, m1=1.0, m2=m2, m3=m3)


# name -> the loss for (features, classes, training steps)
LOSSES: dict[str, Callable[[int, int, int], MarginLoss]] = {
    "softmax": lambda d, c, _: SoftmaxLoss(d, c),
    "modified-softmax": lambda d, c, _: ModifiedSoftmaxLoss(d, c),
    "normalized-softmax": lambda d, c, _: NormalizedSoftmaxLoss(d, c, scale=SCALE),
    "sphereface": annealed_sphereface,
    "cosface": lambda d, c, _: CosFaceLoss(d, c, scale=SCALE, margin=COSINE_MARGIN.get(d, 0.2)),
    "arcface": lambda d, c, _: ArcFaceLoss(d, c, scale=SCALE, margin=ANGLE_MARGIN.get(d, 0.3)),
    "combined": _combined,
    "l-softmax": lambda d, c, steps: LargeMarginSoftmaxLoss(d, c, margin=2.0, **_annealing(steps)),
    "sphereface-r": lambda d, c, _: SphereFaceLoss.normalized(d, c, scale=SCALE, margin=1.5 if d > 3 else 1.2),
    "sub-center": _sub_center,
    "curricularface": lambda d, c, _: CurricularFaceLoss(d, c, scale=SCALE, margin=ANGLE_MARGIN.get(d, 0.3)),
    "mv-softmax": lambda d, c, _: MVSoftmaxLoss(d, c, scale=SCALE, margin=COSINE_MARGIN.get(d, 0.2)),
    "inter-top-k": _inter_top_k,
    "sphereface2": lambda d, c, _: SphereFace2Loss(d, c, margin=COSINE_MARGIN.get(d, 0.2)),
    "uniface": lambda d, c, _: UniFaceLoss(d, c, scale=SCALE, margin=COSINE_MARGIN.get(d, 0.2)),
}
TITLES = {
    "softmax": "softmax",
    "modified-softmax": "modified softmax",
    "normalized-softmax": "normalised softmax",
    "sphereface": "SphereFace (A-Softmax)",
    "cosface": "CosFace",
    "arcface": "ArcFace",
    "combined": "combined margin",
    "l-softmax": "L-Softmax",
    "sphereface-r": "SphereFace-R",
    "sub-center": "sub-center ArcFace",
    "curricularface": "CurricularFace",
    "mv-softmax": "MV-Softmax",
    "inter-top-k": "ArcFace, inter-top-k",
    "sphereface2": "SphereFace2",
    "uniface": "UniFace",
}
DEFAULT_LOSSES = (
    "softmax modified-softmax normalized-softmax sphereface cosface arcface combined sub-center curricularface "
    "inter-top-k sphereface2"
).split()
