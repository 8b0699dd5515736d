"""The losses over ranks on plain tensors: the ops under Python names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import Unpack

from torchmargin import _extension  # noqa: F401  (registers the ops)
from torchmargin.options import BinaryKind, LinearHead, Reduction

__all__ = ["class_parallel_binary_cross_entropy", "class_parallel_cross_entropy"]


def class_parallel_cross_entropy(
    input: Tensor,
    weights: Sequence[Tensor],
    class_starts: Sequence[int],
    target: Tensor,
    num_classes: int,
    *,
    group: dist.ProcessGroup | DeviceMesh,
    biases: Sequence[Tensor] | None = None,
    compute_dtype: torch.dtype | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    class_weight: Tensor | None = None,
    max_rows: int | None = None,
    input_grad_scale: float = 1.0,
    **head: Unpack[LinearHead],
) -> Tensor:
    """The cross-entropy of the rows of all ranks among the classes of all ranks.

    input [B, D] and target [B] (classes in [0, num_classes), or ``ignore_index``) are this rank's rows; ``weights``
    its blocks of classes, [c, D] each ([c K, D] with sub_centers), c may be 0; ``class_starts`` the first class of each
    block. Every class is held by one rank. Plain tensors; ``head`` as
    :func:`torchmargin.functional.linear_margin_cross_entropy` has it, with sample_*, hard_threshold and
    hard_coefficients of this rank's rows, or the same for all rows on all ranks. Without a threshold hard negatives
    have each row's own, which the rank that holds its class finds; the hardest classes are those of all ranks. Returns
    the same scalar on all ranks, or this rank's losses [B] with reduction "none". ``class_weight`` [num_classes] is the
    same on all ranks. See :class:`ClassParallel`, which it
    is the function of, for ``max_rows``, errors and the order of calls; ``input_grad_scale`` is 1 here: gradients of
    the embeddings as one process has them.
    """
    name, size = _name_and_size(group)
    loss: Tensor = torch.ops.torchmargin.class_parallel_cross_entropy(
        input,
        list(weights),
        list(class_starts),
        target,
        num_classes,
        name,
        size,
        None if biases is None else list(biases),
        compute_dtype=compute_dtype,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        class_weight=class_weight,
        max_rows=max_rows,
        input_grad_scale=input_grad_scale,
        **head,
    )
    return loss


def class_parallel_binary_cross_entropy(
    input: Tensor,
    weights: Sequence[Tensor],
    class_starts: Sequence[int],
    target: Tensor,
    num_classes: int,
    *,
    group: dist.ProcessGroup | DeviceMesh,
    bias: Tensor | None = None,
    scale: float = 1.0,
    margin: float = 0.0,
    kind: BinaryKind = "c",
    power: float = 1.0,
    positive_weight: float = 1.0,
    negative_weight: float = 1.0,
    sub_centers: int = 1,
    compute_dtype: torch.dtype | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    class_weight: Tensor | None = None,
    max_rows: int | None = None,
    input_grad_scale: float = 1.0,
) -> Tensor:
    """One against all: the rows of all ranks against each of the classes of all ranks.

    As :func:`torchmargin.functional.linear_margin_binary_cross_entropy`, with the rows, blocks and results of
    :func:`class_parallel_cross_entropy`. ``bias`` (0-dim) is the same on all ranks, and every rank gets its whole
    gradient. A target that is no class of any rank is an IndexError on all of them.
    """
    name, size = _name_and_size(group)
    loss: Tensor = torch.ops.torchmargin.class_parallel_binary_cross_entropy(
        input,
        list(weights),
        list(class_starts),
        target,
        num_classes,
        name,
        size,
        bias,
        scale=scale,
        margin=margin,
        kind=kind,
        power=power,
        positive_weight=positive_weight,
        negative_weight=negative_weight,
        sub_centers=sub_centers,
        compute_dtype=compute_dtype,
        ignore_index=ignore_index,
        reduction=reduction,
        class_weight=class_weight,
        max_rows=max_rows,
        input_grad_scale=input_grad_scale,
    )
    return loss


def _name_and_size(group: dist.ProcessGroup | DeviceMesh) -> tuple[str, int]:
    if isinstance(group, DeviceMesh):
        group = group.get_group()
    return group.group_name, group.size()
