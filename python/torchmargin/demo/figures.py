"""The demo's picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

__all__ = ["Plane", "draw_planes"]

Plane = tuple[str, Tensor, Tensor, Tensor]  # title, embeddings [N, 2], labels [N], class weights [C, 2]


def draw_planes(planes: list[Plane], path: Path) -> None:
    """Embeddings in the plane, each class in its colour, with the direction of its weight."""
    figure, row = plt.subplots(1, len(planes), figsize=(6.5 * len(planes), 7.2), squeeze=False, layout="constrained")
    colours = plt.get_cmap("tab10").colors
    for axes, (title, embeddings, labels, weights) in zip(row[0], planes):
        reach = torch.quantile(embeddings.norm(dim=1), 0.99).item()
        for digit, weight in enumerate(torch.nn.functional.normalize(weights, dim=1)):
            points = embeddings[labels == digit]
            axes.scatter(points[:, 0], points[:, 1], s=4, color=colours[digit], alpha=0.5, linewidths=0)
            axes.plot([0, 1.08 * reach * weight[0]], [0, 1.08 * reach * weight[1]], color=colours[digit], linewidth=1)
            axes.annotate(
                str(digit), (1.16 * reach * weight[0], 1.16 * reach * weight[1]),
                color=colours[digit], fontsize=14, fontweight="bold", ha="center", va="center",
            )  # fmt: skip
        axes.set(title=title, xlim=(-1.3 * reach, 1.3 * reach), ylim=(-1.3 * reach, 1.3 * reach), aspect="equal")
        axes.set_xlabel("first embedding component")
        axes.set_ylabel("second embedding component")
    figure.suptitle("Held-out digits in a 2-D embedding; lines are the class weights' directions")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
