"""The fused ops as functions.

Shapes: ``input`` [B, D], ``weight`` [C, D], ``target`` [B] int64, ``bias`` [C]. Results are
float64 for float64 inputs and float32 otherwise. Angles and ``m2`` are in radians. The
readable specification of all functions is :mod:`torchmargin.reference`.

Second derivatives and forward-mode AD are right for all of them; unlike everything else they hold
[B, C] matrices. Second derivatives are NaN for rows that have none: at an angle of exactly 0 or pi to
their class, or of length zero without being normalised, unless no angle is added to theta.

Under autocast the linear functions keep the weight as it is and take the autocast dtype as
``compute_dtype``; the others run in float32. Losses and logits are never rounded to 16 bits.

With x and w of unit length where they are normalised, theta the angle between a row and its
target's weight, and mu = margin_weight * sample_margin_weight:

    psi          = cos(theta) + mu (E(m1 theta + m2 + sample_m2) - m3 - sample_m3 - cos(theta))
    target_logit = scale |x| |w| psi + bias          (|.| = 1 where normalised)
    z_j          = scale x.w_j + bias_j              for the other classes j

``extension`` says what E is where cos would rise again: "none" (cos itself), "linear"
(ArcFace's paper), "continuous" (cos(theta) - (1 - cos(m2)), wespeaker), "easy", "clip" (AdaFace),
"monotonic" (SphereFace). ``margin_gradient`` is "exact" or "straight_through" (the gradient of
cos(theta), as InsightFace has it).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchmargin import _extension  # noqa: F401  (registers the ops)
from torchmargin.options import Extension, MarginGradient, Reduction

__all__ = [
    "LinearMarginLse",
    "linear_margin_cross_entropy",
    "linear_margin_lse",
    "margin_cross_entropy",
    "margin_logits",
    "margin_transform",
]


class LinearMarginLse(NamedTuple):
    """What :func:`linear_margin_lse` returns, each [B]."""

    other_lse: Tensor  # log sum exp of z_j over the classes other than the target
    target_logit: Tensor  # the target's logit with its margin
    logit_sum: Tensor  # target_logit + the sum of the other z_j
    target_angle: Tensor  # theta in radians; never requires grad
    max_other_logit: Tensor  # the largest other z_j; never requires grad


def linear_margin_lse(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    m1: float = 1.0,
    m2: float = 0.0,
    m3: float = 0.0,
    sample_m2: Tensor | None = None,
    sample_m3: Tensor | None = None,
    sample_margin_weight: Tensor | None = None,
    extension: Extension = "none",
    margin_weight: float = 1.0,
    margin_gradient: MarginGradient = "exact",
    normalize_input: bool = True,
    normalize_weight: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> LinearMarginLse:
    """The core op: what a margin-softmax loss needs of all classes, without the [B, C] logits.

    A target outside [0, C) is absent from this weight: target_logit and target_angle are 0 and
    the other results count all C classes. Shards of the classes therefore merge as logsumexp of
    other_lse, sums of target_logit and logit_sum, and the maximum of max_other_logit. A weight may hold no
    class: other_lse and max_other_logit are -inf then and the others 0. Over ranks: torchmargin.distributed.

    The first three results are differentiable to input, weight, bias, sample_m2 and sample_m3.
    Raises RuntimeError for bad arguments, before any work.
    """
    return LinearMarginLse(
        *torch.ops.torchmargin.linear_margin_lse(
            input,
            weight,
            target,
            bias,
            scale=scale,
            m1=m1,
            m2=m2,
            m3=m3,
            sample_m2=sample_m2,
            sample_m3=sample_m3,
            sample_margin_weight=sample_margin_weight,
            extension=extension,
            margin_weight=margin_weight,
            margin_gradient=margin_gradient,
            normalize_input=normalize_input,
            normalize_weight=normalize_weight,
            compute_dtype=compute_dtype,
        )
    )


def linear_margin_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    m1: float = 1.0,
    m2: float = 0.0,
    m3: float = 0.0,
    sample_m2: Tensor | None = None,
    sample_m3: Tensor | None = None,
    sample_margin_weight: Tensor | None = None,
    extension: Extension = "none",
    margin_weight: float = 1.0,
    margin_gradient: MarginGradient = "exact",
    normalize_input: bool = True,
    normalize_weight: bool = True,
    compute_dtype: torch.dtype | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of the logits with the target's margin, without the [B, C] logits.

    A scalar, or [B] with reduction "none". Rows whose target is ``ignore_index`` add nothing to
    the loss, to any gradient or to the mean's count; any other target outside [0, C) raises
    IndexError. Raises RuntimeError for other bad arguments, before any work.
    """
    loss: Tensor = torch.ops.torchmargin.linear_margin_cross_entropy(
        input,
        weight,
        target,
        bias,
        scale=scale,
        m1=m1,
        m2=m2,
        m3=m3,
        sample_m2=sample_m2,
        sample_m3=sample_m3,
        sample_margin_weight=sample_margin_weight,
        extension=extension,
        margin_weight=margin_weight,
        margin_gradient=margin_gradient,
        normalize_input=normalize_input,
        normalize_weight=normalize_weight,
        compute_dtype=compute_dtype,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return loss


def margin_logits(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    m1: float = 1.0,
    m2: float = 0.0,
    m3: float = 0.0,
    sample_m2: Tensor | None = None,
    sample_m3: Tensor | None = None,
    sample_margin_weight: Tensor | None = None,
    extension: Extension = "none",
    margin_weight: float = 1.0,
    margin_gradient: MarginGradient = "exact",
    normalize_input: bool = True,
    normalize_weight: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The logits [B, C] themselves, to look at or for inference: the one linear function that holds them.

    Each row's target in [0, C) has the margin; a row with another target, or without any, has none.
    """
    logits: Tensor = torch.ops.torchmargin.margin_logits(
        input,
        weight,
        target,
        bias,
        scale=scale,
        m1=m1,
        m2=m2,
        m3=m3,
        sample_m2=sample_m2,
        sample_m3=sample_m3,
        sample_margin_weight=sample_margin_weight,
        extension=extension,
        margin_weight=margin_weight,
        margin_gradient=margin_gradient,
        normalize_input=normalize_input,
        normalize_weight=normalize_weight,
        compute_dtype=compute_dtype,
    )
    return logits


def margin_cross_entropy(
    cosine: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    m1: float = 1.0,
    m2: float = 0.0,
    m3: float = 0.0,
    sample_m2: Tensor | None = None,
    sample_m3: Tensor | None = None,
    sample_margin_weight: Tensor | None = None,
    extension: Extension = "none",
    margin_weight: float = 1.0,
    margin_gradient: MarginGradient = "exact",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """The loss for callers who hold the cosines [B, C] already, of unit embeddings and weights.

    One pass forward and one backward, out of place. A target's cosine past +-1 counts as +-1, and the
    derivative there is finite. Otherwise as :func:`linear_margin_cross_entropy`.
    """
    loss: Tensor = torch.ops.torchmargin.margin_cross_entropy(
        cosine,
        target,
        scale=scale,
        m1=m1,
        m2=m2,
        m3=m3,
        sample_m2=sample_m2,
        sample_m3=sample_m3,
        sample_margin_weight=sample_margin_weight,
        extension=extension,
        margin_weight=margin_weight,
        margin_gradient=margin_gradient,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return loss


def margin_transform(
    cosine: Tensor,
    *,
    m1: float = 1.0,
    m2: float = 0.0,
    m3: float = 0.0,
    extension: Extension = "none",
    margin_weight: float = 1.0,
    margin_gradient: MarginGradient = "exact",
) -> Tensor:
    """psi of each cosine, of any shape and in its dtype: the margin alone, for curves and for heads of one's own."""
    transformed: Tensor = torch.ops.torchmargin.margin_transform(
        cosine,
        m1=m1,
        m2=m2,
        m3=m3,
        extension=extension,
        margin_weight=margin_weight,
        margin_gradient=margin_gradient,
    )
    return transformed
