"""ClassParallel: a margin loss whose classes are spread over ranks. The contract with formulas: docs/distributed.md."""

from __future__ import annotations

import array
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal, cast, overload

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from torchmargin import _extension  # noqa: F401  (registers the ops)
from torchmargin.distributed import blocks as blocks_of
from torchmargin.distributed.partials import Partials, partials_of, stacked
from torchmargin.distributed.rows import DrawnRows, DrawnSample, check_step_in_backward_upstream
from torchmargin.distributed.sampling import Sampler
from torchmargin.losses.base import MarginLoss, MarginStatistics
from torchmargin.losses.numbers import version_of
from torchmargin.losses.recompute import empty_log, key_of

__all__ = ["ClassParallel"]


_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class ClassParallel(nn.Module):
    """A margin loss over the classes of all ranks, for the rows of all ranks.

    ``head(embeddings, labels)`` takes this rank's embeddings [B, D] and labels [B] (classes of all ranks, or the loss's
    ``ignore_index``) and returns the loss over the rows of all ranks: the same scalar on every rank (or, with reduction
    "none", the losses [B] of this rank's rows), whose gradients are those of one process with all classes and all
    rows. B may differ between ranks, and be 0. Every rank calls it, and goes backward, in the same order. What the
    ranks exchange does not depend on the number of classes.

    The weights are DTensors, split over the ranks by class: optimizers, ``clip_grad_norm_``, ``state_dict`` and
    torch.distributed.checkpoint work as with any. The head takes part in no DistributedDataParallel and no FSDP; the
    network before it may, and :attr:`input_grad_scale` says how its gradients meet.

    A bad label on one rank is the same IndexError on all; a rank that refuses its arguments makes all ranks raise, but
    after :meth:`prepare`, when the labels are on their way already. Embeddings must have one dtype, and need gradients
    or not, on all ranks alike: the first call asks them.
    There are no second derivatives.

    Args:
        loss: any MarginLoss. A loss with weights: rank 0's count, and each rank keeps its own rows of them. A loss that
            was made with device="meta" is never held whole: each rank draws its rows where they live, by a hash of the
            class, the same at any number of ranks. The loss's own weight is taken away from it.
        mesh: the ranks, a DeviceMesh of one dimension.
        blocks: into how many blocks of classes the weights are cut. With :func:`step_in_backward` the gradient of
            one block at a time is in memory.
        max_rows: the most rows that a rank will ever give. Shapes are the same in every call then, and ranks need
            not tell each other how many they have.
        input_grad_scale: what the embeddings' gradients are multiplied by. None: the number of ranks, right where
            the network's gradients are averaged over these same ranks (DistributedDataParallel, FSDP2); the
            data-parallel size where that is another; 1 where they are summed.
        sampler: draws the classes of each training step, see :class:`ClassSampler`. Then ``parameters()`` yields only
            the rows of the drawn classes, for :func:`attach_row_optimizer`.
    """

    weight: nn.ParameterList | blocks_of.BufferList  # [c, D] each, [c, K, D] with sub-centers
    bias: nn.ParameterList | blocks_of.BufferList | None
    shared_bias: nn.Parameter | None  # 0-dim, of a loss that is one against all

    def __init__(
        self,
        loss: MarginLoss,
        mesh: DeviceMesh,
        *,
        blocks: int = 1,
        max_rows: int | None = None,
        input_grad_scale: float | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        super().__init__()
        if mesh.ndim != 1:
            raise ValueError(
                f'expected a mesh of one dimension, but got {mesh}; take one of its dimensions, mesh["name"]'
            )
        arguments = {"blocks": blocks, "max_rows": max_rows, "input_grad_scale": input_grad_scale, "sampler": sampler}
        _check_on_all_ranks(loss, mesh, arguments)
        self.mesh = mesh
        self.max_rows = max_rows
        self.input_grad_scale = float(mesh.size() if input_grad_scale is None else input_grad_scale)
        self.sampler = sampler
        self._prepared: tuple[Tensor, Tensor, int] | None = None
        self._gradients_agree = False
        self._steps_in_backward = False

        sizes = blocks_of.block_sizes(loss.num_classes, blocks)
        weight, bias = loss._hand_over_weights()
        if weight.is_meta:
            loss.to_empty(device=torch.device(mesh.device_type))
        self.loss = loss
        self._partials_of = partials_of(loss)
        self.shared_bias = None
        if bias is not None and bias.dim() == 0:
            one = torch.full((), loss._first_bias(), dtype=bias.dtype, device=loss.weight.device)
            self.shared_bias = nn.Parameter(blocks_of.shared_by_all(one if bias.is_meta else bias, mesh))
            bias = None
        of_classes = blocks_of.as_classes(weight, loss.sub_centers)
        self._sizes: list[int] = []
        weights, biases = self._make_list(), self._make_list() if bias is not None else None
        self.weight, self.bias = weights, biases
        self._seed = blocks_of.shared_seed(mesh)
        for first, size in zip(_starts(sizes), sizes):
            if weight.is_meta:
                self._append_drawn(first, size, loss.num_classes)
            else:
                self._append(
                    blocks_of.distribute_block(of_classes[first : first + size], mesh),
                    None if bias is None else blocks_of.distribute_block(bias[first : first + size], mesh),
                )
        self._rows: DrawnRows | None = None
        if sampler is not None:
            self._make_rows()

    # ---- classes -------------------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """C, of all ranks."""
        return sum(self._sizes)

    @property
    def in_features(self) -> int:
        """D."""
        return self.loss.in_features

    @property
    def _of_class(self) -> tuple[int, ...]:
        """The shape of a class's weights."""
        return (self.in_features,) if self.loss.sub_centers == 1 else (self.loss.sub_centers, self.in_features)

    @property
    def _dtype(self) -> torch.dtype:
        """Of the weights: the loss follows every cast."""
        return self.loss.weight.dtype

    @property
    def class_ranges(self) -> list[tuple[int, int]]:
        """This rank's classes in each block: the first one and how many."""
        ranges = []
        for start, size in zip(_starts(self._sizes), self._sizes):
            first, count = blocks_of.local_range(size, self.mesh)
            ranges.append((start + first, count))
        return ranges

    def append_classes(self, count: int) -> list[nn.Parameter]:
        """Adds `count` classes behind the present ones, as a block of its own whose weights are drawn.

        Returns the new parameters, for ``optimizer.add_param_group``; with a sampler there are none, and what is kept
        of the new rows starts as for any. Every rank calls it.
        """
        if count < 1:
            raise ValueError(f"expected the number of new classes to be positive, but got {count}")
        self.loss._check_no_numbers_of_classes("append_classes")
        if self._prepared is not None:
            raise RuntimeError("append_classes: between prepare(labels) and its forward the classes stay as they are")
        if self._steps_in_backward:
            raise RuntimeError("append_classes: remove the handles of step_in_backward, append, and call it again")
        counts = torch.tensor([count, -count], device=self.loss.weight.device)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=self.mesh.get_group())
        if counts[0] != -counts[1]:
            raise RuntimeError(f"append_classes: expected the same number on all ranks, but got {count} on this one")
        first = self.num_classes
        self._append_drawn(first, count, first + count)
        self.loss._hold_no_weights(first + count)
        if self._rows is not None:
            self._rows.extend(self.class_ranges)
            return []
        lists = [self.weight] + ([self.bias] if self.bias is not None else [])
        return [cast(nn.Parameter, blocks[len(blocks) - 1]) for blocks in lists]

    def reset_parameters(self) -> None:
        """Draws all weights anew; biases 0; the loss's state as at the start. Every rank calls it.

        With a sampler, what is kept of rows is as at the start too.
        """
        self._seed = blocks_of.shared_seed(self.mesh)
        for block, (first, _) in zip(self.weight, self.class_ranges):
            blocks_of.fill_drawn(_local(block), first, self.num_classes, self._seed)
        for block in self.bias or ():
            _local(block).zero_()
        if self.shared_bias is not None:
            _local(self.shared_bias).fill_(self.loss._first_bias())
        self.loss.reset_state()
        if self._rows is not None:
            self._rows.reset()

    def _make_list(self) -> nn.ParameterList | blocks_of.BufferList:
        return nn.ParameterList() if self.sampler is None else blocks_of.BufferList()

    def _append_drawn(self, first: int, size: int, num_classes: int) -> None:
        self._append(
            blocks_of.draw_block(first, size, num_classes, self._of_class, self.mesh, self._dtype, self._seed),
            None if self.bias is None else blocks_of.zero_block(size, self.mesh, self._dtype),
        )

    def _append(self, weight: DTensor, bias: DTensor | None) -> None:
        _watch_steps()
        self._sizes.append(weight.shape[0])
        as_kept = nn.Parameter if self.sampler is None else (lambda block: block)
        self.weight.append(as_kept(weight))
        if bias is not None and self.bias is not None:
            self.bias.append(as_kept(bias))

    def _make_rows(self) -> None:
        assert self.sampler is not None
        self._rows = DrawnRows(self.weight, self.bias, self.class_ranges, self.sampler, self.mesh)
        self._draws = empty_log(1, _local(self.weight[0]).device)

    # ---- calls ---------------------------------------------------------------------------------------------------

    def prepare(self, labels: Tensor) -> None:
        """Sends the labels of the next call on their way, before the network's forward. Every rank calls it."""
        if self._prepared is not None:  # its forward did not come
            torch.ops._c10d_functional.wait_tensor(self._prepared[1])
            self._prepared = None
        gathered = self._gather_labels(labels, refused=not _are_labels(labels))
        if not _are_labels(labels):
            torch.ops._c10d_functional.wait_tensor(gathered)
            raise TypeError("prepare: expected labels [B] int64")
        self._prepared = labels, gathered, version_of(labels)

    @overload
    def forward(self, embeddings: Tensor, labels: Tensor, return_statistics: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(
        self, embeddings: Tensor, labels: Tensor, return_statistics: Literal[True]
    ) -> tuple[Tensor, MarginStatistics]: ...
    def forward(
        self, embeddings: Tensor, labels: Tensor, return_statistics: bool = False
    ) -> Tensor | tuple[Tensor, MarginStatistics]:
        loss, ops = self.loss, torch.ops.torchmargin
        all_labels = self._labels_of_all(embeddings, labels)
        per_rank = all_labels.shape[0] // self.mesh.size()
        self._check_gradients_agree(embeddings)
        rows = ops._gather_rows(embeddings, per_rank, self._dtype, self.input_grad_scale, *self._group)
        smoothed = loss.label_smoothing > 0
        angle = self._target_angle(rows, all_labels) if loss.reads_angle else None
        given = None if angle is None else angle.to(loss.acc_dtype)
        before, fresh = loss._advance_once(rows, all_labels, given)
        try:
            arguments: dict[str, Any] = {**loss._row_margins(rows, all_labels, given)}
            arguments.update(loss._negatives(rows, all_labels, given))
            if "hard_coefficients" in arguments and "hard_threshold" not in arguments:
                angle = self._target_angle(rows, all_labels) if angle is None else angle
                arguments["hard_threshold"] = self._plain_margin(angle, arguments)
            arguments["compute_dtype"] = loss._compute_dtype(embeddings)
            arguments.update(self._partials_of.sent(smoothed, return_statistics))
            found = self._partials(rows, all_labels, arguments)
            penalty = loss.row_penalty(loss._widened(embeddings), labels)
        except BaseException:
            loss._settle(before, None)
            raise
        loss._settle(before, fresh)

        mine = self._merged(self._exchanged(found, smoothed, return_statistics), labels.shape[0])
        losses = self._partials_of.losses(mine, labels, self.num_classes)
        valid = labels != loss.ignore_index
        if penalty is not None:
            losses = losses + self._scaled(torch.where(valid, penalty, 0.0))
        count = (all_labels != loss.ignore_index).sum()
        divisor = count
        if (weights := loss._row_weights(labels)) is not None:
            losses = weights * losses
        if loss.reduction == "mean" and (of_all := loss._row_weights(all_labels)) is not None:
            divisor = of_all.sum()
        sums = [losses.sum() / divisor if loss.reduction == "mean" else losses.sum()]
        if return_statistics:
            right = mine.plain_target_logit > mine.max_other_logit
            statistics = (mine.target_angle, right.double(), mine.max_other_logit)
            sums += [torch.where(valid, each, 0.0).sum() / count for each in statistics]
        value: Tensor = losses
        if loss.reduction != "none" or return_statistics:
            value, *means = ops._global_sum(torch.stack(sums), *self._group).to(loss.acc_dtype).unbind()
        if loss.reduction == "none":
            value = losses
        value = self._guarded(value.to(loss.acc_dtype))
        if return_statistics:
            return value, MarginStatistics(*(mean.detach() for mean in means))
        return value

    @torch.no_grad()
    def logits(self, embeddings: Tensor) -> Tensor:
        """The logits [B, C] of this rank's rows without a margin, for inference. Every rank calls it."""
        sent = self._for_all_rows(embeddings, self._local_logits)
        count, ranks = embeddings.shape[0], self.mesh.size()
        found = []
        for block, size in zip(sent, self._sizes):
            columns = self._all_to_all(block.contiguous()).view(ranks, -1, block.shape[1])
            found.append(columns.transpose(0, 1).flatten(1)[:count, :size])
        return torch.cat(found, 1)

    @torch.no_grad()
    def top1(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit [B] of each of this rank's rows, without a margin, and its class [B].

        Of equal logits the first class counts, and NaN is the largest, as in torch.max. No rank holds logits of more
        than its own classes. Every rank calls it.
        """
        best = self._for_all_rows(embeddings, self._local_top1)
        found = self._all_to_all(torch.stack(best, 1)).view(self.mesh.size(), -1, 2)[:, : embeddings.shape[0]]
        largest = found[..., 0].amax(0)
        is_largest = (found[..., 0] == largest) | found[..., 0].isnan()
        classes = torch.where(is_largest, found[..., 1], math.inf).amin(0)
        return largest.to(self.loss.acc_dtype), classes.long()

    # ---- what a call is made of ----------------------------------------------------------------------------------

    @property
    def _group(self) -> tuple[int, str]:
        return self.mesh.size(), self.mesh.get_group().group_name

    def _gather_labels(self, labels: Any, refused: bool) -> Tensor:
        place = labels if isinstance(labels, Tensor) else torch.empty(0, device=self.mesh.device_type)
        gathered: Tensor = torch.ops.torchmargin._gather_labels(
            place, self.max_rows, self.loss.ignore_index, refused, *self._group
        )
        return gathered

    def _labels_of_all(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Labels of all ranks [R n]. Whatever one rank refuses is an error on all of them."""
        prepared, self._prepared = self._prepared, None
        try:
            self._check_call(embeddings, labels, prepared)
        except BaseException:
            if prepared is None:
                torch.ops._c10d_functional.wait_tensor(self._gather_labels(labels, refused=True))
            raise
        gathered = self._gather_labels(labels, refused=False) if prepared is None else prepared[1]
        checked: Tensor = torch.ops.torchmargin._checked_labels(
            torch.ops._c10d_functional.wait_tensor(gathered), self.num_classes, self.loss.ignore_index, self.mesh.size()
        )
        return checked

    def _check_call(self, embeddings: Tensor, labels: Tensor, prepared: tuple[Tensor, Tensor, int] | None) -> None:
        self._check_wrapping()
        self.loss._follow_buffers()  # refuses what is lent with a gradient
        if prepared is not None and (prepared[0] is not labels or prepared[2] != version_of(labels)):
            raise RuntimeError(
                "ClassParallel: expected the labels that prepare() was given, as they were, but got others"
            )
        if self._steps_in_backward and self.loss.reduction == "none":
            raise RuntimeError("ClassParallel: step_in_backward wants a scalar loss, but the reduction is 'none'")
        if self.sampler is not None and self.loss.label_smoothing > 0:
            raise RuntimeError(
                "ClassParallel: label_smoothing is a mean over all classes, which a sampler does not see; set it to 0"
            )
        if not self.loss._fits(embeddings, labels):  # the op says what is wrong
            torch.ops.torchmargin.linear_margin_cross_entropy(embeddings, self.loss.weight, labels)
            raise TypeError("ClassParallel: expected embeddings [B, D] and labels [B] int64")
        self._check_dtype(embeddings)

    def _check_dtype(self, embeddings: Tensor) -> None:
        if embeddings.dtype != self._dtype and not self.loss._widens(embeddings) and not _autocast(embeddings):
            raise TypeError(
                f"ClassParallel: expected embeddings in {self._dtype}, as the weights, but got {embeddings.dtype}"
            )

    def _check_wrapping(self) -> None:
        if getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
            raise RuntimeError(
                "ClassParallel: its weights differ from rank to rank, so it takes part in no DistributedDataParallel; "
                "wrap the network alone and call the head on its output"
            )
        replaced = self._rows is not None and any(isinstance(each, DTensor) for each in self._rows.parameters())
        if isinstance(self, FSDPModule) or replaced or not all(self._is_own(block) for block in self.weight):
            raise RuntimeError(
                "ClassParallel: its weights are sharded already, so it takes part in no FSDP; shard the network alone "
                "and call the head on its output"
            )

    def _is_own(self, block: Tensor) -> bool:
        return isinstance(block, DTensor) and block.device_mesh == self.mesh and block.placements == (Shard(0),)

    def _check_gradients_agree(self, embeddings: Tensor) -> None:
        """Once, for a rank whose embeddings are others would leave the rest waiting, or send what they cannot read."""
        if self._gradients_agree or not torch.is_grad_enabled():
            return
        dtype = _DTYPES.index(embeddings.dtype)
        mine = [embeddings.requires_grad, not embeddings.requires_grad, dtype, -dtype]
        seen = torch.tensor(mine, dtype=torch.int32, device=embeddings.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self.mesh.get_group())
        some, others, largest, smallest = seen.tolist()
        if largest != -smallest:
            raise RuntimeError(
                f"ClassParallel: expected embeddings of one dtype on all ranks, but got {_DTYPES[largest]} and "
                f"{_DTYPES[-smallest]}"
            )
        if some and others:
            raise RuntimeError(
                "ClassParallel: expected embeddings that require grad on all ranks or on none, but they do on some"
            )
        self._gradients_agree = True

    @torch.no_grad()
    def _target_angle(self, rows: Tensor, labels: Tensor) -> Tensor:
        """The angle [R n] of each row to its class, float64: the rank that holds the class tells all."""
        angle = torch.zeros_like(labels, dtype=torch.float64)
        for block, (first, _) in zip(self.weight, self.class_ranges):
            weight = blocks_of.as_rows(_local(block))
            angle += torch.ops.torchmargin._linear_target_angle(rows, weight, labels - first, self.loss.sub_centers)
        everywhere: Tensor = funcol.all_reduce(angle, "sum", self.mesh.get_group())
        return everywhere

    def _plain_margin(self, angle: Tensor, margins: dict[str, Any]) -> Tensor:
        """Which cosines are hard for each row, where the loss does not say it."""
        of_all = self.loss._margin()
        threshold: Tensor = torch.ops.torchmargin._plain_margin(
            angle, of_all["m1"], of_all["m2"], of_all["m3"], margins.get("sample_m2"), margins.get("sample_m3")
        )
        return threshold

    def _partials(self, rows: Tensor, labels: Tensor, arguments: dict[str, Any]) -> list[Partials]:
        """What this rank's classes find for all rows, block by block."""
        op, arguments = self._partials_of.op, {**self._partials_of.arguments(), **arguments}
        shared = self.shared_bias
        if shared is not None:
            here = cast(DTensor, shared).to_local()
            shared = torch.ops.torchmargin._shared_by_ranks(here, *self._group)
        if self._rows is not None and self.training:
            sample = self._drawn(self._rows, rows, labels)
            bias = shared if sample.bias is None else sample.bias
            if self.sampler is not None and self.sampler.correction:
                raised = torch.where(sample.drawn_by_hash_alone, -math.log(self.sampler.rate), 0.0).to(rows.dtype)
                bias = raised if bias is None else bias + raised
            place = torch.searchsorted(sample.classes, labels)
            at = sample.classes[place.clamp(max=max(len(sample.classes) - 1, 0))] if len(sample.classes) else place
            present = (place < len(sample.classes)) & (at == labels) & (len(sample.classes) > 0)
            weight = blocks_of.as_rows(sample.weight)
            found = Partials(*op(rows, weight, torch.where(present, place, -1), bias, calls=1, **arguments))
            if found.hardest_class.numel() > 0 and len(sample.classes) > 0:
                hardest = sample.classes[found.hardest_class.clamp(min=0)]
                found = found._replace(hardest_class=torch.where(found.hardest_class < 0, -1, hardest))
            return [found]
        blocks = []
        biases: Sequence[Tensor | None] = [None] * len(self.weight) if self.bias is None else list(self.bias)
        # NB: to_local() one block at a time: nodes of all of them up front would run last, and hold all gradients.
        for block, bias_block, (first, _) in zip(self.weight, biases, self.class_ranges):
            bias = shared if bias_block is None else cast(DTensor, bias_block).to_local()
            weight = blocks_of.as_rows(cast(DTensor, block).to_local())
            found = Partials(*op(rows, weight, labels - first, bias, calls=len(self.weight), **arguments))
            hardest = torch.where(found.hardest_class < 0, -1, found.hardest_class + first)
            blocks.append(found._replace(hardest_class=hardest))
        return blocks

    def _drawn(self, drawn_rows: DrawnRows, rows: Tensor, labels: Tensor) -> DrawnSample:
        """The classes of this forward; those that its own first run saw, if activation checkpointing runs it again."""
        with torch.no_grad():
            if self._draws.device != rows.device:
                self._draws = empty_log(1, rows.device)
            count = drawn_rows.step.double().view(1)
            step, fresh = torch.ops.torchmargin._recall_state(self._draws, key_of(rows, labels), count)
            known = torch.where(labels == self.loss.ignore_index, -1, labels)
        sample = drawn_rows.draw(known, step.long().squeeze())
        drawn_rows.step.add_(fresh.long())
        return sample

    def _exchanged(self, found: list[Partials], smoothed: bool, with_statistics: bool) -> Partials:
        """What every rank found for this rank's rows, [R, n] each."""
        here = found[0] if len(found) == 1 else self._partials_of.merge(stacked(found))
        differentiable = [here.others, here.target_logit] + ([here.logit_sum] if smoothed else [])
        differentiable += here.hardest_logit.unbind(1)
        plain = list(here[3:6]) if with_statistics else []
        plain += here.hardest_class.unbind(1)
        sent = [each.double() for each in differentiable + plain]
        received = torch.ops.torchmargin._exchange_partials(sent, len(differentiable), *self._group)
        parts = iter(received)
        others, target_logit = next(parts), next(parts)
        nothing, most = torch.zeros_like(target_logit), here.hardest_logit.shape[1]
        logit_sum = next(parts) if smoothed else nothing
        hardest_logit = [next(parts) for _ in range(most)]
        angle, largest, plain_logit = (next(parts) if with_statistics else nothing for _ in range(3))
        none = nothing.new_zeros(*nothing.shape, 0)
        return Partials(
            others,
            target_logit,
            logit_sum,
            angle,
            largest,
            plain_logit,
            torch.stack(hardest_logit, 2) if most else none,
            torch.stack(list(parts), 2).long() if most else none.long(),
        )

    def _merged(self, shards: Partials, rows: int) -> Partials:
        """Of shards [R, n] the first `rows` of one [n]."""
        return Partials(*(each[:rows] for each in self._partials_of.merge(shards)))

    def _scaled(self, penalty: Tensor) -> Tensor:
        """Its gradient by `input_grad_scale`, as all that reach the embeddings: it alone does not pass _gather_rows."""
        if penalty.requires_grad and self.input_grad_scale != 1:
            scale = self.input_grad_scale
            penalty.register_hook(lambda grad: grad * scale)
        return penalty

    def _guarded(self, value: Tensor) -> Tensor:
        """Autograd does not see a step on a DTensor: a second backward after it would be silently wrong."""
        if not value.requires_grad or torch.compiler.is_compiling():
            return value
        versions = [block._version for block in self.weight]

        def check(grad: Tensor) -> None:
            if self._rows is None and versions != [block._version for block in self.weight]:
                raise RuntimeError(
                    "ClassParallel: the weights have changed since this forward (an optimizer has stepped), so its "
                    "gradients are not available any more; run the forward again"
                )
            if self._steps_in_backward:
                check_step_in_backward_upstream(grad)

        value.register_hook(check)
        return value

    # ---- logits --------------------------------------------------------------------------------------------------

    def _for_all_rows(self, embeddings: Tensor, found: Any) -> list[Tensor]:
        """found(rows) for the rows of all ranks."""
        count, refusal = 0, None
        try:
            self._check_wrapping()
            self.loss._follow_buffers()  # may refuse, as in _check_call
            if not isinstance(embeddings, Tensor) or embeddings.dim() != 2 or embeddings.shape[1] != self.in_features:
                raise RuntimeError(f"ClassParallel: expected embeddings [B, {self.in_features}]")
            self._check_dtype(embeddings)
            count = embeddings.shape[0]
        except Exception as error:
            refusal = error
        place = 0 if refusal is None else self.mesh.get_local_rank() + 1
        dtype = 0 if refusal is not None else _DTYPES.index(embeddings.dtype)
        seen = torch.tensor([count, place, dtype, -dtype], device=self.loss.weight.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self.mesh.get_group())
        most, refused, largest, smallest = seen.tolist()
        if refusal is not None:
            raise refusal
        if refused > 0:
            raise RuntimeError(
                f"ClassParallel: rank {refused - 1} of the group refused its arguments; its own error says why"
            )
        if largest != -smallest:
            raise RuntimeError("ClassParallel: expected embeddings of one dtype on all ranks")
        rows = torch.ops.torchmargin._gather_rows(embeddings.detach(), max(1, most), self._dtype, 1.0, *self._group)
        result: list[Tensor] = found(rows, self.loss._compute_dtype(embeddings))
        return result

    def _block_logits(self, rows: Tensor, k: int, compute_dtype: torch.dtype | None) -> Tensor:
        bias = self.shared_bias if self.bias is None else self.bias[k]
        return self.loss._logits_among(
            rows, blocks_of.as_rows(_local(self.weight[k])), None if bias is None else _local(bias), compute_dtype
        )

    def _local_logits(self, rows: Tensor, compute_dtype: torch.dtype | None) -> list[Tensor]:
        """[R n, chunk] for each block, padded to what the rank with the most classes has."""
        found = []
        for k, ((_, count), size) in enumerate(zip(self.class_ranges, self._sizes)):
            chunk = -(-size // self.mesh.size())
            logits = rows.new_zeros(rows.shape[0], chunk, dtype=self.loss.acc_dtype)
            if count:
                logits[:, :count] = self._block_logits(rows, k, compute_dtype)
            found.append(logits)
        return found

    def _local_top1(self, rows: Tensor, compute_dtype: torch.dtype | None) -> list[Tensor]:
        """The largest logit [R n] of this rank's classes and its class, float64 both."""
        best = rows.new_full((rows.shape[0],), -math.inf, dtype=torch.float64)
        classes = torch.full_like(best, math.inf)
        for k, (first, count) in enumerate(self.class_ranges):
            if count:
                largest, place = self._block_logits(rows, k, compute_dtype).max(1)
                better = (largest.double() > best) | (largest.isnan() & ~best.isnan())
                best = torch.where(better, largest.double(), best)
                classes = torch.where(better, (first + place).double(), classes)
        return [best, classes]

    def _all_to_all(self, tensor: Tensor) -> Tensor:
        received = torch.empty_like(tensor)
        dist.all_to_all_single(received, tensor, group=self.mesh.get_group())
        return received

    # ---- nn.Module -----------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """A copy waits for no labels, and no optimizer steps on it."""
        return {**self.__dict__, "_prepared": None, "_steps_in_backward": False}

    def extra_repr(self) -> str:
        return f"ranks={self.mesh.size()}, num_classes={self.num_classes}, blocks={len(self._sizes)}"


def _check_on_all_ranks(loss: MarginLoss, mesh: DeviceMesh, arguments: dict[str, Any]) -> None:
    """What one rank refuses is an error on all. All must want the same head: what differs would hang or be wrong."""
    mine, refusal = None, None
    try:
        _check_arguments(loss, mesh, **arguments)
        mine = {**arguments, "sampler": _text_of(arguments["sampler"]), **_description_of(loss)}
    except Exception as error:
        refusal = error
    everywhere: list[Any] = [None] * mesh.size()
    dist.all_gather_object(everywhere, mine, group=mesh.get_group())
    if refusal is not None:
        raise refusal
    for rank, theirs in enumerate(everywhere):
        if theirs is None:
            raise RuntimeError(f"ClassParallel: rank {rank} of the group refused its arguments; its own error says why")
    first = everywhere[0]
    for rank, theirs in enumerate(everywhere):
        differing = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
        if differing:
            texts = [", ".join(f"{name}={of.get(name)!r}" for name in differing) for of in (first, theirs)]
            raise RuntimeError(
                f"ClassParallel: expected the same arguments on all ranks, but rank 0 has {texts[0]} and rank {rank} "
                f"has {texts[1]}"
            )


def _description_of(loss: MarginLoss) -> dict[str, Any]:
    return {
        "loss": type(loss).__name__,
        "in_features": loss.in_features,
        "num_classes": loss.num_classes,
        "sub_centers": loss.sub_centers,
        "dtype": str(loss.weight.dtype),
        "meta": loss.weight.is_meta,
        "bias": loss.bias is not None,
        **{name: _digest_of(of) if isinstance(of, Tensor) else of for name, of in loss._numbers.items()},
        **{name: getattr(loss, name) for name in loss._options},
    }


def _digest_of(numbers: Tensor) -> str:
    """The same for the same float64 numbers [C]."""
    digest = hashlib.sha256(array.array("d", numbers.tolist()).tobytes()).hexdigest()
    return f"{list(numbers.shape)} with the digest {digest[:12]}"


def _check_arguments(
    loss: MarginLoss,
    mesh: DeviceMesh,
    blocks: int,
    max_rows: int | None,
    input_grad_scale: float | None,
    sampler: Sampler | None,
) -> None:
    _check_loss(loss)
    for name, value in (("blocks", blocks), ("max_rows", max_rows)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise TypeError(f"expected {name} to be an int, but got {value!r}")
    if not 1 <= blocks <= loss.num_classes:
        raise ValueError(f"expected blocks in [1, {loss.num_classes}], the number of classes, but got {blocks}")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"expected max_rows to be positive, but got {max_rows}")
    if input_grad_scale is not None and not (0 < input_grad_scale < math.inf):
        raise ValueError(f"expected input_grad_scale to be finite and positive, but got {input_grad_scale}")
    if loss.weight.device.type not in ("meta", mesh.device_type):
        raise ValueError(
            f"expected the loss on {mesh.device_type}, where the mesh is, or on meta, but got {loss.weight.device}"
        )
    if sampler is not None and loss.label_smoothing > 0:
        raise ValueError("expected no label_smoothing with a sampler: it is a mean over all classes")
    if sampler is not None and sampler.correction and not partials_of(loss).takes_correction:
        raise ValueError(
            f"expected a sampler without correction: it is added to the logits of a softmax, and {type(loss).__name__} "
            f"has none, or ranks its hardest classes by products alone"
        )


@functools.cache
def _watch_steps() -> None:
    """Every step of an optimizer counts as a change of the DTensors it moves: foreach and fused steps on them do not
    move autograd's counters, and a backward pass after one would use the new weights unnoticed."""

    def count(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            moved = [each for each in group["params"] if isinstance(each, DTensor) and each.grad is not None]
            torch.autograd.graph.increment_version(moved)

    register_optimizer_step_post_hook(count)


def _check_loss(loss: MarginLoss) -> None:
    if not isinstance(loss, MarginLoss):
        raise TypeError(f"expected loss to be a torchmargin.MarginLoss, but got {type(loss).__name__}")
    if type(loss).forward is not MarginLoss.forward:
        raise TypeError(
            f"expected a loss with MarginLoss's forward, but {type(loss).__name__} has its own, which knows nothing of "
            f"ranks; a loss says what it adds in sample_margins, advance and row_penalty"
        )
    if not loss._holds_weights:
        raise ValueError("expected a loss with its own weights, but they are in a ClassParallel already")
    if "weight" not in loss._parameters:
        raise TypeError(
            "expected a loss whose weight is a parameter, but it is computed: by a parametrization or a hook"
        )
    others = [name for name, _ in loss.named_parameters() if name not in ("weight", "bias")]
    if others:
        raise TypeError(f"expected a loss without parameters beside weight and bias, but got {', '.join(others)}")


def _text_of(sampler: Sampler | None) -> str:
    """The same on all ranks for the same sampler."""
    if sampler is None or type(sampler).__repr__ is not object.__repr__:
        return repr(sampler)
    return f"{type(sampler).__name__}(rate={sampler.rate}, correction={sampler.correction})"


def _are_labels(labels: object) -> bool:
    return isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.dim() == 1


def _autocast(embeddings: Tensor) -> bool:
    return torch.is_autocast_enabled(embeddings.device.type) and embeddings.dtype != torch.float64


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:k]) for k in range(len(sizes))]


def _local(block: Tensor) -> Tensor:
    """The rank's own rows themselves: what is written to them is in the DTensor."""
    return cast(DTensor, block)._local_tensor
