"""The drawn rows of a rank's blocks as a parameter, and what an optimizer keeps of every row, as DTensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

__all__ = ["RowStates", "RowTable", "local_of", "no_rows", "states_of"]


class RowStates(NamedTuple):
    """What an optimizer keeps of a parameter: tensors of its shape, each with what it starts at, and the rest."""

    of_rows: dict[str, Tensor]
    shared: frozenset[str]


class RowTable:
    """The rows of one list of blocks: the parameter of the drawn ones, and the optimizer's state of every one."""

    def __init__(
        self,
        name: str,
        blocks: Iterable[Tensor],
        ranges: Sequence[tuple[int, int]],
        parameter: nn.Parameter,
        stores: nn.ModuleDict,
        agreed: Callable[[Tensor], Tensor],
    ) -> None:
        firsts = [first for first, _ in ranges]
        if firsts != sorted(firsts):
            raise ValueError(f"expected blocks in the order of their classes, but got {list(ranges)}")
        self.name = name
        self.blocks = blocks
        self.ranges = list(ranges)
        self.parameter = parameter
        self.stores = stores
        self.agreed = agreed
        self.states = RowStates({}, frozenset())
        self.classes: Tensor | None = None  # of the parameter's rows
        self._drawn_at = 0  # the weights' version when they were drawn
        self._gradient_version = 0
        self._places: list[Tensor] | None = None  # between a step's two hooks

    # ---- rows ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, tensors: Iterable[Tensor], places: list[Tensor]) -> Tensor:
        """Copies of the rows of DTensors at `places`, which places_of has found, one below the other."""
        parts = [local_of(tensor) for tensor in tensors]
        rows = parts[0].new_empty(sum(map(len, places)), *parts[0].shape[1:])
        for part, place, piece in zip(parts, places, rows.split(list(map(len, places)))):
            torch.index_select(part, 0, place, out=piece)
        return rows

    @torch.no_grad()
    def write(self, tensors: Iterable[Tensor], places: list[Tensor], rows: Tensor) -> None:
        for tensor, place, piece in zip(tensors, places, rows.split(list(map(len, places)))):
            local_of(tensor).index_copy_(0, place, piece)
            increment_version([tensor])

    def places_of(self, classes: Tensor) -> list[Tensor]:
        """Where classes, sorted and all on this rank, are in each block."""
        firsts = [first for first, _ in self.ranges]
        cuts = torch.searchsorted(classes, classes.new_tensor(firsts[1:])).tolist()
        return [part - first for part, first in zip(classes.tensor_split(cuts), firsts)]

    def version(self) -> int:
        """Grows with each change of the weights, through the DTensors or their local tensors."""
        return sum(block._version + local_of(block)._version for block in self.blocks)

    # ---- from forward to step ------------------------------------------------------------------------------------

    def leaf(self, classes: Tensor) -> Tensor:
        """A copy of the rows of classes, whose gradient goes to the parameter.

        NB: a new leaf for each forward. Autograd has noted the shape of a leaf and refuses one that is resized.
        """
        rows = self.read(self.blocks, self.places_of(classes))
        if torch.is_grad_enabled() and self.parameter.requires_grad:
            rows.requires_grad_()
            rows.register_post_accumulate_grad_hook(functools.partial(self._take, classes, self.version()))
        return rows

    @torch.no_grad()
    def _take(self, classes: Tensor, version: int, leaf: Tensor) -> None:
        gradient, leaf.grad = self.agreed(cast(Tensor, leaf.grad).detach()), None
        if version != self.version():
            raise RuntimeError(
                "the class weights have changed since the forward of this backward pass, by an optimizer's step or by "
                "loading, and its gradient is of weights that are no more; run forward again"
            )
        rows, before = leaf.detach(), self._gradient_so_far()
        if before is not None and self.classes is not None:
            self._check_unchanged()
            union = torch.unique(torch.cat([self.classes, classes]))
            total = gradient.new_zeros(len(union), *gradient.shape[1:])
            total.index_add_(0, torch.searchsorted(union, self.classes), before)
            total.index_add_(0, torch.searchsorted(union, classes), gradient)
            rows, classes, gradient = self.read(self.blocks, self.places_of(union)), union, total
        self._set(rows, classes, gradient)
        self._drawn_at = version

    def _gradient_so_far(self) -> Tensor | None:
        """None if zero_grad was called, which either takes the gradient away or fills it with zeros."""
        gradient = self.parameter.grad
        if gradient is None or (gradient._version != self._gradient_version and not gradient.any()):
            return None
        return gradient

    def _set(self, rows: Tensor, classes: Tensor | None, gradient: Tensor | None) -> None:
        self.parameter.grad = None  # it has another shape
        self.parameter.data = rows
        self.parameter.grad = gradient
        self.classes = classes
        self._gradient_version = 0 if gradient is None else gradient._version

    def _check_unchanged(self) -> None:
        if self._drawn_at != self.version():
            raise RuntimeError(
                "the class weights have changed since the backward pass, by loading or by hand, and the gradient is of "
                "weights that are no more; call zero_grad"
            )

    # ---- the step ------------------------------------------------------------------------------------------------

    def make_stores(self) -> None:
        """A DTensor beside each block for each state of rows, where there is none yet."""
        for name, start in self.states.of_rows.items():
            if name not in self.stores:
                self.stores[name] = nn.Module()
            store = self.stores[name]
            for k, block in enumerate(self.blocks):
                if str(k) not in store._buffers:
                    store.register_buffer(str(k), _filled_like(block, start))

    def reset(self) -> None:
        self._set(self.parameter.detach().new_empty(0, *self.parameter.shape[1:]), None, None)
        for name, start in self.states.of_rows.items():
            for store in self.stores[name].buffers():
                local_of(store).copy_(start.expand(local_of(store).shape))

    def take_states(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The states of rows, which are no longer the optimizer's: its state_dict has what all rows share."""
        state = optimizer.state.get(self.parameter, {})
        names = [name for name in state if name not in self.states.shared]
        taken = {name: state.pop(name) for name in names}
        return {name: value for name, value in taken.items() if value is not None}

    def before_step(self, optimizer: Optimizer) -> None:
        self._places = None
        if self.parameter.grad is None:
            return
        if self.classes is None:  # a gradient that someone gave to no rows, to make the optimizer's state
            self.classes = torch.empty(0, dtype=torch.int64, device=self.parameter.device)
            self._drawn_at = self.version()
        self._check_unchanged()
        self._places = self.places_of(self.classes)
        missing = self.states.shared - optimizer.state.get(self.parameter, {}).keys()
        if not missing:
            state = optimizer.state[self.parameter]
            for name, store in self.stores.items():
                state[name] = self.read(store.buffers(), self._places)
        elif not self._stores_are_new():  # else the optimizer makes them, as it does at its first step
            raise RuntimeError(
                f"expected the optimizer's state_dict to be loaded together with the head's, but it has no "
                f"{sorted(missing)[0]!r} for what the head has kept of rows"
            )

    def after_step(self, optimizer: Optimizer) -> None:
        if self._places is None:
            return
        self.write(self.blocks, self._places, self.parameter.detach())
        taken = self.take_states(optimizer)
        for name, value in taken.items():
            if name in self.stores:
                self.write(self.stores[name].buffers(), self._places, value)
        self._places = None
        self._set(self.parameter.detach().new_empty(0, *self.parameter.shape[1:]), None, None)
        others = taken.keys() - self.stores.keys()
        if others:
            raise RuntimeError(
                f"the optimizer has begun to keep {sorted(others)[0]!r} of rows, which it did not when it was "
                f"attached; call attach_row_optimizer(head, optimizer) after a change of its options"
            )

    def _stores_are_new(self) -> bool:
        for name, start in self.states.of_rows.items():
            for store in map(local_of, self.stores[name].buffers()):
                if store.numel() and any(bool(end != start) for end in store.aminmax()):
                    return False
        return True


def states_of(optimizer: Optimizer, parameter: nn.Parameter, name: str) -> RowStates:
    """Found by a step of such an optimizer on zeros, whose gradient is zero."""
    groups = [group for group in optimizer.param_groups if any(each is parameter for each in group["params"])]
    if not groups:
        raise ValueError(f"expected the optimizer to hold the head's parameters(), but {name} is not among its own")
    options = {key: value for key, value in groups[0].items() if key != "params"}
    if options.get("momentum", 0) != 0 and options.get("dampening", 0) != 0:
        raise ValueError(
            f"expected dampening to be 0, but got {options['dampening']}: the first momentum of a row would be damped, "
            f"which SGD's is not"
        )
    kind = type(optimizer)
    zeros = nn.Parameter(parameter.detach().new_zeros(2, *parameter.shape[1:]))
    trial = kind([zeros], **{key: options[key] for key in inspect.signature(kind).parameters if key in options})
    trial.param_groups[0].update(options)
    zeros.grad = torch.zeros_like(zeros)
    try:
        trial.step()
    except TypeError as error:
        raise TypeError(f"expected an optimizer whose step needs no closure, but got {kind.__name__}") from error
    of_rows, shared = {}, set()
    for key, value in trial.state[zeros].items():
        if isinstance(value, Tensor) and value.shape == zeros.shape:
            of_rows[key] = value.detach().flatten()[0].clone()
        elif isinstance(value, Tensor) and value.numel() > 1:
            raise ValueError(
                f"expected an optimizer that keeps tensors like its parameter or numbers, but {kind.__name__}'s {key} "
                f"has shape {list(value.shape)} for a parameter of shape {list(zeros.shape)}"
            )
        elif value is not None:
            shared.add(key)
    _check_rows_alone(kind, trial.param_groups[0], zeros, name)
    return RowStates(of_rows, frozenset(shared))


def _check_rows_alone(kind: type[Optimizer], group: dict[str, Any], like: Tensor, name: str) -> None:
    """Does it move a row as it would without the others? Muon, for one, does not."""
    options = {key: group[key] for key in inspect.signature(kind).parameters if key in group and key != "params"}
    gradient = torch.linspace(-1.0, 2.0, like.numel(), dtype=like.dtype, device=like.device).view(like.shape)
    moved = []
    for part in (gradient, gradient[:1]):
        parameter = nn.Parameter(torch.zeros_like(part))
        optimizer = kind([parameter], **options)
        parameter.grad = part.clone()
        optimizer.step()
        moved.append(parameter.detach()[:1])
    if not torch.allclose(moved[0], moved[1], rtol=1e-3, atol=1e-6):
        raise ValueError(
            f"expected an optimizer that moves each of {name} by itself, but {kind.__name__}'s step on one depends on "
            f"the others, which are other rows on other ranks"
        )


@torch.no_grad()
def local_of(tensor: Tensor) -> Tensor:
    """This rank's rows of a DTensor: the tensor itself, not a copy."""
    return cast(DTensor, tensor).to_local()


def no_rows(blocks: Iterable[Tensor]) -> nn.Parameter:
    first = local_of(next(iter(blocks)))
    return nn.Parameter(first.detach().new_empty(0, *first.shape[1:]))


def _filled_like(tensor: Tensor, value: Tensor) -> DTensor:
    """A DTensor whose rows lie where those of `tensor` lie."""
    block = cast(DTensor, tensor)
    local = torch.empty_like(local_of(block), dtype=value.dtype).copy_(value.expand(local_of(block).shape))
    return DTensor.from_local(
        local, block.device_mesh, block.placements, run_check=False, shape=block.shape, stride=block.stride()
    )
