"""Pictures that need no training: what the margins do to a target's logit and to the decision between two classes.

Every curve comes from the fused op itself, on unit vectors in the plane.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from torchmargin.demo.figures import plt, save
from torchmargin.functional import linear_margin_binary_cross_entropy, linear_margin_lse, margin_logits
from torchmargin.options import BinaryKind, Extension, LinearHead, LinearMargin

__all__ = [
    "draw_boundaries",
    "draw_margins",
    "draw_negatives",
    "negative_curve",
    "one_against_all_curve",
    "target_curve",
]

HALF_PI = math.pi / 2


def target_curve(theta: Tensor, **margin: Unpack[LinearMargin]) -> Tensor:
    """The target's logit of `linear_margin_lse` for unit vectors at angles `theta` [N] in [0, pi] to one class."""
    x = torch.stack([theta.cos(), theta.sin()], dim=1).double()
    weight = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    target = torch.zeros(len(theta), dtype=torch.int64)
    return linear_margin_lse(x, weight, target, **margin).target_logit


# Figure (e): the margins of the losses, and the six extensions of one margin.
MARGINS: dict[str, LinearMargin] = {
    "softmax: cos θ": {},
    "SphereFace m = 2": {"m1": 2.0, "extension": "monotonic"},
    "SphereFace m = 4": {"m1": 4.0, "extension": "monotonic"},
    "CosFace m = 0.35": {"m3": 0.35},
    "ArcFace m = 0.5": {"m2": 0.5, "extension": "linear"},
    "combined 1, 0.3, 0.2": {"m1": 1.0, "m2": 0.3, "m3": 0.2},
}
EXTENSIONS: dict[Extension, str] = {
    "none": "cos(θ + m): rises again past π − m",
    "linear": "then cos θ − m sin m, with a jump",
    "continuous": "then cos θ − (1 − cos m), no jump",
    "easy": "no margin past π/2, with a jump",
    "clip": "stays at −1",
    "monotonic": "goes on falling, no jump",
}


def _with_gaps(curve: np.ndarray) -> np.ndarray:
    """NaN where a curve jumps, so that no line is drawn there."""
    gaps = curve.copy()
    gaps[1:][np.abs(np.diff(curve)) > 0.05] = np.nan
    return gaps


def draw_margins(path: Path) -> Path:
    theta = torch.linspace(0, math.pi, 1001, dtype=torch.float64)
    degrees = torch.rad2deg(theta).numpy()
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 6.2), layout="constrained")
    for name, margin in MARGINS.items():
        left.plot(degrees, _with_gaps(target_curve(theta, **margin).numpy()), label=name, linewidth=1.8)
    left.set_title("The margins: target's logit at scale 1")
    for (extension, words), style in zip(EXTENSIONS.items(), ("-", "--", (0, (1, 1)), "-.", ":", (0, (6, 2, 1, 2)))):
        curve = target_curve(theta, m2=0.5, extension=extension).numpy()
        right.plot(degrees, _with_gaps(curve), linestyle=style, linewidth=2.2, label=f'"{extension}": {words}')
    right.plot(degrees, theta.cos().numpy(), color="0.75", linewidth=1, label="cos θ")
    right.axvline(180 - math.degrees(0.5), color="0.6", linewidth=0.8, linestyle=":")
    right.annotate("θ + m = π", (180 - math.degrees(0.5), 0.9), fontsize=9, ha="right", color="0.4")
    right.set_title("The six extensions of an angular margin, m = 0.5")
    for axes in (left, right):
        axes.set_xlabel("angle θ between embedding and its class's weight, degrees")
        axes.set_ylabel("ψ(θ)")
        axes.set_xticks(range(0, 181, 30))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9, loc="lower left")
    return save(figure, path)


def negative_curve(theta: Tensor, own: float, **head: Unpack[LinearHead]) -> Tensor:
    """The logits of other classes at angles `theta` [N] to an embedding whose own class is at the angle `own`."""
    angles = torch.cat([torch.tensor([own], dtype=torch.float64), theta.double()])
    weight = torch.stack([angles.cos(), angles.sin()], dim=1)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    return margin_logits(x, weight, torch.zeros(1, dtype=torch.int64), **head)[0, 1:]


def one_against_all_curve(theta: Tensor, scale: float, margin: float, kind: BinaryKind, power: float) -> Tensor:
    """The loss of another class at each of the angles `theta` [N], one against all."""
    x = torch.stack([theta.cos(), theta.sin()], dim=1).double()
    weight = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    nobody = torch.full((len(theta),), -1)  # its own class is not among these
    return linear_margin_binary_cross_entropy(
        x, weight, nobody, scale=scale, margin=margin, kind=kind, power=power, reduction="none"
    )


# What losses do to the logit of another class; the embedding's own class is OWN away, its margin is 0.5.
OWN = math.radians(45)


def _numbers(*of_c: float) -> Tensor:
    return torch.tensor(of_c, dtype=torch.float64)


NEGATIVES: dict[str, LinearHead] = {
    "CurricularFace, t = 0 (the start): c²": {"m2": 0.5, "hard_coefficients": _numbers(1, 0, 0)},
    "CurricularFace, t = 0.5: c (t + c)": {"m2": 0.5, "hard_coefficients": _numbers(1, 0.5, 0)},
    "MV-Softmax, t = 0.2: (1 + t) c + t": {"m2": 0.5, "hard_coefficients": _numbers(0, 1.2, 0.2)},
    "inter-class filter, 0.4: 0": {"hard_threshold": _numbers(0.4)[0], "hard_coefficients": _numbers(0, 0, 0)},
    "inter-top-k, m' = 0.2: cos(θ − m')": {"hardest": 100_000, "hardest_margin": 0.2},
}
ONE_AGAINST_ALL: dict[str, tuple[float, BinaryKind, float]] = {
    'SphereFace2, "c": m = 0.2, t = 3': (0.2, "c", 3.0),
    'SphereFace2, "a": m = 0.2, t = 3': (0.2, "a", 3.0),
    "SphereFace2 without its curve: t = 1": (0.2, "c", 1.0),
    "UniFace: no margin for other classes": (0.4, "m", 1.0),
}


def draw_negatives(path: Path) -> Path:
    theta = torch.linspace(0, math.pi, 1001, dtype=torch.float64)
    degrees = torch.rad2deg(theta).numpy()
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 6.2), layout="constrained")
    left.plot(degrees, theta.cos().numpy(), color="0.5", linewidth=1.2, label="as it is: c = cos θ")
    for name, head in NEGATIVES.items():
        left.plot(degrees, _with_gaps(negative_curve(theta, OWN, **head).numpy()), label=name, linewidth=1.8)
    threshold = math.degrees(OWN + 0.5)
    left.axvline(threshold, color="0.6", linewidth=0.8, linestyle=":")
    left.annotate("the own class with its margin ", (threshold, -0.95), fontsize=9, ha="right", color="0.4")
    left.set_title("Another class's logit at scale 1; the own class is 45° away, m = 0.5")
    for name, (margin, kind, power) in ONE_AGAINST_ALL.items():
        right.plot(degrees, one_against_all_curve(theta, 32.0, margin, kind, power).numpy(), label=name, linewidth=1.8)
    right.set_title("One against all: another class's loss at scale 32, b = 0")
    for axes, quantity in ((left, "logit"), (right, "loss")):
        axes.set_xlabel("angle θ between embedding and the other class's weight, degrees")
        axes.set_ylabel(quantity)
        axes.set_xticks(range(0, 181, 30))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9, loc="upper right")
    return save(figure, path)


# Figure (d): the losses between two classes. Lengths |w1|, |w2| matter to softmax alone.
DECISIONS: dict[str, tuple[LinearMargin, str, tuple[float, float]]] = {
    "softmax": ({}, "|w1| = 1, |w2| = 1.4", (1.0, 1.4)),
    "normalised softmax": ({}, "no margin", (1.0, 1.0)),
    "SphereFace": ({"m1": 2.0, "extension": "monotonic"}, "m = 2", (1.0, 1.0)),
    "CosFace": ({"m3": 0.35}, "m = 0.35", (1.0, 1.0)),
    "ArcFace": ({"m2": 0.5, "extension": "linear"}, "m = 0.5", (1.0, 1.0)),
}


def draw_boundaries(path: Path) -> Path:
    """Where an embedding at angles θ1, θ2 to two classes counts as right for the one and for the other."""
    theta = torch.linspace(0, HALF_PI, 601, dtype=torch.float64)
    degrees = torch.rad2deg(theta).numpy()
    figure, panels = plt.subplots(1, len(DECISIONS), figsize=(4.1 * len(DECISIONS), 4.9), layout="constrained")
    for axes, (name, (margin, words, (first, second))) in zip(panels, DECISIONS.items()):
        plain, with_margin = theta.cos(), target_curve(theta, **margin)
        # Rows: θ2, columns: θ1. Positive where class 1 (class 2) wins in spite of its margin.
        one = (first * with_margin[None, :] - second * plain[:, None]).numpy()
        two = (second * with_margin[:, None] - first * plain[None, :]).numpy()
        between = (first * plain[None, :] - second * plain[:, None]).numpy()
        axes.contourf(degrees, degrees, one, levels=[0, np.inf], colors=["tab:blue"], alpha=0.35)
        axes.contourf(degrees, degrees, two, levels=[0, np.inf], colors=["tab:orange"], alpha=0.35)
        axes.contourf(degrees, degrees, np.maximum(one, two), levels=[-np.inf, 0], colors=["0.8"])
        axes.contour(degrees, degrees, between, levels=[0], colors="black", linestyles="dashed", linewidths=1.3)
        for field, colour in ((one, "tab:blue"), (two, "tab:orange")):
            axes.contour(degrees, degrees, field, levels=[0], colors=[colour], linewidths=1.3)
        axes.text(14, 72, "class 1", color="tab:blue", fontsize=12, fontweight="bold")
        axes.text(60, 12, "class 2", color="#b35900", fontsize=12, fontweight="bold")
        axes.set_title(f"{name}\n{words}", fontsize=11)
        axes.set(aspect="equal", xticks=range(0, 91, 30), yticks=range(0, 91, 30))
        axes.set_xlabel("θ1, degrees")
        axes.set_ylabel("θ2, degrees")
    return save(figure, path)
