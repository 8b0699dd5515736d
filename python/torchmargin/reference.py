"""The readable specification of the ops: eager PyTorch that holds every logit.

The same results as the fused ops, differentiable to any order, for tests, benchmarks and
for reading. It needs memory for several B x C matrices and loses the fused ops' care for
tiny losses, so it is no replacement for them.

Shapes: input [B, D], weight [C, D], target [B] int64, bias [C]. Angles and m2 in radians.

    theta = angle between input and the target's weight
    psi   = cos(theta) + mu (E(m1 theta + m2) - m3 - cos(theta))
    z     = scale A B^T + bias, with z[i, target] = scale alpha beta psi + bias
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from torchmargin.options import CosineMargin, Extension, LinearMargin, MarginGradient, MarginShape, Reduction

__all__ = [
    "LinearMarginLse",
    "linear_margin_cross_entropy",
    "linear_margin_lse",
    "margin_cross_entropy",
    "margin_logits",
    "margin_transform",
    "psi",
]

ZERO_NORM = 1e-12


class LinearMarginLse(NamedTuple):
    """What :func:`linear_margin_lse` returns, each [B]."""

    other_lse: Tensor
    target_logit: Tensor
    logit_sum: Tensor
    target_angle: Tensor
    max_other_logit: Tensor


def _unit(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    zero = norm < ZERO_NORM
    return torch.where(zero, 0.0, x / torch.where(zero, 1.0, norm))


def _angle(x: Tensor, w: Tensor) -> Tensor:
    """The angle between rows, [B]; a zero row is at a right angle to everything."""
    delta = torch.linalg.vector_norm(x - w, dim=1)
    sigma = torch.linalg.vector_norm(x + w, dim=1)
    zero = (torch.linalg.vector_norm(x, dim=1) == 0) | (torch.linalg.vector_norm(w, dim=1) == 0)
    return torch.where(zero, math.pi / 2, 2 * torch.atan2(delta, sigma))


def psi(
    theta: Tensor,
    *,
    m1: float = 1.0,
    m2: float | Tensor = 0.0,
    m3: float | Tensor = 0.0,
    extension: Extension = "none",
    margin_weight: float | Tensor = 1.0,
    margin_gradient: MarginGradient = "exact",
) -> Tensor:
    """The target's cosine with its margin, at the angle ``theta`` (radians)."""
    # NB: not cos(theta) > 0, the cosine of a right angle that was rounded is 6e-17.
    return _psi(theta, torch.cos(theta), theta < math.pi / 2, m1, m2, m3, extension, margin_weight, margin_gradient)


def _psi(
    theta: Tensor,
    cosine: Tensor,
    acute: Tensor,
    m1: float = 1.0,
    m2: float | Tensor = 0.0,
    m3: float | Tensor = 0.0,
    extension: Extension = "none",
    margin_weight: float | Tensor = 1.0,
    margin_gradient: MarginGradient = "exact",
) -> Tensor:
    m2, m3, margin_weight = (
        torch.as_tensor(number, dtype=theta.dtype, device=theta.device) for number in (m2, m3, margin_weight)
    )
    phi = m1 * theta + m2
    if extension == "none":
        extended = torch.cos(phi)
    elif extension == "linear":
        extended = torch.where(phi <= math.pi, torch.cos(phi), cosine - m2 * torch.sin(m2))
    elif extension == "continuous":
        extended = torch.where(phi <= math.pi, torch.cos(phi), cosine - (1 - torch.cos(m2)))
    elif extension == "easy":
        extended = torch.where(acute, torch.cos(phi), cosine)
    elif extension == "clip":
        extended = torch.cos(phi.clamp(0, math.pi))
    elif extension == "monotonic":
        k = torch.floor(phi / math.pi).detach()
        extended = (1 - 2 * torch.remainder(k, 2)) * torch.cos(phi) - 2 * k
    else:
        raise ValueError(f"unknown extension {extension!r}")
    result = cosine + margin_weight * (extended - m3 - cosine)
    if margin_gradient == "straight_through":
        result = cosine + (result - cosine).detach()
    return result


def _logits_and_angles(
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
) -> tuple[Tensor, Tensor]:
    """The logits [B, C] with the margin at each row's target, and the target angles [B]."""
    if torch.is_autocast_enabled(weight.device.type):  # as the op: everything in the weight's dtype
        input, bias = input.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
    unit_x, unit_w = _unit(input), _unit(weight)
    a = unit_x if normalize_input else input
    b = unit_w if normalize_weight else weight
    with torch.autocast(weight.device.type, enabled=False):
        logits = scale * F.linear(a, b) + (0 if bias is None else bias)
    present = (target >= 0) & (target < weight.shape[0])
    y = torch.where(present, target, 0)

    theta = _angle(unit_x, unit_w[y])
    value = psi(
        theta,
        m1=m1,
        m2=m2 if sample_m2 is None else m2 + sample_m2,
        m3=m3 if sample_m3 is None else m3 + sample_m3,
        extension=extension,
        margin_weight=margin_weight if sample_margin_weight is None else margin_weight * sample_margin_weight,
        margin_gradient=margin_gradient,
    )
    alpha = 1.0 if normalize_input else torch.linalg.vector_norm(input, dim=1)
    beta = 1.0 if normalize_weight else torch.linalg.vector_norm(weight[y], dim=1)
    target_logit = scale * alpha * beta * value + (0 if bias is None else bias[y])
    rows = torch.nonzero(present).squeeze(1)
    logits = logits.index_put((rows, y[rows]), target_logit[rows])
    return logits, torch.where(present, theta, 0.0).detach()


def linear_margin_lse(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **margin: Unpack[LinearMargin]
) -> LinearMarginLse:
    """The core op. A target outside [0, C) is absent: target_logit and target_angle are 0."""
    logits, theta = _logits_and_angles(input, weight, target, bias, **margin)
    classes = weight.shape[0]
    present = (target >= 0) & (target < classes)
    is_target = torch.arange(classes, device=target.device) == torch.where(present, target, -1).unsqueeze(1)
    others = logits.masked_fill(is_target, -math.inf)
    target_logit = torch.where(is_target, logits, 0.0).sum(1)
    return LinearMarginLse(torch.logsumexp(others, 1), target_logit, logits.sum(1), theta, others.amax(1).detach())


def linear_margin_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    **margin: Unpack[LinearMargin],
) -> Tensor:
    """The loss, as torch's cross_entropy of the logits."""
    logits = margin_logits(input, weight, target, bias, **margin)
    return F.cross_entropy(
        logits, target, label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction
    )


def margin_logits(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    bias: Tensor | None = None,
    **margin: Unpack[LinearMargin],
) -> Tensor:
    """The logits [B, C] with the margin at each row's target, if it is one of the C classes."""
    if target is None:
        target = torch.full((input.shape[0],), -1, device=input.device)
    return _logits_and_angles(input, weight, target, bias, **margin)[0]


def margin_transform(cosine: Tensor, **margin: Unpack[CosineMargin]) -> Tensor:
    """psi of cosines of any shape; past +-1 they count as +-1."""
    clamped = cosine.clamp(-1, 1)
    theta = 2 * torch.atan2((1 - clamped).sqrt(), (1 + clamped).sqrt())
    return _psi(theta, torch.cos(theta), clamped > 0, **margin)


def margin_cross_entropy(
    cosine: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    m2: float = 0.0,
    m3: float = 0.0,
    sample_m2: Tensor | None = None,
    sample_m3: Tensor | None = None,
    sample_margin_weight: Tensor | None = None,
    margin_weight: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    **margin: Unpack[MarginShape],
) -> Tensor:
    """The loss from cosines [B, C]: the target's becomes psi, all are scaled, then cross_entropy."""
    if torch.is_autocast_enabled(cosine.device.type) and cosine.dtype != torch.float64:
        cosine = cosine.float()
    present = (target >= 0) & (target < cosine.shape[1])
    y = torch.where(present, target, 0).unsqueeze(1)
    own = margin_transform(
        cosine.gather(1, y).squeeze(1),
        m2=m2 if sample_m2 is None else m2 + sample_m2,
        m3=m3 if sample_m3 is None else m3 + sample_m3,
        margin_weight=margin_weight if sample_margin_weight is None else margin_weight * sample_margin_weight,
        **margin,
    )
    own = torch.where(present, own, cosine.gather(1, y).squeeze(1))
    return F.cross_entropy(
        scale * cosine.scatter(1, y, own.unsqueeze(1)),
        target,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    )
