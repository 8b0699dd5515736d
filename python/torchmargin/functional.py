"""The fused ops as functions.

Shapes: ``input`` [B, D], ``weight`` [C, D] ([C K, D] with ``sub_centers`` = K: class j has the rows j K ... j K +
K - 1), ``target`` [B] int64, ``bias`` [C]. Results are float64 for float64 inputs and float32 otherwise. Angles and
``m2`` are in radians. The
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

What newer heads do to the other classes (c_j is the cosine of class j):

``sub_centers`` = K, at most 255 (sub-center ArcFace, Deng et al., ECCV 2020): c_j is the largest of its K centers'
    cosines, and its gradient goes to that one (ties to the first); theta is the angle to the target's nearest center.
``hard_coefficients`` (a, b, d), [3] or [B, 3], with ``hard_threshold``, [B] or 0-dim: where c_j > threshold, strictly,
    a c_j^2 + b c_j + d takes the place of c_j; d = -inf takes such a class out of the sum. (1, t, 0) is CurricularFace
    (Huang et al., CVPR 2020), (0, 1 + t, t) MV-Softmax (Wang et al., AAAI 2020), (0, 0, 0) InsightFace's filter.
    Tensors in the losses' dtype or float64 that require no grad: they may change at every step, in a CUDA graph too.
    Without a threshold it is the row's own cos(m1 theta + m2) - m3, without extension and margin_weight.
``hardest`` = k with ``hardest_margin`` m' in radians (inter-top-k, Zhao et al., ICASSP 2022): the k largest other
    logits of each row get cos(max(theta_j - m', 0)). Of equal ones the lower class comes first, and NaN is none.

Which classes are hard, win or are the hardest are constants to autograd, and jump: docs/numerics.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchmargin import _extension  # noqa: F401  (registers the ops)
from torchmargin.options import BinaryKind, Extension, MarginGradient, Reduction

__all__ = [
    "LinearMarginLse",
    "LinearMarginLseHardest",
    "linear_margin_binary_cross_entropy",
    "linear_margin_cross_entropy",
    "linear_margin_lse",
    "linear_margin_lse_hardest",
    "linear_target_angle",
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


class LinearMarginLseHardest(NamedTuple):
    """What :func:`linear_margin_lse_hardest` returns: [B] each, and of the k hardest classes [B, k]."""

    other_lse: Tensor  # without the hardest
    target_logit: Tensor
    logit_sum: Tensor
    target_angle: Tensor
    max_other_logit: Tensor
    hardest_logit: Tensor  # the larger first, then the lower class; -inf where there is none; differentiable
    hardest_class: Tensor  # int64; -1 where there is none


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
    sub_centers: int = 1,
    hard_threshold: Tensor | None = None,
    hard_coefficients: Tensor | None = None,
) -> LinearMarginLse:
    """The core op: what a margin-softmax loss needs of all classes, without the [B, C] logits.

    A target outside [0, C) is absent from this weight: target_logit and target_angle are 0 and
    the other results count all C classes. Shards of the classes therefore merge as logsumexp of
    other_lse, sums of target_logit and logit_sum, and the maximum of max_other_logit. A weight may hold no
    class: other_lse and max_other_logit are -inf then and the others 0. Over ranks: torchmargin.distributed.

    ``hard_coefficients`` need a ``hard_threshold`` here, for a shard without a row's target cannot know its own
    (:func:`linear_target_angle` of the shards, added, gives it to all). logit_sum counts changed logits,
    max_other_logit is the largest as they are without ``hard_coefficients``.

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
            sub_centers=sub_centers,
            hard_threshold=hard_threshold,
            hard_coefficients=hard_coefficients,
        )
    )


def linear_margin_lse_hardest(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    hardest: int,
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
    sub_centers: int = 1,
    hard_threshold: Tensor | None = None,
    hard_coefficients: Tensor | None = None,
) -> LinearMarginLseHardest:
    """The core op with the ``hardest`` largest other logits of each row apart: a rule about them is [B, k] arithmetic.

    They leave other_lse, and stay in logit_sum as they are. Of a shard they are its own: shards add their first class
    to hardest_class, where it is not -1, and merge by concatenation and top-k, equal ones by their class; what then has
    no place among them joins other_lse. They take no bias and no hard_coefficients (RuntimeError).
    """
    return LinearMarginLseHardest(
        *torch.ops.torchmargin.linear_margin_lse_hardest(
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
            sub_centers=sub_centers,
            hard_threshold=hard_threshold,
            hard_coefficients=hard_coefficients,
            hardest=hardest,
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
    sub_centers: int = 1,
    hard_threshold: Tensor | None = None,
    hard_coefficients: Tensor | None = None,
    hardest: int = 0,
    hardest_margin: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    class_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the logits with the target's margin, without the [B, C] logits.

    A scalar, or [B] with reduction "none". Rows whose target is ``ignore_index`` add nothing to
    the loss, to any gradient or to the mean's count; any other target outside [0, C) raises
    IndexError. Raises RuntimeError for other bad arguments, before any work.

    ``class_weight`` [C] floating-point is torch.nn.functional.cross_entropy's ``weight``: a row's loss is multiplied by
    the weight of its class, and "mean" divides by the sum of the rows' weights. It requires no grad, and there is no
    ``label_smoothing`` beside it (RuntimeError).
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
        sub_centers=sub_centers,
        hard_threshold=hard_threshold,
        hard_coefficients=hard_coefficients,
        hardest=hardest,
        hardest_margin=hardest_margin,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        class_weight=class_weight,
    )
    return loss


def linear_target_angle(input: Tensor, weight: Tensor, target: Tensor, *, sub_centers: int = 1) -> Tensor:
    """The angle of each row to its class, [B] in radians, to the nearest center where there are several.

    0 where the target is absent from this weight, so that shards merge by a sum. It has no gradient, and takes no
    product over the classes.
    """
    angle: Tensor = torch.ops.torchmargin.linear_target_angle(input, weight, target, sub_centers=sub_centers)
    return angle


def linear_margin_binary_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    margin: float = 0.0,
    kind: BinaryKind = "c",
    power: float = 1.0,
    positive_weight: float = 1.0,
    negative_weight: float = 1.0,
    sub_centers: int = 1,
    compute_dtype: torch.dtype | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    require_target: bool = False,
    class_weight: Tensor | None = None,
) -> Tensor:
    """One against all: a logistic loss for each class, summed over the classes, without the [B, C] logits.

        positive_weight softplus(-(scale P + bias)) + negative_weight sum_{j != y} softplus(scale N(c_j) + bias)

    With g(c) = 2 ((c + 1) / 2)^power - 1, ``kind`` says where the margin stands: "c": P = g(cos(theta)) - margin,
    N = g + margin; "a" (radians): P = g(cos(theta + margin)), continued past pi by cos(theta) - (1 - cos(margin)), and
    N = g(cos(theta_j - margin)); "m": P = g(cos(theta) - margin), N = g. ``bias`` is 0-dim and has its gradient.

    SphereFace2 (Wen et al., ICLR 2022): "c" with power 3, weights lambda and 1 - lambda. UniFace (Zhou et al.,
    ICCV 2023): "m" with power 1; the paper's bias is -``bias``. Embeddings and weights are always normalised. A target
    outside [0, C) that is not ``ignore_index`` is absent: the row has negatives only; with ``require_target`` it is an
    IndexError. ``power`` is at least 1, and whole with "m". ``class_weight`` as above, with ``require_target`` alone: a
    row without a class has no weight. Raises RuntimeError for bad arguments, before any work.
    """
    loss: Tensor = torch.ops.torchmargin.linear_margin_binary_cross_entropy(
        input,
        weight,
        target,
        bias,
        scale=scale,
        margin=margin,
        kind=kind,
        power=power,
        positive_weight=positive_weight,
        negative_weight=negative_weight,
        sub_centers=sub_centers,
        compute_dtype=compute_dtype,
        ignore_index=ignore_index,
        reduction=reduction,
        require_target=require_target,
        class_weight=class_weight,
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
    sub_centers: int = 1,
    hard_threshold: Tensor | None = None,
    hard_coefficients: Tensor | None = None,
    hardest: int = 0,
    hardest_margin: float = 0.0,
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
        sub_centers=sub_centers,
        hard_threshold=hard_threshold,
        hard_coefficients=hard_coefficients,
        hardest=hardest,
        hardest_margin=hardest_margin,
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
    class_weight: Tensor | None = None,
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
        class_weight=class_weight,
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
