"""Margins that differ from row to row: by the length of the embedding, or by chance."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from torchmargin.losses.base import CommonOptions, MarginLoss, MarginStatistics, check_radians

__all__ = ["AdaFaceLoss", "ElasticFaceLoss", "MagFaceLoss"]


def _lengths(loss: MarginLoss, embeddings: Tensor, labels: Tensor, ignored: float) -> tuple[Tensor, Tensor]:
    """Which rows count [B], and the embeddings' lengths [B] in the dtype of margins.

    An ignored row may hold anything: it is replaced before the arithmetic, so that no NaN reaches a gradient.
    """
    valid = labels != loss.ignore_index
    rows = torch.where(valid[:, None], embeddings, ignored)
    return valid, torch.linalg.vector_norm(rows, dim=1, dtype=loss.acc_dtype)


class AdaFaceLoss(MarginLoss):
    """AdaFace: Kim et al., CVPR 2022 (arXiv:2204.00964).

    target logit = scale (cos(theta - margin q) - margin (1 + q)), where q in [-1, 1] is h times the
    embedding's length, standardised by the running mean and deviation of the batches' lengths (two buffers;
    ``momentum`` is the weight of the newest batch). theta - margin q is held within [0, pi]. No gradient
    flows through the length.
    """

    length_mean: Tensor
    length_std: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 64.0,
        margin: float = 0.4,
        h: float = 0.333,
        momentum: float = 0.01,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, extension="clip", **common)
        self.margin = check_radians("margin", margin)
        self.h = h
        self.momentum = momentum
        self.register_buffer("length_mean", torch.tensor(20.0, device=self.weight.device))
        self.register_buffer("length_std", torch.tensor(100.0, device=self.weight.device))

    @torch.no_grad()
    def sample_margins(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        valid, lengths = _lengths(self, embeddings, labels, ignored=1.0)
        lengths = lengths.clamp(0.001, 100.0)
        if self.training:
            self._move_statistics(valid, lengths)
        quality = ((lengths - self.length_mean) / (self.length_std + 1e-3) * self.h).clamp(-1, 1).to(lengths.dtype)
        return {"sample_m2": -self.margin * quality, "sample_m3": self.margin * (1 + quality)}

    def _move_statistics(self, valid: Tensor, lengths: Tensor) -> None:
        """Mean and unbiased deviation of the rows that count; a batch with fewer than two changes nothing."""
        count = valid.sum()
        mean = torch.where(valid, lengths, 0.0).sum() / count.clamp(min=1)
        square = torch.where(valid, (lengths - mean).square(), 0.0).sum() / (count - 1).clamp(min=1)
        weight = (count > 1).to(self.length_mean) * self.momentum
        self.length_mean.lerp_(mean.to(self.length_mean), weight)
        self.length_std.lerp_(square.sqrt().to(self.length_std), weight)

    def describe_margin(self) -> str:
        return f"{super().describe_margin()}, margin={self.margin:g}, h={self.h:g}"


class MagFaceLoss(MarginLoss):
    """MagFace: Meng et al., CVPR 2021 (arXiv:2103.06627).

    target logit = scale cos(theta + m(a)) for embeddings of length a, held within [a_min, a_max]; m rises
    linearly from m_min to m_max. ``regularizer`` times g(a) = 1/a + a/a_max^2 is added to each row's loss.
    The gradient flows through the margin to the length.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 64.0,
        a_min: float = 10.0,
        a_max: float = 110.0,
        m_min: float = 0.45,
        m_max: float = 0.8,
        regularizer: float = 35.0,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, extension="linear", **common)
        if not 0 < a_min < a_max:
            raise ValueError(f"expected 0 < a_min < a_max, but got {a_min} and {a_max}")
        self.a_min, self.a_max = a_min, a_max
        self.m_min, self.m_max = check_radians("m_min", m_min), check_radians("m_max", m_max)
        self.regularizer = regularizer

    def sample_margins(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        _, lengths = _lengths(self, embeddings, labels, ignored=self.a_min)
        lengths = lengths.clamp(self.a_min, self.a_max)
        slope = (self.m_max - self.m_min) / (self.a_max - self.a_min)
        return {"sample_m2": self.m_min + slope * (lengths - self.a_min)}

    def forward(
        self, embeddings: Tensor, labels: Tensor, return_statistics: bool = False
    ) -> Tensor | tuple[Tensor, MarginStatistics]:
        result = super().forward(embeddings, labels, return_statistics)
        loss, statistics = result if return_statistics else (result, None)
        valid, lengths = _lengths(self, embeddings, labels, ignored=self.a_min)
        lengths = lengths.clamp(self.a_min, self.a_max)
        penalty = torch.where(valid, self.regularizer * (1 / lengths + lengths / self.a_max**2), 0.0)
        if self.reduction != "none":
            penalty = penalty.sum()
        if self.reduction == "mean":
            penalty = penalty / valid.sum()
        loss = loss + penalty
        return (loss, statistics) if return_statistics else loss

    def describe_margin(self) -> str:
        return f"{super().describe_margin()}, a=({self.a_min:g}, {self.a_max:g}), m=({self.m_min:g}, {self.m_max:g})"


class ElasticFaceLoss(MarginLoss):
    """ElasticFace: Boutros et al., CVPR workshops 2022 (arXiv:2109.09416).

    Each row's margin is drawn from a normal distribution in training and is its mean otherwise; ``kind``
    says where it stands: "arc": target logit = scale cos(theta + margin_i), "cos": scale (cos(theta) - margin_i).
    The paper's means are 0.5 and 0.35.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 64.0,
        kind: str = "arc",
        margin: float = 0.5,
        deviation: float = 0.0125,
        **common: Unpack[CommonOptions],
    ) -> None:
        if kind not in ("arc", "cos"):
            raise ValueError(f"expected kind to be 'arc' or 'cos', but got {kind!r}")
        if not deviation >= 0:
            raise ValueError(f"expected deviation not to be negative, but got {deviation}")
        check_radians("margin", margin)
        super().__init__(in_features, num_classes, scale=scale, **{"m2" if kind == "arc" else "m3": margin}, **common)
        self.kind = kind
        self.deviation = deviation

    def sample_margins(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if not self.training:
            return {}
        noise = self.deviation * torch.randn(len(labels), dtype=self.acc_dtype, device=labels.device)
        return {"sample_m2" if self.kind == "arc" else "sample_m3": noise}

    def describe_margin(self) -> str:
        return f"{super().describe_margin()}, deviation={self.deviation:g}"
