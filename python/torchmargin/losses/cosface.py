"""The additive cosine margin."""

from __future__ import annotations

import math

from torch import Tensor
from typing_extensions import Unpack

from torchmargin.losses.base import CommonOptions, MarginLoss
from torchmargin.losses.numbers import Alias, Number
from torchmargin.options import Extension, MarginGradient

__all__ = ["CosFaceLoss"]


def _check_cosines(name: str, value: float) -> None:
    if not abs(value) <= math.pi:
        raise ValueError(
            f"expected {name} to be a difference of cosines (angles here are in radians, not degrees): at most "
            f"pi in size, but got {value}"
        )


class CosFaceLoss(MarginLoss):
    """CosFace, or LMCL: Wang et al., CVPR 2018 (arXiv:1801.09414).

    target logit = scale (cos(theta) - margin), other logits = scale cos(theta_j), for embeddings
    [B, in_features] and labels [B]. ``margin`` is a difference of cosines, one number or a tensor [C] with
    one for each class, and may be set at any time. ``extension`` changes nothing here, where no angle is added
    to theta.
    """

    margin = Number(_check_cosines, of_classes=True)
    m3 = Alias("margin")
    _unsaved = MarginLoss._unsaved | {"m1", "m2"}

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 64.0,
        margin: float | Tensor = 0.35,
        extension: Extension = "none",
        margin_gradient: MarginGradient = "exact",
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            scale=scale,
            m3=margin,
            extension=extension,
            margin_gradient=margin_gradient,
            **common,
        )
