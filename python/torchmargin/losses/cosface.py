"""The additive cosine margin."""

from __future__ import annotations

import math

from typing_extensions import Unpack

from torchmargin.losses.base import CommonOptions, MarginLoss

__all__ = ["CosFaceLoss"]


class CosFaceLoss(MarginLoss):
    """CosFace, or LMCL: Wang et al., CVPR 2018 (arXiv:1801.09414).

    target logit = scale (cos(theta) - margin), other logits = scale cos(theta_j), for embeddings
    [B, in_features] and labels [B]. ``margin`` is a difference of cosines. ``extension`` changes
    nothing here, where no angle is added to theta.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 64.0,
        margin: float = 0.35,
        extension: str = "none",
        margin_gradient: str = "exact",
        **common: Unpack[CommonOptions],
    ) -> None:
        if not abs(margin) <= math.pi:
            raise ValueError(
                f"expected margin to be a difference of cosines (angles here are in radians, not degrees): at most "
                f"pi in size, but got {margin}"
            )
        super().__init__(
            in_features,
            num_classes,
            scale=scale,
            m3=margin,
            extension=extension,
            margin_gradient=margin_gradient,
            **common,
        )
