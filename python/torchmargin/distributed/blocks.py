"""The class weights of a rank: blocks of classes, each a DTensor of which every rank holds some rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from torchmargin.distributed.sampling import uniform_of

__all__ = [
    "BufferList",
    "as_classes",
    "as_rows",
    "block_sizes",
    "distribute_block",
    "draw_block",
    "local_range",
    "shared_by_all",
    "shared_seed",
]

_ROWS_AT_ONCE = 1 << 20  # numbers that are drawn at once


def block_sizes(classes: int, blocks: int) -> list[int]:
    """Sizes of nearly equal blocks."""
    return [classes * (k + 1) // blocks - classes * k // blocks for k in range(blocks)]


def local_range(classes: int, mesh: DeviceMesh) -> tuple[int, int]:
    """Which rows of a block of `classes` are this rank's: the first and how many. Shard's rule, torch.chunk's."""
    chunk = -(-classes // mesh.size())
    first = min(mesh.get_local_rank() * chunk, classes)
    return first, min(chunk, classes - first)


def distribute_block(block: Tensor, mesh: DeviceMesh) -> DTensor:
    """Rank 0's values, each rank's classes of them in memory of their own."""
    sharded = distribute_tensor(block.detach(), mesh, [Shard(0)])
    return _as_block(sharded.to_local().clone(), block.shape, mesh)


def _as_block(local: Tensor, shape: Sequence[int], mesh: DeviceMesh) -> DTensor:
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=size, stride=stride)


def shared_by_all(value: Tensor, mesh: DeviceMesh) -> DTensor:
    """Rank 0's, on every rank."""
    return distribute_tensor(value.detach(), mesh, [Replicate()])


def as_classes(weight: Tensor, sub_centers: int) -> Tensor:
    """Weights [c K, D] as they are split over ranks, class by class: [c, K, D], or [c, D] without sub-centers."""
    return weight if sub_centers == 1 else weight.unflatten(0, (-1, sub_centers))


def as_rows(weight: Tensor) -> Tensor:
    """The same as the ops take them, [c K, D]."""
    return weight.flatten(0, 1) if weight.dim() == 3 else weight


def zero_block(classes: int, mesh: DeviceMesh, dtype: torch.dtype) -> DTensor:
    """A bias."""
    _, count = local_range(classes, mesh)
    return _as_block(torch.zeros(count, dtype=dtype, device=_device_of(mesh)), (classes,), mesh)


def draw_block(
    first_class: int,
    classes: int,
    num_classes: int,
    of_class: Sequence[int],
    mesh: DeviceMesh,
    dtype: torch.dtype,
    seed: int,
) -> DTensor:
    """Xavier-uniform weights of a block, drawn where they live: a hash of class and feature, at any world size.

    `of_class`: the shape of a class's weights, (D,) or (K, D).
    """
    first, count = local_range(classes, mesh)
    local = torch.empty(count, *of_class, dtype=dtype, device=_device_of(mesh))
    fill_drawn(local, first_class + first, num_classes, seed)
    return _as_block(local, (classes, *of_class), mesh)


@torch.no_grad()
def fill_drawn(local: Tensor, first_class: int, num_classes: int, seed: int) -> None:
    """Xavier-uniform numbers for the weights [c, D] or [c, K, D] of the classes from `first_class` on, of
    `num_classes` in all."""
    count, numbers = len(local), math.prod(local.shape[1:])
    centers = 1 if local.dim() == 2 else local.shape[1]
    bound = math.sqrt(6.0 / (num_classes * centers + local.shape[-1]))
    step = max(1, _ROWS_AT_ONCE // numbers)
    for begin in range(0, count, step):
        end = min(begin + step, count)
        classes = torch.arange(first_class + begin, first_class + end, device=local.device)
        cells = classes[:, None] * numbers + torch.arange(numbers, device=local.device)
        local[begin:end] = ((2.0 * uniform_of(seed, 0, cells.flatten()) - 1.0) * bound).view(-1, *local.shape[1:])


def shared_seed(mesh: DeviceMesh) -> int:
    """A number from rank 0's random numbers, the same on every rank."""
    seed = torch.randint(0, 1 << 62, (1,)).to(_device_of(mesh))
    dist.broadcast(seed, group=mesh.get_group(), group_src=0)
    return int(seed.item())


def _device_of(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


class BufferList(nn.Module):
    """Blocks that no optimizer sees, under the names that nn.ParameterList would give them."""

    def __init__(self, blocks: Sequence[Tensor] = ()) -> None:
        super().__init__()
        for block in blocks:
            self.append(block)

    def append(self, block: Tensor) -> None:
        self.register_buffer(str(len(self)), block)

    def __getitem__(self, index: int) -> Tensor:
        return list(self)[index]

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[Tensor]:
        return iter([buffer for buffer in self._buffers.values() if buffer is not None])
