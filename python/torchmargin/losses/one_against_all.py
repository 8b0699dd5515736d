"""Losses with a logistic loss for each class: one against all others, without a sum over the classes' exponentials."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from torchmargin.losses.base import CommonOptions, MarginLoss, stays_in_python
from torchmargin.losses.numbers import Number, check_not_negative, check_radians, check_share
from torchmargin.options import BinaryKind

__all__ = ["SphereFace2Loss", "UniFaceLoss"]


class OneAgainstAll(MarginLoss):
    """What calls linear_margin_binary_cross_entropy; its one bias is a parameter, 0-dim."""

    margin = Number(check_not_negative)
    _unsaved = MarginLoss._unsaved | {"m1", "m2", "m3"}
    _floats = frozenset({"scale", "margin", "t", "positive_weight"})

    def __init__(self, in_features: int, num_classes: int, *, scale: float, **common: Unpack[CommonOptions]) -> None:
        """A loss sets what it has of its own, margin and all, together behind this: until then it is a softmax."""
        super().__init__(in_features, num_classes, scale=scale, **common)
        bias = torch.full((), self._first_bias(), device=self.weight.device, dtype=self.weight.dtype)
        self.bias = nn.Parameter(bias)

    def _form(self) -> dict[str, Any]:
        raise NotImplementedError

    @stays_in_python
    def logits(self, embeddings: Tensor) -> Tensor:
        """scale g(c) + bias [B, C] without a margin: what each class's own logistic loss reads."""
        return super().logits(embeddings)

    def _logits_among(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype | None
    ) -> Tensor:
        cosines: Tensor = torch.ops.torchmargin.margin_logits(
            rows, weight, sub_centers=self.sub_centers, compute_dtype=compute_dtype
        )
        power = self._form().get("power", 1.0)
        curve = cosines if power == 1 else 2 * ((cosines + 1) / 2).clamp(min=0) ** power - 1
        return self._numbers["scale"] * curve + (0 if bias is None else bias.to(curve.dtype))

    def _op(self, return_statistics: bool) -> Any:
        ops = torch.ops.torchmargin
        return (
            ops._linear_margin_binary_cross_entropy_statistics
            if return_statistics
            else ops.linear_margin_binary_cross_entropy
        )

    def _margin(self) -> dict[str, Any]:
        if "margin" not in self._numbers:
            return super()._margin()
        numbers = {name: self._numbers[name] for name in ("scale", "margin")}
        return {**numbers, "sub_centers": self.sub_centers, **self._form()}

    def _reduction(self) -> dict[str, Any]:
        reduction = super()._reduction()
        if "margin" in self._numbers:
            del reduction["label_smoothing"]
            reduction["require_target"] = True
        return reduction

    def _check_parameters(self) -> None:
        if "margin" not in self._numbers:
            super()._check_parameters()
            return
        name = type(self).__name__
        if self._numbers["label_smoothing"] != 0:
            raise ValueError(f"{name}: expected no label_smoothing, it is a mean over the logits of a softmax")
        if self.interclass_filter is not None:
            raise ValueError(f"{name}: expected no interclass_filter, classes are not compared with each other")
        if not (self.normalize_input and self.normalize_weight):
            raise ValueError(f"{name}: expected normalize_input and normalize_weight, its curve is of cosines")
        nothing = torch.empty(0, 1, device="meta")
        labels = torch.empty(0, dtype=torch.int64, device="meta")
        self._op(False)(nothing, nothing.new_empty(self.sub_centers, 1), labels, **self._margin(), **self._reduction())


class SphereFace2Loss(OneAgainstAll):
    """SphereFace2: Wen et al., ICLR 2022 (arXiv:2108.01513).

    For each class a logistic loss of scale (g(cos(theta)) - margin) + b for the own class and scale (g(cos(theta_j)) +
    margin) + b for another, with g(c) = 2 ((c + 1) / 2)^t - 1 and b learned, 0 at the start. ``positive_weight`` (the
    paper's lambda) weighs the own class, 1 - positive_weight the others. ``kind`` "c" has the margin at g; "a" at the
    angles (radians), as wespeaker and OpenSphere have it too.
    """

    t = Number()
    positive_weight = Number(check_share)
    _options = {**MarginLoss._options, "kind": ("c", "a", "m")}

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 32.0,
        kind: BinaryKind = "c",
        margin: float = 0.2,
        t: float = 3.0,
        positive_weight: float = 0.7,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, **common)
        with self._checked_together():
            self.kind = kind
            self.margin = margin
            self.t = t
            self.positive_weight = positive_weight

    def _form(self) -> dict[str, Any]:
        positive_weight = self._numbers["positive_weight"]
        return {
            "kind": self.kind,
            "power": self._numbers["t"],
            "positive_weight": positive_weight,
            "negative_weight": 1.0 - positive_weight,
        }

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.__dict__.get("kind") == "a":
            check_radians("margin", float(self._numbers["margin"]))

    def describe_margin(self) -> str:
        return (
            f"scale={self.scale:g}, kind={self.kind!r}, margin={self.margin:g}, t={self.t:g}, "
            f"positive_weight={self.positive_weight:g}"
        )


class UniFaceLoss(OneAgainstAll):
    """UniFace's unified cross-entropy: Zhou et al., ICCV 2023.

    For each class a logistic loss of scale (cos(theta) - margin) + b for the own class and scale cos(theta_j) + b for
    another; b is learned and starts at -ln(10 C). (The paper's bias is -b.)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 64.0,
        margin: float = 0.4,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, **common)
        self.margin = margin

    def _first_bias(self) -> float:
        return -math.log(10 * self.num_classes)

    def _form(self) -> dict[str, Any]:
        return {"kind": "m"}

    def describe_margin(self) -> str:
        return f"scale={self.scale:g}, margin={self.margin:g}"
