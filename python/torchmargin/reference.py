"""The readable specification of the ops: eager PyTorch that holds every logit.

The same results as the fused ops, differentiable to any order, for tests, benchmarks and
for reading. It needs memory for several B x C matrices and loses the fused ops' care for
tiny losses, so it is no replacement for them.

Shapes: input [B, D], weight [C, D] ([C K, D] with K sub-centers), target [B] int64, bias [C]. Angles and m2 in radians.

    theta = angle between input and the target's weight
    psi   = cos(theta) + mu (E(m1 theta + m2) - m3 - cos(theta))
    z     = scale A B^T + bias, with z[i, target] = scale alpha beta psi + bias

With sub-centers a class's product is the largest of its centers'. Other classes' cosines c above a threshold become
a c^2 + b c + d, or the k hardest of them cos(max(theta_j - hardest_margin, 0)), before they are scaled. Which are which
is a constant to autograd.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from torchmargin.options import (
    BinaryKind,
    CosineMargin,
    Extension,
    LinearHead,
    LinearRule,
    MarginGradient,
    MarginShape,
    Reduction,
)

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
    "psi",
    "unit",
]

ZERO_NORM = 1e-12


class LinearMarginLse(NamedTuple):
    """What :func:`linear_margin_lse` returns, each [B]."""

    other_lse: Tensor
    target_logit: Tensor
    logit_sum: Tensor
    target_angle: Tensor
    max_other_logit: Tensor


class LinearMarginLseHardest(NamedTuple):
    """What :func:`linear_margin_lse_hardest` returns, [B] each and the last two [B, hardest]."""

    other_lse: Tensor
    target_logit: Tensor
    logit_sum: Tensor
    target_angle: Tensor
    max_other_logit: Tensor
    hardest_logit: Tensor
    hardest_class: Tensor


def unit(x: Tensor) -> Tensor:
    """Rows of unit length; one that is shorter than ZERO_NORM becomes zero."""
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
        number.to(theta) if isinstance(number, Tensor) else theta.new_full((), number)
        for number in (m2, m3, margin_weight)
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


class _Head(NamedTuple):
    """The logits and how they came to be. [B, C] but for the last two, [B]."""

    logits: Tensor  # with the margin at each row's own class
    before: Tensor  # the other classes' without what a head does to them
    own: Tensor  # bool: each row's own class, where it is present
    hardest: Tensor  # [B, hardest] classes, -1 where there is none
    target_logit: Tensor  # 0 where the target is absent
    theta: Tensor


def _head(
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
    sub_centers: int = 1,
    hard_threshold: Tensor | None = None,
    hard_coefficients: Tensor | None = None,
    hardest: int = 0,
    hardest_margin: float = 0.0,
) -> _Head:
    if torch.is_autocast_enabled(weight.device.type):  # as the op: everything in the weight's dtype
        input, bias = input.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
    classes = weight.shape[0] // sub_centers
    unit_x, unit_w = unit(input), unit(weight)
    a = unit_x if normalize_input else input
    b = unit_w if normalize_weight else weight
    with torch.autocast(weight.device.type, enabled=False):
        products = F.linear(a, b).unflatten(1, (classes, sub_centers))
    products = products.gather(2, products.detach().argmax(2, keepdim=True)).squeeze(2)
    present = (target >= 0) & (target < classes)
    y = torch.where(present, target, 0)
    own = (torch.arange(classes, device=target.device) == y.unsqueeze(1)) & present.unsqueeze(1)

    angles = torch.stack([_angle(unit_x, unit_w[y * sub_centers + k]) for k in range(sub_centers)], 1)
    nearest = angles.detach().argmin(1, keepdim=True)
    theta = angles.gather(1, nearest).squeeze(1)
    m2_of_rows = m2 if sample_m2 is None else m2 + sample_m2
    m3_of_rows = m3 if sample_m3 is None else m3 + sample_m3
    value = psi(
        theta,
        m1=m1,
        m2=m2_of_rows,
        m3=m3_of_rows,
        extension=extension,
        margin_weight=margin_weight if sample_margin_weight is None else margin_weight * sample_margin_weight,
        margin_gradient=margin_gradient,
    )
    alpha = 1.0 if normalize_input else torch.linalg.vector_norm(input, dim=1)
    beta = 1.0 if normalize_weight else torch.linalg.vector_norm(weight[y], dim=1)
    target_logit = scale * alpha * beta * value + (0 if bias is None else bias[y])

    changed = products
    if hard_coefficients is not None:
        if hard_threshold is None:
            hard_threshold = torch.where(present, torch.cos(m1 * theta + m2_of_rows) - m3_of_rows, math.inf).detach()
        h = torch.where(hard_threshold < 1, hard_threshold, math.inf).reshape(-1, 1)
        k2, k1, k0 = (hard_coefficients[..., k].reshape(-1, 1) for k in range(3))
        changed = torch.where((products.detach() > h) & ~own, (k2 * products + k1) * products + k0, products)
    chosen = _hardest(products, own, hardest)
    if hardest_margin > 0:
        c = products.clamp(-1 + 1e-15, 1 - 1e-15)
        nearer = torch.cos((torch.arccos(c) - hardest_margin).clamp(min=0))
        among = (chosen.unsqueeze(2) == torch.arange(classes, device=target.device)).any(1)
        changed = torch.where(among, nearer, changed)

    def scaled(of_classes: Tensor) -> Tensor:
        return scale * of_classes + (0 if bias is None else bias)

    logits = torch.where(own, target_logit.unsqueeze(1), scaled(changed))
    none = torch.zeros((), dtype=theta.dtype, device=theta.device)
    return _Head(
        logits,
        scaled(products),
        own,
        chosen,
        torch.where(present, target_logit, none),
        torch.where(present, theta, none).detach(),
    )


def _hardest(logits: Tensor, own: Tensor, hardest: int) -> Tensor:
    """The classes of the largest other logits [B, hardest], the lower class first in ties; -1: none is left."""
    ranked = logits.detach().masked_fill(own | logits.isnan(), -math.inf)
    values, classes = torch.sort(ranked, dim=1, descending=True, stable=True)
    chosen = torch.where(values > -math.inf, classes, -1)[:, :hardest]
    return F.pad(chosen, (0, hardest - chosen.shape[1]), value=-1)


def linear_margin_lse(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **margin: Unpack[LinearRule]
) -> LinearMarginLse:
    """The core op. A target outside [0, C) is absent: target_logit and target_angle are 0."""
    head = _head(input, weight, target, bias, **margin)
    return LinearMarginLse(
        torch.logsumexp(head.logits.masked_fill(head.own, -math.inf), 1),
        head.target_logit,
        head.logits.masked_fill(head.own, 0.0).sum(1) + head.target_logit,
        head.theta,
        head.before.masked_fill(head.own, -math.inf).amax(1).detach(),
    )


def linear_margin_lse_hardest(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    hardest: int,
    **margin: Unpack[LinearRule],
) -> LinearMarginLseHardest:
    """The core op with the k largest other logits apart from other_lse."""
    head = _head(input, weight, target, bias, hardest=hardest, **margin)
    lse = linear_margin_lse(input, weight, target, bias, **margin)
    there = head.hardest >= 0
    logits = torch.where(there, head.logits.gather(1, head.hardest.clamp(min=0)), -math.inf)
    classes = torch.arange(head.logits.shape[1], device=target.device)
    out = (head.hardest.unsqueeze(2) == classes).any(1) | head.own
    return LinearMarginLseHardest(
        torch.logsumexp(head.logits.masked_fill(out, -math.inf), 1), *lse[1:], logits, head.hardest
    )


def linear_target_angle(input: Tensor, weight: Tensor, target: Tensor, *, sub_centers: int = 1) -> Tensor:
    """The angle of each row to its class, [B]; 0 where it is absent."""
    return _head(input, weight, target, sub_centers=sub_centers).theta


def linear_margin_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    class_weight: Tensor | None = None,
    **head: Unpack[LinearHead],
) -> Tensor:
    """The loss, as torch's cross_entropy of the logits."""
    logits = margin_logits(input, weight, target, bias, **head)
    return F.cross_entropy(
        logits,
        target,
        weight=None if class_weight is None else class_weight.to(logits.dtype),
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    )


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
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    class_weight: Tensor | None = None,
) -> Tensor:
    """One against all: a logistic loss of a curve through each cosine, summed over the classes."""
    head = _head(input, weight, target, sub_centers=sub_centers)

    def g(cosine: Tensor) -> Tensor:
        return 2 * ((cosine + 1) / 2) ** power - 1 if power != 1 else cosine

    cosine = head.before
    if kind == "c":
        positive, negative = g(head.target_logit) - margin, g(cosine) + margin
    elif kind == "a":
        shifted = _head(input, weight, target, m2=margin, extension="continuous", sub_centers=sub_centers)
        sine = ((1 - cosine) * (1 + cosine)).clamp(min=0).sqrt()
        positive, negative = g(shifted.target_logit), g(cosine * math.cos(margin) + sine * math.sin(margin))
    elif kind == "m":
        positive, negative = g(head.target_logit - margin), g(cosine)
    else:
        raise ValueError(f"unknown kind {kind!r}")
    shift = 0.0 if bias is None else bias
    zero = torch.zeros((), dtype=cosine.dtype, device=cosine.device)
    others = torch.where(head.own, zero, torch.logaddexp(zero, scale * negative + shift)).sum(1)
    of_own = torch.where(head.own.any(1), torch.logaddexp(zero, -(scale * positive + shift)), zero)
    valid = target != ignore_index
    rows = torch.where(valid, positive_weight * of_own + negative_weight * others, zero)
    counts = valid.to(rows.dtype)
    if class_weight is not None:
        counts = torch.where(valid, class_weight.to(rows.dtype)[torch.where(valid, target, 0)], zero)
        rows = counts * rows
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / counts.sum()


def margin_logits(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    bias: Tensor | None = None,
    **head: Unpack[LinearHead],
) -> Tensor:
    """The logits [B, C] with the margin at each row's target, if it is one of the C classes."""
    if target is None:
        target = torch.full((input.shape[0],), -1, device=input.device)
    return _head(input, weight, target, bias, **head).logits


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
    class_weight: Tensor | None = None,
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
        weight=None if class_weight is None else class_weight.to(cosine.dtype),
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    )
