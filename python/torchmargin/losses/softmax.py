"""Losses without a margin."""

from __future__ import annotations

import torch

from torchmargin.losses.base import MarginLoss

__all__ = ["NormalizedSoftmaxLoss"]


class NormalizedSoftmaxLoss(MarginLoss):
    """Softmax over scaled cosines: NormFace, Wang et al., ACM MM 2017 (arXiv:1704.06369).

    logits = scale cos(theta_j) for embeddings [B, in_features] and labels [B].
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 64.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            scale=scale,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            device=device,
            dtype=dtype,
        )
