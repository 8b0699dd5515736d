"""The additive angular margin."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from torchmargin.losses.base import CommonOptions, MarginLoss
from torchmargin.losses.numbers import Alias, Number, check_radians
from torchmargin.options import Extension, MarginGradient

__all__ = ["ArcFaceLoss"]


class ArcFaceLoss(MarginLoss):
    """ArcFace: Deng et al., CVPR 2019 (arXiv:1801.07698).

    target logit = scale cos(theta + margin), other logits = scale cos(theta_j), for embeddings
    [B, in_features] and labels [B]. ``margin`` is in radians, one number or a tensor [C] with one for each
    class, and may be set at any time. Past theta + margin = pi the
    paper's code goes on with cos(theta) - margin sin(margin) (``extension="linear"``);
    InsightFace since 2022-12 is ``extension="none", margin_gradient="straight_through"``.
    """

    margin = Number(check_radians, of_classes=True)
    m2 = Alias("margin")
    _unsaved = MarginLoss._unsaved | {"m1", "m3"}

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 64.0,
        margin: float | Tensor = 0.5,
        extension: Extension = "linear",
        margin_gradient: MarginGradient = "exact",
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            scale=scale,
            m2=margin,
            extension=extension,
            margin_gradient=margin_gradient,
            **common,
        )
