"""Settings and what the library would do: versions, the workspace limit, plans."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from torchmargin._extension import _C

__all__ = [
    "Plan",
    "built_for_torch",
    "cuda_architectures",
    "get_workspace_limit",
    "plan",
    "set_workspace_limit",
    "workspace_limit",
]


class Plan(NamedTuple):
    """How a problem is cut up; see :func:`plan`."""

    path: str  # the implementation that would run
    lanes: int  # threads that each work on chunks of their own; 1: all share out each product
    row_tile: int  # rows in one product
    class_chunk: int  # classes in one product
    input_splits: int  # slices of a chunk that grad_input's product is cut into, for GPUs
    operand_dtype: torch.dtype  # what the products read; they accumulate in float32 or float64
    kept_classes: int  # leading classes whose products are kept for the backward pass
    scratch_bytes: int  # workspace beside what is kept
    workspace_limit: int
    fits: bool  # False: the limit is too small, a call would raise


def built_for_torch() -> str:
    """The version of torch that the library was built for."""
    return _C.built_for_torch()


def cuda_architectures() -> tuple[str, ...]:
    """The CUDA architectures compiled in; empty for a CPU-only build."""
    return _C.cuda_architectures()


def get_workspace_limit(device_type: str = "cpu") -> int:
    """Bytes that one call may hold beyond inputs, outputs, gradients and a few vectors of length B and C."""
    return _C.get_workspace_limit(device_type)


def set_workspace_limit(bytes: int, device_type: str = "cpu") -> None:
    """Sets the limit for all later calls on ``device_type`` ("cpu" or "cuda"). The default is 256 MiB.

    The forward pass keeps products for the backward pass while they fit; what does not fit is
    computed again. A limit that cannot hold one tile makes the ops raise.
    """
    _C.set_workspace_limit(device_type, bytes)


@contextlib.contextmanager
def workspace_limit(bytes: int, device_type: str = "cpu") -> Iterator[None]:
    """Sets the limit inside a ``with`` block."""
    before = get_workspace_limit(device_type)
    set_workspace_limit(bytes, device_type)
    try:
        yield
    finally:
        set_workspace_limit(before, device_type)


def plan(
    batch: int,
    features: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | None = None,
) -> Plan:
    """Which path and chunking a loss of cosines (normalised, without a bias) of this size would run with, under the
    present limit and on the present GPU.

    ``compute_dtype`` is that of the ops, which autocast sets for float32 weights.
    """
    name = str(dtype).removeprefix("torch.")
    compute = "" if compute_dtype is None else str(compute_dtype).removeprefix("torch.")
    found = _C.plan(batch, features, classes, name, torch.device(device).type, compute)
    return Plan(**{**found, "operand_dtype": getattr(torch, found["operand_dtype"])})
