"""Independent float64 references, each written from its paper and none from the package.

Every function takes input [B, D], weight [C, D] and target [B] in float64 and returns the
loss of each row, [B]. They hold all logits and use arccos-free textbook forms (Chebyshev
polynomials for cos(m theta), the addition theorem for cos(theta + m)), so that they share no
formula with the library. Gradients come from autograd.
"""

import math

import torch
from torch import Tensor


def _cosines(x: Tensor, w: Tensor) -> Tensor:
    return (x / x.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T


def loss_of(others: Tensor, target: Tensor, target_logit: Tensor) -> Tensor:
    """-log softmax with `target_logit` at each row's target: log(1 + sum_j exp(z_j - t))."""
    is_target = torch.nn.functional.one_hot(target, others.shape[1]).bool()
    gaps = (others - target_logit[:, None]).masked_fill(is_target, -math.inf)
    largest = gaps.detach().amax(1).clamp(min=0)
    # log1p keeps every digit of a tiny loss; the shift keeps exp finite for a large one.
    total = (gaps - largest[:, None]).exp().sum(1)
    return torch.where(largest > 0, largest + torch.log(total + (-largest).exp()), torch.log1p(total))


def _pick(matrix: Tensor, target: Tensor) -> Tensor:
    return matrix[torch.arange(len(target)), target]


def softmax(x, w, y, b):
    z = x @ w.T + b
    return loss_of(z, y, _pick(z, y))


def modified_softmax(x, w, y):
    """SphereFace, eq. 4: ||W_j|| = 1, no bias."""
    z = x @ (w / w.norm(dim=1, keepdim=True)).T
    return loss_of(z, y, _pick(z, y))


def _chebyshev(c: Tensor, m: int) -> Tensor:
    """cos(m theta) as a polynomial of cos(theta), as SphereFace's code lists them."""
    return {1: c, 2: 2 * c**2 - 1, 3: 4 * c**3 - 3 * c, 4: 8 * c**4 - 8 * c**2 + 1}[m]


def _large_margin_psi(c: Tensor, m: int) -> Tensor:
    """SphereFace eq. 7 / L-Softmax eq. 6: psi = (-1)^k cos(m theta) - 2k, theta in [k pi/m, (k+1) pi/m]."""
    k = sum((c < math.cos(i * math.pi / m)).to(c.dtype) for i in range(1, m)) if m > 1 else torch.zeros_like(c)
    return (-1.0) ** k * _chebyshev(c, m) - 2 * k


def a_softmax(x, w, y, m):
    """SphereFace, eq. 6."""
    length = x.norm(dim=1)
    c = _cosines(x, w)
    return loss_of(length[:, None] * c, y, length * _large_margin_psi(_pick(c, y), m))


def l_softmax(x, w, y, m):
    """Large-Margin Softmax, eq. 5: ||W_y|| ||x|| psi(theta)."""
    c = _pick(_cosines(x, w), y)
    return loss_of(x @ w.T, y, x.norm(dim=1) * w.norm(dim=1)[y] * _large_margin_psi(c, m))


def normalized_softmax(x, w, y, s):
    """NormFace, eq. 6 with the scale of section 3.3."""
    z = s * _cosines(x, w)
    return loss_of(z, y, _pick(z, y))


def cosface(x, w, y, s, m):
    """CosFace, eq. 4."""
    c = _cosines(x, w)
    return loss_of(s * c, y, s * (_pick(c, y) - m))


def arcface(x, w, y, s, m):
    """ArcFace, eq. 3, with its code's cos(theta) - m sin(m) past theta = pi - m."""
    c = _cosines(x, w)
    t = _pick(c, y)
    sine = (1 - t**2).sqrt()
    moved = t * math.cos(m) - sine * math.sin(m)
    return loss_of(s * c, y, s * torch.where(t > math.cos(math.pi - m), moved, t - m * math.sin(m)))


def combined(x, w, y, s, m1, m2, m3):
    """ArcFace, eq. 4: cos(m1 theta + m2) - m3."""
    c = _cosines(x, w)
    theta = torch.arccos(_pick(c, y))
    return loss_of(s * c, y, s * (torch.cos(m1 * theta + m2) - m3))


# Each founding loss of contract section 1: its reference and the op's parameters for it.
def founding_losses():
    margins = {"scale": 1.0, "normalize_input": False}
    losses = {
        "softmax": (softmax, {**margins, "normalize_weight": False}),
        "modified_softmax": (modified_softmax, margins),
        "normalized_softmax": (lambda x, w, y: normalized_softmax(x, w, y, 64.0), {"scale": 64.0}),
        "cosface": (lambda x, w, y: cosface(x, w, y, 64.0, 0.35), {"scale": 64.0, "m3": 0.35}),
        "arcface": (
            lambda x, w, y: arcface(x, w, y, 64.0, 0.5),
            {"scale": 64.0, "m2": 0.5, "extension": "linear"},
        ),
        "combined": (
            lambda x, w, y: combined(x, w, y, 64.0, 1.0, 0.3, 0.2),
            {"scale": 64.0, "m1": 1.0, "m2": 0.3, "m3": 0.2},
        ),
        "combined_m1": (
            lambda x, w, y: combined(x, w, y, 30.0, 1.2, 0.1, 0.05),
            {"scale": 30.0, "m1": 1.2, "m2": 0.1, "m3": 0.05},
        ),
    }
    for m in (1, 2, 3, 4):
        losses[f"sphereface_m{m}"] = (
            lambda x, w, y, m=m: a_softmax(x, w, y, m),
            {**margins, "m1": float(m), "extension": "monotonic"},
        )
        losses[f"l_softmax_m{m}"] = (
            lambda x, w, y, m=m: l_softmax(x, w, y, m),
            {**margins, "m1": float(m), "extension": "monotonic", "normalize_weight": False},
        )
    return losses
