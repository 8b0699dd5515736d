"""Pictures of trained embeddings: the plane, the unit sphere, and A-Softmax for growing margins."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

__all__ = ["Embedding", "draw_asoftmax", "draw_planes", "draw_spheres", "plt", "save"]

COLOURS = matplotlib.color_sequences["tab10"]


class Embedding(NamedTuple):
    """What one loss made of the held-out images."""

    title: str
    parameters: str
    accuracy: float
    points: Tensor  # [N, 2 or 3]
    labels: Tensor  # [N]
    weights: Tensor  # [C, K, 2 or 3]: the centers of each class


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, facecolor="white")
    plt.close(figure)
    return path


def _grid(count: int, size: float, **axes: Any) -> tuple[Figure, list[Any]]:
    """A figure with `count` panels in rows of four; the panels may be Axes3D, which have no types."""
    columns = min(count, 4)
    rows = -(-count // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(size * columns, (size + 0.5) * rows), squeeze=False, layout="constrained", **axes
    )
    for panel in panels.flat[count:]:
        panel.set_axis_off()
    return figure, list(panels.flat)


def _heading(axes: Axes, embedding: Embedding, **place: Any) -> None:
    axes.set_title(
        f"{embedding.title}\n{textwrap.fill(embedding.parameters, 46)}\naccuracy {embedding.accuracy:.3f}",
        fontsize=10,
        **place,
    )


def _plane(axes: Axes, embedding: Embedding, names: list[str]) -> None:
    reach = torch.quantile(embedding.points.norm(dim=1), 0.99).item()
    for index, weights in enumerate(torch.nn.functional.normalize(embedding.weights, dim=2).tolist()):
        points = embedding.points[embedding.labels == index]
        colour = COLOURS[index]
        axes.scatter(points[:, 0], points[:, 1], s=5, color=colour, alpha=0.5, linewidths=0)
        for weight in weights:
            axes.plot([0, 1.08 * reach * weight[0]], [0, 1.08 * reach * weight[1]], color=colour, linewidth=1)
            axes.annotate(
                names[index], (1.2 * reach * weight[0], 1.2 * reach * weight[1]),
                color=colour, fontsize=12, fontweight="bold", ha="center", va="center",
            )  # fmt: skip
    limits = (-1.35 * reach, 1.35 * reach)
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.tick_params(labelsize=8)
    axes.set_xlabel("first component", fontsize=9)
    axes.set_ylabel("second component", fontsize=9)


def draw_planes(embeddings: list[Embedding], names: list[str], path: Path) -> Path:
    """Embeddings in the plane, each class in its colour, with the direction of its weight."""
    figure, panels = _grid(len(embeddings), 4.4)
    for axes, embedding in zip(panels, embeddings):
        _plane(axes, embedding, names)
        _heading(axes, embedding)
    return save(figure, path)


def draw_spheres(embeddings: list[Embedding], names: list[str], path: Path) -> Path:
    """Three-dimensional embeddings brought to the unit sphere; the lines are the weights' directions."""
    figure, panels = _grid(len(embeddings), 4.4, subplot_kw={"projection": "3d"})
    turn = torch.linspace(0, 2 * math.pi, 41)
    tilt = torch.linspace(0, math.pi, 21)
    sphere = [
        (torch.outer(turn.cos(), tilt.sin())).numpy(),
        (torch.outer(turn.sin(), tilt.sin())).numpy(),
        (torch.outer(torch.ones_like(turn), tilt.cos())).numpy(),
    ]
    for axes, embedding in zip(panels, embeddings):
        axes.plot_wireframe(*sphere, rstride=4, cstride=5, color="0.88", linewidth=0.5, zorder=0)
        points = torch.nn.functional.normalize(embedding.points, dim=1)
        for index, weights in enumerate(torch.nn.functional.normalize(embedding.weights, dim=2).tolist()):
            x, y, z = points[embedding.labels == index].T.tolist()
            axes.scatter(x, y, z, s=6, color=COLOURS[index], alpha=0.8, linewidths=0, depthshade=False)
            for weight in weights:
                axes.plot(*([0, 1.1 * part] for part in weight), color=COLOURS[index], linewidth=1.2)
                axes.text(*(1.25 * part for part in weight), names[index], color=COLOURS[index], fontweight="bold")
        axes.set_box_aspect((1, 1, 1), zoom=1.25)
        axes.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
        axes.set_axis_off()
        axes.view_init(elev=20, azim=35)
        _heading(axes, embedding, y=1.07)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 0.97), h_pad=0.15)
    return save(figure, path)


def _angles(embedding: Embedding) -> tuple[Tensor, Tensor]:
    """Degrees from each embedding to its own class's weight and to the nearest other one."""
    unit = torch.nn.functional.normalize
    weights = unit(embedding.weights.double(), dim=2)
    cosine = torch.einsum("nd,ckd->nck", unit(embedding.points.double(), dim=1), weights).amax(2)
    degrees = torch.rad2deg(cosine.clamp(-1, 1).arccos())
    own = torch.nn.functional.one_hot(embedding.labels, len(embedding.weights)).bool()
    return degrees[own], degrees.masked_fill(own, math.inf).amin(1)


def draw_asoftmax(embeddings: list[Embedding], names: list[str], path: Path) -> Path:
    """A-Softmax for several m: the plane, and how far embeddings are from their class and from the next."""
    count = len(embeddings)
    figure, panels = plt.subplots(
        2, count, figsize=(4.4 * count, 8.2), squeeze=False, layout="constrained", height_ratios=[1.6, 1]
    )
    for (axes, histogram), embedding in zip(panels.T, embeddings):
        _plane(axes, embedding, names)
        _heading(axes, embedding)
        own, other = _angles(embedding)
        bins = list(range(0, 61))
        histogram.hist(own.tolist(), bins, color="tab:green", alpha=0.7, label=f"own class, median {own.median():.1f}°")
        histogram.hist(
            other.tolist(), bins, color="tab:red", alpha=0.5, label=f"next class, median {other.median():.1f}°"
        )
        histogram.set_xlabel("angle to the class's weight, degrees", fontsize=9)
        histogram.set_ylabel("held-out images", fontsize=9)
        histogram.legend(fontsize=8)
    return save(figure, path)
