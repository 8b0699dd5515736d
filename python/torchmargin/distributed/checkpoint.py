"""The weights of a head as one plain tensor, to other tools and from them. torch.distributed.checkpoint needs none of
this: a head's state_dict holds DTensors, which it saves and loads at any number of ranks."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchmargin.distributed import blocks as blocks_of
from torchmargin.distributed.head import ClassParallel

__all__ = ["export_weight", "import_weight"]


@torch.no_grad()
def export_weight(head: ClassParallel) -> Tensor | None:
    """All class weights [C, D], or [C K, D] with sub-centers, on rank 0, in its main memory; None on the others.

    Every rank calls it. A rank's device holds one block at a time. A bias is not in it: ``head.bias`` has DTensors to
    ask.
    """
    first = head.mesh.get_local_rank() == 0
    whole = torch.empty(head.loss.weight.shape, dtype=head.loss.weight.dtype) if first else None
    start = 0
    for block in head.weight:
        full = blocks_of.as_rows(cast(DTensor, block).full_tensor())
        if whole is not None:
            whole[start : start + len(full)] = full.to("cpu")
        start += len(full)
    return whole


@torch.no_grad()
def import_weight(head: ClassParallel, weight: Tensor | None) -> None:
    """Sets all class weights from a plain [C, D] (or [C K, D]) on rank 0, in any memory; the others give None.

    All ranks call it.
    """
    device, first = torch.device(head.mesh.device_type), head.mesh.get_local_rank() == 0
    shape = tuple(head.loss.weight.shape)
    wrong = torch.tensor(int(first and (not isinstance(weight, Tensor) or tuple(weight.shape) != shape)), device=device)
    torch.distributed.broadcast(wrong, group=head.mesh.get_group(), group_src=0)
    if wrong.item():
        got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(
            f"import_weight: expected a weight of shape {list(shape)} on rank 0, but got {got} on this one"
        )
    start = 0
    for block in head.weight:
        count = block.shape[0] * head.loss.sub_centers
        if first:
            assert weight is not None
            rows = weight[start : start + count].to(device=device, dtype=block.dtype)
            part = blocks_of.as_classes(rows, head.loss.sub_centers)
        else:
            part = torch.empty(block.shape, dtype=block.dtype, device=device)
        cast(DTensor, block).copy_(blocks_of.distribute_block(part, head.mesh))
        start += count
