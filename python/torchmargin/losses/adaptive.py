"""Margins that differ from row to row: by the length of the embedding, or by chance."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from torchmargin.losses.base import CommonOptions, MarginLoss
from torchmargin.losses.numbers import Number, check_finite, check_radians, check_share

__all__ = ["AdaFaceLoss", "ElasticFaceLoss", "MagFaceLoss"]


class _ByLength(MarginLoss):
    """A loss whose margin is read from the length of an embedding, before it is normalised."""

    def _lengths(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings' lengths [B] in the dtype of margins, and which rows count [B]: those that are finite and not
        ignored. The length of a row that is not finite is NaN, that of an ignored one some finite number."""
        lengths, counted = torch.ops.torchmargin._embedding_lengths(
            embeddings, labels, self.ignore_index, self.acc_dtype
        )
        self._warn_of_unit_rows(lengths, counted)
        return lengths, counted

    @torch.no_grad()
    def _warn_of_unit_rows(self, lengths: Tensor, counted: Tensor) -> None:
        """Once, at the first batch of training: afterwards no batch waits for the device."""
        if not self.training or self._seen_lengths or torch.compiler.is_compiling() or lengths.is_meta:
            return
        if lengths.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._seen_lengths = True
        of_length_one = ((lengths - 1).abs() < 1e-2) | ~counted
        if counted.sum() > 1 and of_length_one.all():
            warnings.warn(
                f"{type(self).__name__}: the embeddings are already of length 1; it reads the quality of an image from "
                f"the length, so give it the network's output before any normalisation",
                stacklevel=6,
            )

    _seen_lengths = False


class AdaFaceLoss(_ByLength):
    """AdaFace: Kim et al., CVPR 2022 (arXiv:2204.00964).

    target logit = scale (cos(theta - margin q) - margin (1 + q)), where q in [-1, 1] is h times the
    embedding's length, standardised by the running mean and deviation of the batches' lengths (two buffers;
    ``momentum`` is the weight of the newest batch). theta - margin q is held within [0, pi]. No gradient
    flows through the length. A row that is not finite counts for no statistic.
    """

    if TYPE_CHECKING:
        length_mean: Tensor
        length_std: Tensor

    margin = Number(check_radians)
    h = Number()
    momentum = Number(check_share)
    _unsaved = MarginLoss._unsaved | {"m1", "m2", "m3"}

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
        self.margin = margin
        self.h = h
        self.momentum = momentum
        self.register_buffer("length_mean", torch.tensor(20.0, device=self.weight.device))
        self.register_buffer("length_std", torch.tensor(100.0, device=self.weight.device))

    def reset_state(self) -> None:
        if "length_std" in self._buffers:
            self.length_mean.fill_(20.0)
            self.length_std.fill_(100.0)

    # The batch of the forward that runs, and its lengths once a hook has asked for them; None between forwards.
    _batch: tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]] | None = None

    def _lengths(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As above, once for both hooks of a forward. torch.compile's graphs take equal ops once by themselves."""
        batch = None if torch.compiler.is_compiling() else self._batch
        if batch is None or batch[0] is not embeddings or batch[1] is not labels:
            return super()._lengths(embeddings, labels)
        if not batch[2]:
            batch[2].append(super()._lengths(embeddings, labels))
        return batch[2][0]

    def _advance_once(
        self, embeddings: Tensor, labels: Tensor, angle: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        if torch.compiler.is_compiling():
            return super()._advance_once(embeddings, labels, angle)
        self._batch = embeddings, labels, []
        try:
            return super()._advance_once(embeddings, labels, angle)
        except BaseException:
            self._batch = None
            raise

    def _settle(self, before: dict[str, Tensor], fresh: Tensor | None) -> None:
        if not torch.compiler.is_compiling():
            self._batch = None
        super()._settle(before, fresh)

    def advance(self, embeddings: Tensor, labels: Tensor) -> None:
        """Mean and unbiased deviation of the rows that count; a batch with fewer than two changes nothing."""
        mean, std = torch.ops.torchmargin._adaface_statistics(
            *self._lengths(embeddings, labels), self.length_mean, self.length_std, self.number("momentum")
        )
        self.length_mean.copy_(mean)
        self.length_std.copy_(std)

    @torch.no_grad()
    def sample_margins(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        lengths, _ = self._lengths(embeddings, labels)
        m2, m3 = torch.ops.torchmargin._adaface_margins(
            lengths, self.length_mean, self.length_std, self.number("margin"), self.number("h")
        )
        return {"sample_m2": m2, "sample_m3": m3}

    def describe_margin(self) -> str:
        return f"{super().describe_margin()}, margin={self.margin:g}, h={self.h:g}"


class MagFaceLoss(_ByLength):
    """MagFace: Meng et al., CVPR 2021 (arXiv:2103.06627).

    target logit = scale cos(theta + m(a)) for embeddings of length a, held within [a_min, a_max]; m rises
    linearly from m_min to m_max. ``regularizer`` times g(a) = 1/a + a/a_max^2 is added to each row's loss.
    The gradient flows through the margin to the length.
    """

    a_min = Number()
    a_max = Number()
    m_min = Number(check_radians)
    m_max = Number(check_radians)
    regularizer = Number()
    _unsaved = MarginLoss._unsaved | {"m1", "m2", "m3"}

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
        with self._checked_together():
            self.a_min, self.a_max = a_min, a_max
            self.m_min, self.m_max = m_min, m_max
            self.regularizer = regularizer

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if "a_max" not in self._numbers:
            return  # the constructor sets them later
        a_min, a_max = (float(self._numbers[name]) for name in ("a_min", "a_max"))
        if not 0 < a_min < a_max:
            raise ValueError(f"expected 0 < a_min < a_max, but got {a_min} and {a_max}")

    def sample_margins(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        lengths, _ = self._lengths(embeddings, labels)
        numbers = (self.number(name).clone() for name in ("a_min", "a_max", "m_min", "m_max"))  # autograd keeps them
        return {"sample_m2": torch.ops.torchmargin._magface_margins(lengths, *numbers)}

    def row_penalty(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        lengths, _ = self._lengths(embeddings, labels)
        a_min, a_max, regularizer = (self.number(name).clone() for name in ("a_min", "a_max", "regularizer"))
        penalty: Tensor = torch.ops.torchmargin._magface_penalty(lengths, a_min, a_max)
        return regularizer * penalty

    def describe_margin(self) -> str:
        return f"{super().describe_margin()}, a=({self.a_min:g}, {self.a_max:g}), m=({self.m_min:g}, {self.m_max:g})"


def _check_deviation(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"expected {name} not to be negative, but got {value}")
    check_finite(name, value)


class ElasticFaceLoss(MarginLoss):
    """ElasticFace: Boutros et al., CVPR workshops 2022 (arXiv:2109.09416).

    Each row's margin is drawn from a normal distribution in training and is its mean otherwise; ``kind``
    says where it stands: "arc": target logit = scale cos(theta + margin_i), "cos": scale (cos(theta) - margin_i).
    The paper's means are 0.5 and 0.35.
    """

    margin = Number(check_radians)
    deviation = Number(_check_deviation)
    _unsaved = MarginLoss._unsaved | {"m1", "m2", "m3"}
    _options = {**MarginLoss._options, "kind": ("arc", "cos")}

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 64.0,
        kind: Literal["arc", "cos"] = "arc",
        margin: float = 0.5,
        deviation: float = 0.0125,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, **common)
        self.kind = kind
        self.margin = margin
        self.deviation = deviation

    def sample_margins(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        margins = self.number("margin").expand(labels.shape[0]).clone()
        if self.training:
            noise = torch.randn(labels.shape[0], dtype=self.acc_dtype, device=labels.device)
            margins = margins + (self.number("deviation") * noise).double()
        return {"sample_m2" if self.kind == "arc" else "sample_m3": margins}

    def describe_margin(self) -> str:
        return f"{super().describe_margin()}, kind={self.kind!r}, margin={self.margin:g}, deviation={self.deviation:g}"
