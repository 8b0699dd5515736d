"""All three margins together."""

from __future__ import annotations

from typing_extensions import Unpack

from torchmargin.losses.base import CommonOptions, MarginLoss
from torchmargin.options import Extension, MarginGradient

__all__ = ["CombinedMarginLoss"]


class CombinedMarginLoss(MarginLoss):
    """The combined margin of ArcFace: Deng et al., CVPR 2019 (arXiv:1801.07698), eq. 4.

    target logit = scale (cos(m1 theta + m2) - m3), other logits = scale cos(theta_j), for
    embeddings [B, in_features] and labels [B]. m2 is in radians.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 64.0,
        m1: float = 1.0,
        m2: float = 0.3,
        m3: float = 0.2,
        extension: Extension = "none",
        margin_gradient: MarginGradient = "exact",
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            scale=scale,
            m1=m1,
            m2=m2,
            m3=m3,
            extension=extension,
            margin_gradient=margin_gradient,
            **common,
        )
