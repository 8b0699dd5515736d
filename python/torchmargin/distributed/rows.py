"""Optimizers on class weights without a whole gradient: on the rows that a step drew, or in the backward pass.

The rows that were drawn are a small parameter [m, D]. Its gradient is there between the backward pass and the step, for
GradScaler and clipping; the step reads and writes the rows of the weights and of the optimizer's state, and no others.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from torchmargin.distributed.row_table import RowTable, local_of, no_rows, states_of
from torchmargin.distributed.sampling import Sampler

__all__ = [
    "DrawnRows",
    "DrawnSample",
    "StepHandle",
    "attach_row_optimizer",
    "check_step_in_backward_upstream",
    "step_in_backward",
]


class DrawnSample(NamedTuple):
    """The classes of one forward on this rank, with copies of their rows, which are leaves of its graph."""

    weight: Tensor  # [m, D]
    bias: Tensor | None  # [m]
    classes: Tensor  # [m] int64, sorted, of all ranks' classes
    drawn_by_hash_alone: Tensor  # [m] bool: is none of the batch's classes


class DrawnRows(nn.Module):
    """The rows of this rank's blocks that were drawn since the last step, as parameters; empty between steps.

    Gradients of samples that are drawn before one step add up in the rows of all of them. ``zero_grad`` forgets them.
    The rows are not in the state_dict, the count of draws and what the optimizer keeps of each row are.

    Args:
        blocks: DTensors [C_k, ...] with Shard(0), in the order of their classes; a list or a module of them, which is
            asked at each use.
        biases: DTensors [C_k], or None.
        ranges: of each block, the first of this rank's classes and how many they are.
        sampler: draws the classes.
        mesh: the ranks. A gradient that is not finite on one of them is infinite on all, so that
            every rank's GradScaler skips the step. None: this rank alone.
    """

    step: Tensor

    def __init__(
        self,
        blocks: Iterable[Tensor],
        biases: Iterable[Tensor] | None,
        ranges: Sequence[tuple[int, int]],
        sampler: Sampler,
        mesh: DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        self.sampler = sampler
        self.mesh = mesh
        self._detach: Callable[[], None] | None = None
        self.register_parameter("rows", no_rows(blocks))
        self.register_parameter("bias_rows", None if biases is None else no_rows(biases))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=no_rows(blocks).device))
        self.state, self.bias_state = nn.ModuleDict(), nn.ModuleDict()
        self.stepped_alone = False  # by an optimizer that is not attached, on every rank alike
        _watch_steps()
        self._mark_own()
        self._tables = [RowTable("rows", blocks, ranges, cast(nn.Parameter, self.rows), self.state, self._agreed)]
        if biases is not None:
            bias_rows = cast(nn.Parameter, self.bias_rows)
            self._tables.append(RowTable("bias_rows", biases, ranges, bias_rows, self.bias_state, self._agreed))

    def draw(self, labels: Tensor, step: Tensor | None = None) -> DrawnSample:
        """The classes of a step, of labels that are the same on all ranks; those of no class count for nothing.

        Without a `step` it is the next one, and the count of draws moves.
        """
        self._check_attached()
        positives, table = torch.unique(labels), self._tables[0]
        at = self.step if step is None else step
        drawn = [self.sampler.draw(first, count, at, positives) for first, count in table.ranges]
        classes, alone = (torch.cat(parts) for parts in zip(*drawn))
        if step is None:
            self.step.add_(1)
        leaves = [each.leaf(classes) for each in self._tables]
        return DrawnSample(leaves[0], leaves[1] if len(leaves) > 1 else None, classes, alone)

    def extend(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Blocks were appended: the ranges of all. What is kept of their rows starts as for any."""
        for table in self._tables:
            table.ranges = list(ranges)
            table.make_stores()

    @torch.no_grad()
    def reset(self) -> None:
        """No draws yet, nothing kept of rows."""
        self.step.zero_()
        for table in self._tables:
            table.reset()

    def _agreed(self, gradient: Tensor) -> Tensor:
        """The gradient of drawn rows, in which every rank sees what overflowed on one of them."""
        if self.mesh is None or self.mesh.size() == 1:
            return gradient
        bad = (~gradient.isfinite()).any().to(torch.float32)
        dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=self.mesh.get_group())
        return torch.where(bad > 0, torch.inf, gradient)

    def attach(self, optimizer: Optimizer) -> None:
        """See :func:`attach_row_optimizer`."""
        found = [states_of(optimizer, table.parameter, table.name) for table in self._tables]
        if self._detach is not None:
            self._detach()
        for table, states in zip(self._tables, found):
            table.states = states
            table.stores.clear()
            table.make_stores()
            table.take_states(optimizer)

        def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            args, kwargs = _with_closure_called(args, kwargs)
            for table in self._tables:
                table.before_step(optimizer)
            return args, kwargs

        def after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for table in self._tables:
                table.after_step(optimizer)

        hooks = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)

        def detach() -> None:
            for hook in hooks:
                hook.remove()

        self._detach = detach

    def _check_attached(self) -> None:
        """An optimizer that is not attached steps on the rows alone, and the weights would stay as they are."""
        if self._detach is None and self.stepped_alone:
            raise RuntimeError(
                "expected the optimizer to be attached, but it has moved drawn rows that the weights know nothing of; "
                "call attach_row_optimizer(head, optimizer) before training"
            )

    def _mark_own(self) -> None:
        for parameter in self.parameters():
            cast(Any, parameter)._drawn_rows = weakref.ref(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch gives it no types
        self._mark_own()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no optimizer yet."""
        return {**self.__dict__, "_detach": None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for table in self._tables:
            del destination[prefix + table.name]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [key for key in missing if key not in {prefix + table.name for table in self._tables}]
        if (
            strict
            and self._detach is None
            and any(key.startswith((f"{prefix}state.", f"{prefix}bias_state.")) for key in state_dict)
        ):
            error_msgs.append(
                "there is an optimizer's state of rows; call attach_row_optimizer(head, optimizer) first."
            )


@functools.cache
def _watch_steps() -> None:
    """Notes which drawn rows were stepped by an optimizer that nobody attached: it steps on every rank, also where no
    row was drawn, so that all ranks know."""

    def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rows = getattr(parameter, "_drawn_rows", lambda: None)()
                if rows is not None and rows._detach is None:
                    rows.stepped_alone = True

    register_optimizer_step_post_hook(note)


def attach_row_optimizer(head: nn.Module, optimizer: Optimizer) -> None:
    """Makes the optimizer step on the rows that the head's sampler drew, and on no others.

    ``head`` is a :class:`ClassParallel` with a sampler; ``optimizer`` any of torch.optim's that holds the head's
    ``parameters()``, beside others if need be. Of rows that were not drawn nothing moves: no decay, no momentum. It is
    as if each row had an optimizer of its own that steps when the row was drawn, but for what an optimizer keeps once
    for all rows: AdamW's step count is one, so that its bias correction is that of the rows' whole parameter.

    What the optimizer keeps of each row (momentum, squares) is in the head's state_dict, as DTensors that
    torch.distributed.checkpoint saves, and loads at another number of ranks. What all rows share stays in the
    optimizer's. Attach first, then load both. Attaching again starts anew.

    A step uses the gradients up: a second one without a backward pass before it does nothing. The rows are plain
    tensors, each rank's own: ``clip_grad_norm_`` sees the norm of one rank's. What GradScaler scaled past the largest
    number on one rank is infinite on all, and every rank skips the step.
    """
    rows = getattr(head, "_rows", None)
    if not isinstance(rows, DrawnRows):
        raise ValueError("expected a head with a sampler; without one the optimizer of its parameters needs no help")
    rows.attach(optimizer)


def _with_closure_called(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a step whose closure, if it has one, was called already: it draws the rows."""
    closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        return args, kwargs
    with torch.enable_grad():
        loss = closure()
    return (args[0],), {**kwargs, "closure": lambda: loss}


# ---- blocks ------------------------------------------------------------------------------------------------------


class StepHandle:
    """Takes the hook of one block away. With the last of them the head's gradients are the optimizer's to fetch."""

    def __init__(self, hook: torch.utils.hooks.RemovableHandle, head: nn.Module, others: set[StepHandle]) -> None:
        self._hook = hook
        self._head = head
        self._others = others
        others.add(self)

    def remove(self) -> None:
        self._hook.remove()
        self._others.discard(self)
        if not self._others:
            cast(Any, self._head)._steps_in_backward = False


def step_in_backward(head: nn.Module, optimizer: Optimizer) -> list[StepHandle]:
    """Makes the optimizer step on each block of the head's weights as soon as the backward pass has its gradient.

    The gradient is freed then, so that there is one block's at a time. ``optimizer`` holds the blocks of the head
    (``head.weight``, ``head.bias`` and ``head.shared_bias``) and nothing else; it need not be stepped nor zeroed. Not
    with a GradScaler, accumulation or clipping, which need all gradients first. Returns handles: ``remove()`` on each
    takes it back.
    """
    if isinstance(getattr(head, "_rows", None), DrawnRows):
        raise ValueError("expected a head without a sampler: the gradient of drawn rows is small; attach_row_optimizer")
    if getattr(head, "_steps_in_backward", False):
        raise RuntimeError("the head steps in the backward pass already; remove the handles first")
    blocks: dict[Tensor, str] = {}
    for name in ("weight", "bias"):
        blocks.update({block: f"{name}.{k}" for k, block in enumerate(cast(Any, getattr(head, name, None)) or ())})
    shared = getattr(head, "shared_bias", None)
    if shared is not None:
        blocks[shared] = "shared_bias"
    frozen = [name for block, name in blocks.items() if not block.requires_grad]
    if frozen:
        raise ValueError(f"expected blocks that require grad, but {', '.join(frozen)} do not")
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for block, name in blocks.items() if block not in held]
    if missing:
        raise ValueError(f"expected the optimizer to hold all blocks of the head, but it lacks {', '.join(missing)}")
    if len(held) > len(blocks):
        raise ValueError(
            f"expected the optimizer to hold the head's {len(blocks)} blocks alone, but it has {len(held)} parameters; "
            f"the others would move with each block"
        )

    def step(block: Tensor) -> None:
        with torch.no_grad():
            optimizer.step()
            block.grad = None
            # NB: DTensor's steps do not count as changes; a second backward pass would use the new weights unnoticed.
            increment_version([block, local_of(block)])

    others: set[StepHandle] = set()
    handles = [StepHandle(block.register_post_accumulate_grad_hook(step), head, others) for block in blocks]
    cast(Any, head)._steps_in_backward = True
    return handles


def check_step_in_backward_upstream(grad: Tensor) -> None:
    """Refuses the gradient of a loss that is not 1: what scaled it would be undone only after the step."""
    if not bool((grad == 1).all()):
        raise RuntimeError(
            f"expected the gradient of the loss to be 1, but got {grad.flatten()[0].item():g}: with step_in_backward "
            f"the weights move in the backward pass, before a GradScaler can unscale and before gradient accumulation "
            f"can add; use neither, or call optimizer.step() yourself without step_in_backward"
        )
