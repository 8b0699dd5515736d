"""What a type checker makes of a user's code: read by `make lint` (mypy, strict), never run."""

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import torchmargin
from torchmargin import MarginStatistics
from torchmargin.options import Extension, MarginGradient, Reduction


def calls(embeddings: Tensor, labels: Tensor, either: bool) -> None:
    loss = torchmargin.ArcFaceLoss(512, 1000, scale=64.0, margin=0.5, class_weight=torch.ones(1000), reduction="sum")
    assert_type(loss(embeddings, labels), Tensor)
    assert_type(loss(embeddings, labels, return_statistics=False), Tensor)
    assert_type(loss(embeddings, labels, return_statistics=True), tuple[Tensor, MarginStatistics])
    assert_type(loss(embeddings, labels, return_statistics=either), Tensor | tuple[Tensor, MarginStatistics])
    value, statistics = loss(embeddings, labels, return_statistics=True)
    assert_type(value, Tensor)
    assert_type(statistics.accuracy, Tensor)
    assert_type(loss.logits(embeddings), Tensor)
    assert_type(loss.scale, float)
    assert_type(loss.margin, float | Tensor)
    loss.margin = 0.3
    loss.margin = torch.full((1000,), 0.3)
    loss.class_weight = None
    assert_type(loss.resize_classes(10, keep=torch.arange(3)), None)


def strings(extension: Extension, gradient: MarginGradient, reduction: Reduction) -> None:
    torchmargin.ArcFaceLoss(512, 10, extension=extension, margin_gradient=gradient, reduction=reduction)
    torchmargin.ArcFaceLoss(512, 10, extension="linear", margin_gradient="straight_through", reduction="none")
    torchmargin.ArcFaceLoss(512, 10, extension="circular")  # type: ignore[arg-type]
    torchmargin.ArcFaceLoss(512, 10, reduction="average")  # type: ignore[arg-type]
    torchmargin.ArcFaceLoss(512, 10, magin=0.5)  # type: ignore[call-arg]
    torchmargin.SphereFace2Loss(512, 10, kind="b")  # type: ignore[arg-type]


def functions(x: Tensor, w: Tensor, y: Tensor) -> None:
    functional = torchmargin.functional
    assert_type(functional.linear_margin_cross_entropy(x, w, y, m2=0.5, class_weight=w[:, 0]), Tensor)
    assert_type(functional.linear_margin_lse(x, w, y).target_angle, Tensor)
    functional.linear_margin_cross_entropy(x, w, y, reduction="average")  # type: ignore[arg-type]
    functional.margin_transform(x, extension="circular")  # type: ignore[arg-type]


class MyLoss(torchmargin.MarginLoss):
    """A loss of a user's own is typed as ours are."""

    def sample_margins(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"sample_m2": embeddings.norm(dim=1)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = MyLoss(512, 10, scale=64.0)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.loss(embeddings, labels)
