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
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from torchmargin.losses import (
    ArcFaceLoss,
    CombinedMarginLoss,
    CommonOptions,
    CosFaceLoss,
    InterTopKArcFaceLoss,
    LargeMarginSoftmaxLoss,
    NormalizedSoftmaxLoss,
    SharedOptions,
    SphereFace2Loss,
    SphereFaceLoss,
    SubCenterArcFaceLoss,
)
from torchmargin.options import BinaryKind, Extension

__all__ = [
    "from_insightface",
    "from_pytorch_metric_learning",
    "from_wespeaker",
    "insightface_arcface",
    "insightface_combined",
    "insightface_cosface",
    "pml_arcface",
    "pml_cosface",
    "pml_get_outliers",
    "pml_large_margin_softmax",
    "pml_normalized_softmax",
    "pml_sphereface",
    "pml_subcenter_arcface",
    "wespeaker_add_margin",
    "wespeaker_arc_margin",
    "wespeaker_arc_margin_intertopk_subcenter",
    "wespeaker_sphere",
    "wespeaker_sphereface2",
]


def from_pytorch_metric_learning(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of one of its classification losses, whose `W` is [D, C], as ours: `weight` [C, D].

    With sub-centers [D, C K] and [C K, D]; the centers of a class lie side by side in both.

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
    in_features: int,
    num_classes: int,
    *,
    scale: float = 64.0,
    margin: float = 0.5,
    interclass_filtering_threshold: float = 0.0,
    **common: Unpack[CommonOptions],
) -> ArcFaceLoss:
    """InsightFace's ArcFace since 2022-12: cos(theta + margin) everywhere, with the gradient of cos(theta).

    `interclass_filtering_threshold`: that of its CombinedMarginLoss, 0 filters nothing.
    """
    return ArcFaceLoss(
        in_features,
        num_classes,
        scale=scale,
        margin=margin,
        extension="none",
        margin_gradient="straight_through",
        **_filtered(interclass_filtering_threshold, common),
    )


def insightface_cosface(
    in_features: int,
    num_classes: int,
    *,
    scale: float = 64.0,
    margin: float = 0.4,
    interclass_filtering_threshold: float = 0.0,
    **common: Unpack[CommonOptions],
) -> CosFaceLoss:
    """InsightFace's CosFace, whose margin is 0.4 by default."""
    common = _filtered(interclass_filtering_threshold, common)
    return CosFaceLoss(in_features, num_classes, scale=scale, margin=margin, **common)


def insightface_combined(
    in_features: int,
    num_classes: int,
    *,
    scale: float = 64.0,
    m1: float = 1.0,
    m2: float = 0.5,
    m3: float = 0.0,
    interclass_filtering_threshold: float = 0.0,
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
        **_filtered(interclass_filtering_threshold, common),
    )


def _filtered(threshold: float, common: CommonOptions) -> CommonOptions:
    """InsightFace's 0 is no filter, and so is what is below it."""
    if threshold <= 0:
        return common
    if common.get("interclass_filter") is not None:
        raise ValueError("expected interclass_filtering_threshold or interclass_filter, which are one, but got both")
    return {**common, "interclass_filter": threshold}


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


def pml_subcenter_arcface(
    in_features: int,
    num_classes: int,
    *,
    scale: float = 64.0,
    margin: float = 28.6,
    sub_centers: int = 3,
    **common: Unpack[SharedOptions],
) -> SubCenterArcFaceLoss:
    """pytorch-metric-learning's SubCenterArcFaceLoss; `margin` is in degrees, as there."""
    return SubCenterArcFaceLoss(
        in_features, num_classes, scale=scale, margin=math.radians(margin), sub_centers=sub_centers, **common
    )


def pml_get_outliers(
    loss: SubCenterArcFaceLoss, embeddings: Tensor, labels: Tensor, threshold: float = 75.0
) -> tuple[Tensor, Tensor]:
    """pytorch-metric-learning's SubCenterArcFaceLoss.get_outliers: which rows to drop, and the dominant centers.

    The indices of the rows whose angle to the dominant center of their class, counted over these embeddings, is more
    than `threshold` degrees, class by class; and the centers [D, C]. Of a class without rows it is the first one.
    """
    centers = loss.dominant_centers(loss.center_counts(embeddings, labels))
    far = (loss.angle_to_centers(embeddings, labels, centers) > math.radians(threshold)).nonzero().squeeze(1)
    outliers = far[labels[far].argsort(stable=True)]
    weight = loss.weight.detach().unflatten(0, (loss.num_classes, loss.sub_centers))
    return outliers, weight[torch.arange(loss.num_classes, device=weight.device), centers].T


# ---- wespeaker: the `project_type` of its configurations -----------------------------------------------------------


def from_wespeaker(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of one of its projections, or of a model that has one ("projection.weight"), as ours.

    `weight` [C, D] or [C K, D]; SphereFace2's `bias` [1, 1] becomes 0-dim. The values are copied.
    """
    prefix = "projection." if "projection.weight" in state_dict else ""
    names = [name for name in ("weight", "bias") if prefix + name in state_dict]
    found = {name: state_dict[prefix + name].detach().clone() for name in names}
    if "weight" not in found:
        raise ValueError(
            f"expected a state_dict of a wespeaker projection, with 'projection.weight' or 'weight', but got the keys "
            f"{sorted(state_dict)}"
        )
    if found["weight"].dim() != 2:
        raise ValueError(f"expected the weight to have shape [C, D], but got {list(found['weight'].shape)}")
    if "bias" in found:
        if found["bias"].numel() != 1:
            raise ValueError(f"expected SphereFace2's bias, one number, but got shape {list(found['bias'].shape)}")
        found["bias"] = found["bias"].reshape(())
    return found


def wespeaker_add_margin(
    in_features: int, num_classes: int, *, scale: float = 32.0, margin: float = 0.2, **common: Unpack[CommonOptions]
) -> CosFaceLoss:
    """wespeaker's AddMarginProduct."""
    return CosFaceLoss(in_features, num_classes, scale=scale, margin=margin, **common)


def wespeaker_arc_margin(
    in_features: int,
    num_classes: int,
    *,
    scale: float = 32.0,
    margin: float = 0.2,
    easy_margin: bool = False,
    **common: Unpack[CommonOptions],
) -> ArcFaceLoss:
    """wespeaker's ArcMarginProduct. Its ``update(margin)`` is ``loss.margin = margin`` here."""
    extension: Extension = "easy" if easy_margin else "continuous"
    return ArcFaceLoss(in_features, num_classes, scale=scale, margin=margin, extension=extension, **common)


def wespeaker_arc_margin_intertopk_subcenter(
    in_features: int,
    num_classes: int,
    *,
    scale: float = 32.0,
    margin: float = 0.2,
    easy_margin: bool = False,
    K: int = 3,
    mp: float = 0.06,
    k_top: int = 5,
    do_lm: bool = False,
    **common: Unpack[SharedOptions],
) -> InterTopKArcFaceLoss:
    """wespeaker's ArcMarginProduct_intertopk_subcenter, after its ``update(margin)``.

    The margin of the hardest grows with the margin there, to mp margin / 0.2. So on a schedule
    ``loss.margin, loss.hardest_margin = margin, mp * margin / 0.2`` here. A hard class nearer than its margin has the
    logit scale here (the angle stays at 0) and one that falls again there.
    """
    loss = InterTopKArcFaceLoss(
        in_features,
        num_classes,
        scale=scale,
        margin=margin,
        sub_centers=K,
        hardest=0 if do_lm else k_top,
        hardest_margin=0.0 if do_lm or margin <= 0.001 else mp * margin / 0.2,
        **common,
    )
    if easy_margin:
        loss.extension = "easy"
    return loss


def wespeaker_sphere(
    in_features: int, num_classes: int, *, margin: float = 4.0, **common: Unpack[CommonOptions]
) -> SphereFaceLoss:
    """wespeaker's SphereProduct, with its annealing of the margin; its constructor's own margin is 2."""
    return SphereFaceLoss(in_features, num_classes, margin=margin, **common)


def wespeaker_sphereface2(
    in_features: int,
    num_classes: int,
    *,
    scale: float = 32.0,
    margin: float = 0.2,
    t: float = 3.0,
    lanbuda: float = 0.7,
    margin_type: Literal["C", "A"] = "C",
    **common: Unpack[CommonOptions],
) -> SphereFace2Loss:
    """wespeaker's SphereFace2; any `margin_type` but "A" is "C" there, and an error here."""
    if margin_type not in ("A", "C"):
        raise ValueError(f"wespeaker_sphereface2: expected margin_type to be 'C' or 'A', but got {margin_type!r}")
    kind: BinaryKind = "a" if margin_type == "A" else "c"
    return SphereFace2Loss(
        in_features, num_classes, scale=scale, kind=kind, margin=margin, t=t, positive_weight=lanbuda, **common
    )
