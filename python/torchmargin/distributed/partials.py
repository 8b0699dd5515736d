"""What classes find for rows, block by block and rank by rank, and what the rank that owns a row makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchmargin import _extension  # noqa: F401  (registers the ops)
from torchmargin.losses.base import MarginLoss
from torchmargin.losses.one_against_all import OneAgainstAll

__all__ = ["AgainstAll", "AmongAll", "Partials", "partials_of", "stacked"]


class Partials(NamedTuple):
    """Of [B] rows, float64 each; the three in the middle have no gradients and are only for statistics."""

    others: Tensor  # log-sum-exp of the other classes, or one against all the sum of their losses
    target_logit: Tensor
    logit_sum: Tensor
    target_angle: Tensor
    max_other_logit: Tensor
    plain_target_logit: Tensor
    hardest_logit: Tensor  # [B, k]
    hardest_class: Tensor  # [B, k] int64, of the classes of all ranks; -1: there is none


class AmongAll:
    """The partials of a cross-entropy among all classes."""

    def __init__(self, loss: MarginLoss) -> None:
        self.loss = loss

    @property
    def op(self) -> Any:
        """What finds them. NB: not kept, for an op cannot be pickled and a head can."""
        return torch.ops.torchmargin._linear_margin_partials

    def sent(self, smoothed: bool, with_statistics: bool) -> dict[str, Any]:
        """What the op is asked for."""
        return {"with_logit_sum": smoothed, "with_plain_logit": with_statistics}

    @property
    def takes_correction(self) -> bool:
        """Can the logits of drawn classes be raised?"""
        return not self.loss._margin().get("hardest", 0)

    def arguments(self) -> dict[str, Any]:
        """The op's, beside tensors."""
        arguments = self.loss._margin()
        arguments.pop("hardest_margin", None)
        return arguments

    def merge(self, shards: Partials) -> Partials:
        """Of shards [S, B] one [B]."""
        others, hardest_logit, hardest_class = shards.others, shards.hardest_logit, shards.hardest_class
        if hardest_logit.shape[-1] > 0:
            others, hardest_logit, hardest_class = torch.ops.torchmargin._merge_hardest(
                others, hardest_logit, hardest_class
            )
        else:
            others, hardest_logit, hardest_class = self._merged_others(others), hardest_logit[0], hardest_class[0]
        return Partials(
            others,
            shards.target_logit.sum(0),
            shards.logit_sum.sum(0),
            shards.target_angle.sum(0),
            shards.max_other_logit.amax(0),
            shards.plain_target_logit.sum(0),
            hardest_logit,
            hardest_class,
        )

    def _merged_others(self, others: Tensor) -> Tensor:
        merged: Tensor = torch.ops.torchmargin._merge_lse(others)
        return merged

    def losses(self, found: Partials, labels: Tensor, num_classes: int) -> Tensor:
        """The loss of each row, [B] float64."""
        loss, others, logit_sum = self.loss, found.others, found.logit_sum
        if found.hardest_logit.shape[1] > 0:
            margin = loss._margin()
            others, logit_sum = torch.ops.torchmargin._with_hardest(
                others, logit_sum, found.hardest_logit, margin["scale"], margin["hardest_margin"]
            )
        mean_logit = logit_sum / num_classes if loss.label_smoothing > 0 else None
        losses: Tensor = torch.ops.torchmargin._margin_loss(
            others, found.target_logit, mean_logit, labels, loss.label_smoothing, loss.ignore_index, 0, True
        )
        return losses


class AgainstAll(AmongAll):
    """The partials of a logistic loss for each class."""

    @property
    def op(self) -> Any:
        return torch.ops.torchmargin._linear_margin_binary_partials

    def sent(self, smoothed: bool, with_statistics: bool) -> dict[str, Any]:
        return {}

    @property
    def takes_correction(self) -> bool:
        return False

    def _merged_others(self, others: Tensor) -> Tensor:
        return others.sum(0)

    def losses(self, found: Partials, labels: Tensor, num_classes: int) -> Tensor:
        margin = self.loss._margin()
        losses: Tensor = torch.ops.torchmargin._margin_binary_loss(
            found.others,
            found.target_logit,
            labels,
            num_classes,
            margin.get("positive_weight", 1.0),
            margin.get("negative_weight", 1.0),
            self.loss.ignore_index,
        )
        return losses


def partials_of(loss: MarginLoss) -> AmongAll:
    """The kind that this loss is made of."""
    return AgainstAll(loss) if isinstance(loss, OneAgainstAll) else AmongAll(loss)


def stacked(blocks: Sequence[Partials]) -> Partials:
    """[S, B] of each."""
    return Partials(*map(torch.stack, zip(*blocks)))
