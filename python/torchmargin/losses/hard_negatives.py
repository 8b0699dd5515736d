"""Losses that change the logits of other classes: where they are hard, or the hardest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Unpack

from torchmargin.losses.base import CommonOptions, MarginLoss, SharedOptions
from torchmargin.losses.numbers import Number, check_not_negative, check_radians, check_share

__all__ = ["CurricularFaceLoss", "InterTopKArcFaceLoss", "MVSoftmaxLoss"]


class _HardNegatives(MarginLoss):
    """Another class is hard where its cosine is above the row's own with its margin, cos(m1 theta + m2) - m3."""

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.interclass_filter is not None:
            raise ValueError(
                f"{type(self).__name__}: expected no interclass_filter, it has a rule of its own for hard negatives"
            )


class CurricularFaceLoss(_HardNegatives):
    """CurricularFace: Huang et al., CVPR 2020 (arXiv:2004.00288).

    target logit = scale cos(theta + margin); another class with a cosine c above cos(theta + margin) has the logit
    scale c (t + c) instead of scale c. ``t`` (a buffer, 0 at the start) is a running mean of the rows' own cosines:
    in training it moves by ``momentum`` before it is used, over the rows that are not ignored and are finite.

    ``process_group``: the mean is taken over the rows of all its ranks (data-parallel training). Under
    torchmargin.distributed.ClassParallel it is over all ranks' rows without one.
    """

    if TYPE_CHECKING:
        t: Tensor

    reads_angle = True
    margin = Number(check_radians)
    momentum = Number(check_share)
    _unsaved = MarginLoss._unsaved | {"m1", "m2", "m3"}

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 64.0,
        margin: float = 0.5,
        momentum: float = 0.01,
        process_group: dist.ProcessGroup | None = None,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, extension="linear", **common)
        with self._checked_together():
            self.margin = margin
            self.momentum = momentum
        self.process_group = process_group
        self.register_buffer("t", torch.zeros((), device=self.weight.device))

    def reset_state(self) -> None:
        if "t" in self._buffers:
            self.t.zero_()

    def advance(self, embeddings: Tensor, labels: Tensor, target_angle: Tensor | None = None) -> None:
        assert target_angle is not None  # reads_angle
        cosine = target_angle.double().cos()
        counted = (labels != self.ignore_index) & cosine.isfinite()
        sums = torch.stack([torch.where(counted, cosine, 0.0).sum(), counted.sum().double()])
        if self.process_group is not None:
            from torch.distributed import _functional_collectives as collectives

            sums = collectives.all_reduce(sums, "sum", self.process_group)
        mean = torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1.0), self.t.double())
        self.t.copy_(self.t.double().lerp(mean, self.number("momentum")))

    def sample_margins(
        self, embeddings: Tensor, labels: Tensor, target_angle: Tensor | None = None
    ) -> dict[str, Tensor]:
        return {"sample_m2": self.number("margin").expand(labels.shape[0]).clone()}

    def negatives(self, embeddings: Tensor, labels: Tensor, target_angle: Tensor | None = None) -> dict[str, Tensor]:
        t = self.t.double()
        return {"hard_coefficients": torch.stack([torch.ones_like(t), t, torch.zeros_like(t)])}

    def describe_margin(self) -> str:
        return f"{super().describe_margin()}, margin={self.margin:g}, momentum={self.momentum:g}"


class MVSoftmaxLoss(_HardNegatives):
    """MV-Softmax: Wang et al., AAAI 2020 (arXiv:1912.00833).

    Another class with a cosine c above the row's own with its margin has the logit scale ((1 + t) c + t) instead of
    scale c. ``kind`` "am": target logit = scale (cos(theta) - margin), and no margin where cos(theta) <= 0, though hard
    negatives are still those above cos(theta) - margin; "arc": scale cos(theta + margin) where cos(theta) > 0, for
    which the paper's margin is 0.5.
    """

    reads_angle = True
    margin = Number(check_radians)
    t = Number(check_not_negative)
    _unsaved = MarginLoss._unsaved | {"m1", "m2", "m3"}
    _options = {**MarginLoss._options, "kind": ("am", "arc")}

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 32.0,
        kind: Literal["am", "arc"] = "am",
        margin: float = 0.35,
        t: float = 0.2,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, extension="easy", **common)
        with self._checked_together():
            self.kind = kind
            self.margin = margin
            self.t = t

    def sample_margins(
        self, embeddings: Tensor, labels: Tensor, target_angle: Tensor | None = None
    ) -> dict[str, Tensor]:
        assert target_angle is not None  # reads_angle
        margins = self.number("margin").expand(labels.shape[0]).clone()
        if self.kind == "arc":
            return {"sample_m2": margins}
        acute = torch.where(target_angle.isnan(), target_angle, (target_angle < math.pi / 2).to(target_angle.dtype))
        return {"sample_m3": margins, "sample_margin_weight": acute}

    def negatives(self, embeddings: Tensor, labels: Tensor, target_angle: Tensor | None = None) -> dict[str, Tensor]:
        t = self.number("t")
        return {"hard_coefficients": torch.stack([torch.zeros_like(t), 1 + t, t])}

    def describe_margin(self) -> str:
        return f"{super().describe_margin()}, kind={self.kind!r}, margin={self.margin:g}, t={self.t:g}"


class InterTopKArcFaceLoss(MarginLoss):
    """ArcFace with inter-top-k and sub-centers: Zhao et al., ICASSP 2022 (arXiv:2110.05042), speaker verification.

    target logit = scale cos(theta + margin), past pi scale (cos(theta) - (1 - cos(margin))); the ``hardest`` other
    classes of each row have the logit scale cos(max(theta_j - hardest_margin, 0)). Angles are to the nearest of
    ``sub_centers`` centers. Both margins are in radians.
    """

    margin = Number(check_radians)
    hardest_margin = Number(check_radians)
    _floats = MarginLoss._floats | {"hardest_margin"}
    _unsaved = MarginLoss._unsaved | {"m1", "m2", "m3"}
    _options = {**MarginLoss._options, "hardest": int}

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 32.0,
        margin: float = 0.2,
        sub_centers: int = 3,
        hardest: int = 5,
        hardest_margin: float = 0.06,
        **common: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            in_features, num_classes, scale=scale, extension="continuous", sub_centers=sub_centers, **common
        )
        with self._checked_together():
            self.margin = margin
            self.hardest = hardest
            self.hardest_margin = hardest_margin

    def sample_margins(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"sample_m2": self.number("margin").expand(labels.shape[0]).clone()}

    def _margin(self) -> dict[str, Any]:
        hardest = self.__dict__.get("hardest", 0)  # the constructor sets them later
        margin = self._numbers.get("hardest_margin", 0.0) if hardest else 0.0
        return {**super()._margin(), "hardest": hardest, "hardest_margin": margin}

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.interclass_filter is not None:
            raise ValueError(f"{type(self).__name__}: expected no interclass_filter beside the hardest classes' margin")

    def describe_margin(self) -> str:
        return (
            f"{super().describe_margin()}, margin={self.margin:g}, hardest={self.hardest}, "
            f"hardest_margin={self.hardest_margin:g}"
        )
