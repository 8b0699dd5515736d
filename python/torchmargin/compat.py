"""Moving from other libraries: their weights, and losses that give their numbers.

Presets are named after the library and its loss. They take the other library's arguments in its own
units (pytorch-metric-learning's ArcFace margin is in degrees) and return modules of
:mod:`torchmargin.losses`. docs/migrating.md shows the moves step by step.

    loss = compat.pml_arcface(in_features=512, num_classes=10575, margin=28.6)
    loss.load_state_dict(compat.from_pytorch_metric_learning(their_loss.state_dict()))
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from torchmargin.losses import (
    ArcFaceLoss,
    CombinedMarginLoss,
    CommonOptions,
    CosFaceLoss,
    LargeMarginSoftmaxLoss,
    NormalizedSoftmaxLoss,
    SphereFaceLoss,
)

__all__ = [
    "from_insightface",
    "from_pytorch_metric_learning",
    "insightface_arcface",
    "insightface_combined",
    "insightface_cosface",
    "pml_arcface",
    "pml_cosface",
    "pml_large_margin_softmax",
    "pml_normalized_softmax",
    "pml_sphereface",
]


def from_pytorch_metric_learning(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of one of its classification losses, whose `W` is [D, C], as ours: `weight` [C, D].

    A prefix ("loss.W", as in a checkpoint of a larger module) is dropped. The values are copied.
    """
    found = [name for name in state_dict if name == "W" or name.endswith(".W")]
    if len(found) != 1:
        raise ValueError(
            f"expected a state_dict of a pytorch-metric-learning loss, with one weight 'W', but got the keys "
            f"{sorted(state_dict)}"
        )
    weight = state_dict[found[0]]
    if weight.dim() != 2:
        raise ValueError(f"expected {found[0]} to have shape [D, C], but got {list(weight.shape)}")
    return {"weight": weight.detach().t().contiguous().clone()}


def from_insightface(shards: Tensor | Mapping[str, Any] | Sequence[Tensor | Mapping[str, Any]]) -> dict[str, Tensor]:
    """The class weights of InsightFace's partial FC, one shard a rank in the order of the ranks, as ours.

    A shard is what torch.load gives for a rank's file: the training checkpoint with
    "state_dict_softmax_fc", that state_dict itself with "weight", or (older versions) the bare
    tensor, [classes of the rank, D]. Margins of InsightFace are in radians already.
    """
    if isinstance(shards, (Tensor, Mapping)):
        shards = [shards]
    weights = [_insightface_weight(shard, rank) for rank, shard in enumerate(shards)]
    if not weights:
        raise ValueError("expected at least one shard, but got none")
    widths = {weight.shape[1] for weight in weights}
    if len(widths) != 1:
        raise ValueError(f"expected shards with one number of features, but got {sorted(widths)}")
    return {"weight": torch.cat(weights)}


def _insightface_weight(shard: Tensor | Mapping[str, Any], rank: int) -> Tensor:
    weight = shard
    if isinstance(weight, Mapping):
        weight = weight.get("state_dict_softmax_fc", weight)
    if isinstance(weight, Mapping):
        if "weight" not in weight:
            raise ValueError(
                f"expected shard {rank} to hold 'weight' or 'state_dict_softmax_fc', but got the keys {sorted(weight)}"
            )
        weight = weight["weight"]
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        what = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"expected the weight of shard {rank} to have shape [classes, D], but got {what}")
    return weight.detach()


def insightface_arcface(
    in_features: int, num_classes: int, *, scale: float = 64.0, margin: float = 0.5, **common: Unpack[CommonOptions]
) -> ArcFaceLoss:
    """InsightFace's ArcFace since 2022-12: cos(theta + margin) everywhere, with the gradient of cos(theta)."""
    return ArcFaceLoss(
        in_features,
        num_classes,
        scale=scale,
        margin=margin,
        extension="none",
        margin_gradient="straight_through",
        **common,
    )


def insightface_cosface(
    in_features: int, num_classes: int, *, scale: float = 64.0, margin: float = 0.4, **common: Unpack[CommonOptions]
) -> CosFaceLoss:
    """InsightFace's CosFace, whose margin is 0.4 by default."""
    return CosFaceLoss(in_features, num_classes, scale=scale, margin=margin, **common)


def insightface_combined(
    in_features: int,
    num_classes: int,
    *,
    scale: float = 64.0,
    m1: float = 1.0,
    m2: float = 0.5,
    m3: float = 0.0,
    **common: Unpack[CommonOptions],
) -> CombinedMarginLoss:
    """InsightFace's CombinedMarginLoss since 2022-12 (its configurations' `margin_list` is (m1, m2, m3)).

    It does not combine: m3 > 0 is CosFace's margin m3, whatever m1 and m2 (a UserWarning says so where they are not 1
    and 0); m1 = 1 and m3 = 0 is ArcFace's m2; anything else raises there in the first step, and here at once. The
    paper's combination is :class:`torchmargin.CombinedMarginLoss`.
    """
    if m3 > 0:
        if m1 != 1 or m2 != 0:
            warnings.warn(
                f"insightface_combined: InsightFace's CombinedMarginLoss ignores m1 and m2 where m3 > 0, so "
                f"({m1:g}, {m2:g}, {m3:g}) is CosFace with a margin of {m3:g}; the paper's combination is "
                f"torchmargin.CombinedMarginLoss",
                stacklevel=2,
            )
        m1, m2 = 1.0, 0.0
    elif m1 != 1 or m3 != 0:
        raise ValueError(
            f"insightface_combined: expected m3 > 0, or m1 = 1 and m3 = 0, since InsightFace's CombinedMarginLoss has "
            f"nothing else, but got ({m1:g}, {m2:g}, {m3:g}); the paper's combination is torchmargin.CombinedMarginLoss"
        )
    return CombinedMarginLoss(
        in_features,
        num_classes,
        scale=scale,
        m1=m1,
        m2=m2,
        m3=m3,
        extension="none",
        margin_gradient="straight_through",
        **common,
    )


def pml_arcface(
    in_features: int, num_classes: int, *, scale: float = 64.0, margin: float = 28.6, **common: Unpack[CommonOptions]
) -> ArcFaceLoss:
    """pytorch-metric-learning's ArcFaceLoss; `margin` is in degrees, as there."""
    return ArcFaceLoss(in_features, num_classes, scale=scale, margin=math.radians(margin), **common)


def pml_cosface(
    in_features: int, num_classes: int, *, scale: float = 64.0, margin: float = 0.35, **common: Unpack[CommonOptions]
) -> CosFaceLoss:
    """pytorch-metric-learning's CosFaceLoss."""
    return CosFaceLoss(in_features, num_classes, scale=scale, margin=margin, **common)


def pml_sphereface(
    in_features: int, num_classes: int, *, scale: float = 1.0, margin: float = 4.0, **common: Unpack[CommonOptions]
) -> SphereFaceLoss:
    """pytorch-metric-learning's SphereFaceLoss: the whole margin at once, no annealing; 1.5 is cut to 1, as there."""
    return SphereFaceLoss(
        in_features, num_classes, scale=scale, margin=int(margin), lambda_base=0.0, lambda_min=0.0, **common
    )


def pml_large_margin_softmax(
    in_features: int, num_classes: int, *, scale: float = 1.0, margin: float = 4.0, **common: Unpack[CommonOptions]
) -> LargeMarginSoftmaxLoss:
    """pytorch-metric-learning's LargeMarginSoftmaxLoss; a margin of 1.5 is cut to 1, as there."""
    return LargeMarginSoftmaxLoss(in_features, num_classes, scale=scale, margin=int(margin), **common)


def pml_normalized_softmax(
    in_features: int, num_classes: int, *, temperature: float = 0.05, **common: Unpack[CommonOptions]
) -> NormalizedSoftmaxLoss:
    """pytorch-metric-learning's NormalizedSoftmaxLoss: the scale is 1 / temperature."""
    return NormalizedSoftmaxLoss(in_features, num_classes, scale=1.0 / temperature, **common)
