"""The additive angular margin."""

from __future__ import annotations

from typing_extensions import Unpack

from torchmargin.losses.base import CommonOptions, MarginLoss, check_radians

__all__ = ["ArcFaceLoss"]


class ArcFaceLoss(MarginLoss):
    """ArcFace: Deng et al., CVPR 2019 (arXiv:1801.07698).

    target logit = scale cos(theta + margin), other logits = scale cos(theta_j), for embeddings
    [B, in_features] and labels [B]. ``margin`` is in radians. Past theta + margin = pi the
    paper's code goes on with cos(theta) - margin sin(margin) (``extension="linear"``);
    InsightFace since 2022-12 is ``extension="none", margin_gradient="straight_through"``.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 64.0,
        margin: float = 0.5,
        extension: str = "linear",
        margin_gradient: str = "exact",
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            scale=scale,
            m2=check_radians("margin", margin),
            extension=extension,
            margin_gradient=margin_gradient,
            **common,
        )
