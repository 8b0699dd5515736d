"""Losses without a margin."""

from __future__ import annotations

from typing_extensions import Unpack

from torchmargin.losses.base import CommonOptions, MarginLoss

__all__ = ["ModifiedSoftmaxLoss", "NormalizedSoftmaxLoss", "SoftmaxLoss"]


class SoftmaxLoss(MarginLoss):
    """Softmax cross-entropy of a linear layer: logits = scale x.w_j + b_j, nothing normalised.

    The same loss as ``cross_entropy(linear(x, weight, bias), labels)``, without the [B, C] logits.
    """

    _unsaved = MarginLoss._unsaved | {"m1", "m2", "m3"}

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 1.0,
        bias: bool = True,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(
            in_features, num_classes, scale=scale, bias=bias, normalize_input=False, normalize_weight=False, **common
        )


class ModifiedSoftmaxLoss(MarginLoss):
    """SphereFace's modified softmax: Liu et al., CVPR 2017 (arXiv:1704.08063), eq. 4.

    logits = scale |x| cos(theta_j): the weights are of unit length and there is no bias.
    """

    _unsaved = MarginLoss._unsaved | {"m1", "m2", "m3"}

    def __init__(
        self, in_features: int, num_classes: int, *, scale: float = 1.0, **common: Unpack[CommonOptions]
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, normalize_input=False, **common)


class NormalizedSoftmaxLoss(MarginLoss):
    """Softmax over scaled cosines: NormFace, Wang et al., ACM MM 2017 (arXiv:1704.06369).

    logits = scale cos(theta_j) for embeddings [B, in_features] and labels [B].
    """

    _unsaved = MarginLoss._unsaved | {"m1", "m2", "m3"}

    def __init__(
        self, in_features: int, num_classes: int, *, scale: float = 64.0, **common: Unpack[CommonOptions]
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, **common)
