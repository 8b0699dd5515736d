"""Optimizers on drawn rows and in the backward pass, under a head of plain PyTorch with the same parts."""

import copy
import functools
import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from torchmargin.distributed import ClassSampler, attach_row_optimizer, step_in_backward
from torchmargin.distributed.rows import DrawnRows, check_step_in_backward_upstream

import ranks

FEATURES = 5
SIZES = (13, 4)  # classes of two blocks
CLASSES = sum(SIZES)

# One optimizer for a row and one for all rows do the same operations on the same numbers. They differ at most in how
# the CPU's vectors round a product and a sum: an ulp of numbers below 4 a step, 4e-16, in a few steps.
CLOSE = {"rtol": 1e-14, "atol": 1e-14}

OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.3),
    "decay": functools.partial(torch.optim.SGD, lr=0.3, weight_decay=0.1),
    "momentum": functools.partial(torch.optim.SGD, lr=0.3, momentum=0.9, weight_decay=0.1),
    "nesterov": functools.partial(torch.optim.SGD, lr=0.3, momentum=0.9, nesterov=True),
    "foreach": functools.partial(torch.optim.SGD, lr=0.3, momentum=0.9, foreach=True),
    "fused": functools.partial(torch.optim.SGD, lr=0.3, momentum=0.9, weight_decay=0.1, fused=True),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.3, initial_accumulator_value=0.1, weight_decay=0.1),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.03, momentum=0.9, centered=True, weight_decay=0.1),
}
ALSO_AT_RATE_1 = {
    "adamw": functools.partial(torch.optim.AdamW, lr=0.03, amsgrad=True),
    "adam fused": functools.partial(torch.optim.Adam, lr=0.03, weight_decay=0.1, fused=True),
    "adamax": functools.partial(torch.optim.Adamax, lr=0.03),
    "nadam": functools.partial(torch.optim.NAdam, lr=0.03),
    "rprop": functools.partial(torch.optim.Rprop, lr=0.03),
}


class Blocks(nn.Module):
    """Buffers under the names of a ParameterList."""

    def __init__(self, blocks):
        super().__init__()
        for k, block in enumerate(blocks):
            self.register_buffer(str(k), block)

    def __iter__(self):
        return self.buffers(recurse=False)


class Head(nn.Module):
    """Logits of the drawn classes, or without a sampler of all, on this rank; the labels' shares of them."""

    def __init__(self, mesh, sampler=None, *, bias=False, sizes=SIZES):
        super().__init__()
        self.ranges, total = [], 0
        for size in sizes:
            chunk = -(-size // mesh.size())
            first = min(mesh.get_local_rank() * chunk, size)
            self.ranges.append((total + first, min(chunk, size - first)))
            total += size
        weight, biases = initial(total)
        as_list = nn.ParameterList if sampler is None else Blocks
        self.weight = as_list([distribute_tensor(part, mesh, [Shard(0)]) for part in weight.split(sizes)])
        self.bias = (
            as_list([distribute_tensor(part, mesh, [Shard(0)]) for part in biases.split(sizes)]) if bias else None
        )
        self._rows = None if sampler is None else DrawnRows(self.weight, self.bias, self.ranges, sampler)
        self._steps_in_backward = False

    def forward(self, x, labels):
        if self._rows is not None:
            sample = self._rows.draw(labels)
            classes, weight, bias = sample.classes, sample.weight, sample.bias
        else:
            classes = torch.cat([torch.arange(first, first + count) for first, count in self.ranges])
            weight = torch.cat([block.to_local() for block in self.weight])
            bias = None if self.bias is None else torch.cat([block.to_local() for block in self.bias])
        self.drawn = classes
        loss = loss_of(x, weight, bias, classes, labels)
        if self._steps_in_backward:
            loss.register_hook(check_step_in_backward_upstream)
        return loss

    def whole(self):
        """All weights (and biases), copies."""
        parts = [self.weight] + ([self.bias] if self.bias is not None else [])
        return [torch.cat([block.detach().full_tensor() for block in part]).clone() for part in parts]


def initial(classes):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(classes, FEATURES, dtype=torch.float64, generator=generator)
    return weight, torch.randn(classes, dtype=torch.float64, generator=generator)


def loss_of(x, weight, bias, classes, labels):
    """A sum over rows and classes, so that no rank needs another's; classes that are no label count too."""
    logits = x @ weight.T + (0 if bias is None else bias)
    return nn.functional.binary_cross_entropy_with_logits(
        logits, (labels[:, None] == classes).double(), reduction="sum"
    )


def batch(step, classes=CLASSES):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(6, FEATURES, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, classes, (6,), generator=generator)


@pytest.fixture
def mesh():
    with ranks.alone() as mesh:
        yield mesh


def train(head, optimizer, steps, *, first=0, accumulated=1):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for k in range(accumulated):
            head(*batch(accumulated * step + k)).backward()
        optimizer.step()


class OneEach:
    """An optimizer for every row, which steps when the row was drawn."""

    def __init__(self, make, bias):
        weight, biases = initial(CLASSES)
        self.rows = [
            [nn.Parameter(row.clone()[None]) for row in part] for part in ((weight, biases) if bias else (weight,))
        ]
        self.optimizers = [make([part[j] for part in self.rows]) for j in range(len(weight))]

    def step(self, batches, drawn):
        """Sums the gradients over batches, of each over its drawn classes."""
        for (x, labels), classes in zip(batches, drawn):
            weight, *bias = [torch.cat([part[j] for j in classes.tolist()]) for part in self.rows]
            loss_of(x, weight, bias[0] if bias else None, classes, labels).backward()
        for j in sorted(set(torch.cat(drawn).tolist())):
            self.optimizers[j].step()
            self.optimizers[j].zero_grad()

    def whole(self):
        return [torch.cat(part).detach() for part in self.rows]


# ---- the sampler's rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", [*OPTIMIZERS, *ALSO_AT_RATE_1])
def test_rate_1_is_the_dense_optimizer(mesh, name, bias):
    make = (OPTIMIZERS | ALSO_AT_RATE_1)[name]
    sampled, dense = Head(mesh, ClassSampler(1), bias=bias), Head(mesh, bias=bias)
    optimizer = make(list(sampled.parameters()))
    attach_row_optimizer(sampled, optimizer)
    train(sampled, optimizer, 5)
    plain = [nn.Parameter(each) for each in dense.whole()]  # DTensors know no fused SGD
    reference = make(plain)
    for step in range(5):
        x, labels = batch(step)
        reference.zero_grad()
        loss_of(x, plain[0], plain[1] if bias else None, torch.arange(CLASSES), labels).backward()
        reference.step()
    before = dense.whole()
    for got, expected, start in zip(sampled.whole(), plain, before):
        torch.testing.assert_close(got, expected.detach(), **CLOSE)
        assert (got - start).abs().max() > 0.01


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_drawn_rows_are_one_optimizer_for_each_row(mesh, name, accumulated, bias):
    """With two samples before a step, of the rows of both."""
    head, each = Head(mesh, ClassSampler(0.2, seed=4), bias=bias), OneEach(OPTIMIZERS[name], bias)
    optimizer = OPTIMIZERS[name](list(head.parameters()))
    attach_row_optimizer(head, optimizer)
    sizes = set()
    for step in range(8):
        before, drawn = head.whole(), []
        batches = [batch(accumulated * step + k) for k in range(accumulated)]
        optimizer.zero_grad()
        for x, labels in batches:
            head(x, labels).backward()
            drawn.append(head.drawn)
        union = torch.unique(torch.cat(drawn))
        sizes.add(len(union))
        assert head._rows.rows.shape == head._rows.rows.grad.shape == (len(union), FEATURES)
        assert torch.equal(head._rows.rows, before[0][union])
        optimizer.step()
        each.step(batches, drawn)
        others = torch.ones(CLASSES, dtype=torch.bool).index_fill(0, union, False)
        for got, expected, old in zip(head.whole(), each.whole(), before):
            torch.testing.assert_close(got, expected, **CLOSE)
            assert torch.equal(got[others], old[others])
            assert (got[union] != old[union]).any()
    assert len(sizes) > 1 and max(sizes) < CLASSES  # rows of one number, then of another, and never all


def test_adamw_counts_the_steps_of_all_rows_as_one(mesh):
    """Documented: its bias correction is that of the whole parameter, so that it differs from an optimizer a row."""
    make = functools.partial(torch.optim.AdamW, lr=0.03)
    head, each = Head(mesh, ClassSampler(0.2, seed=4)), OneEach(make, False)
    optimizer = make(list(head.parameters()))
    attach_row_optimizer(head, optimizer)
    for step in range(3):
        optimizer.zero_grad()
        head(*batch(step)).backward()
        optimizer.step()
        each.step([batch(step)], [head.drawn])
        difference = (head.whole()[0] - each.whole()[0]).abs().max()
        assert difference < 1e-14 if step == 0 else difference > 1e-4
    assert optimizer.state[head._rows.rows].keys() == {"step"} and optimizer.state[head._rows.rows]["step"] == 3


def test_between_steps_there_are_no_rows(mesh):
    head = Head(mesh, ClassSampler(0.3), bias=True)
    assert [name for name, _ in head.named_parameters()] == ["_rows.rows", "_rows.bias_rows"]
    optimizer = OPTIMIZERS["momentum"](list(head.parameters()))
    attach_row_optimizer(head, optimizer)
    for step in range(2):
        rows = head._rows
        assert rows.rows.shape == (0, FEATURES) and rows.bias_rows.shape == (0,)
        assert rows.rows.grad is None and rows.bias_rows.grad is None
        assert not optimizer.state[rows.rows] and not optimizer.state[rows.bias_rows]
        train(head, optimizer, 1, first=step)
    assert head._rows.step == 2
    optimizer.step()  # nothing was drawn
    assert head._rows.rows.shape == (0, FEATURES)


def test_a_sample_is_freed_after_its_backward_pass(mesh):
    sample = Head(mesh, ClassSampler(0.3))._rows.draw(torch.tensor([3]))
    sample.weight.sum().backward()
    assert sample.weight.grad is None
    leaf = weakref.ref(sample.weight)
    del sample
    assert leaf() is None


def test_forward_without_gradients_draws_plain_rows(mesh):
    head = Head(mesh, ClassSampler(0.3))
    with torch.no_grad():
        sample = head._rows.draw(torch.tensor([3, 16]))
    assert not sample.weight.requires_grad
    assert torch.equal(sample.weight, head.whole()[0][sample.classes])
    assert {3, 16} <= set(sample.classes.tolist())
    assert sample.classes[~sample.drawn_by_hash_alone].tolist() == [3, 16]
    assert head._rows.step == 1


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("of_head", [True, False])
def test_zero_grad_forgets_what_was_drawn(mesh, set_to_none, of_head):
    head = Head(mesh, ClassSampler(0.2, seed=4))
    optimizer = OPTIMIZERS["momentum"](list(head.parameters()))
    attach_row_optimizer(head, optimizer)
    head(*batch(0)).backward()
    first = head.drawn
    (head if of_head else optimizer).zero_grad(set_to_none=set_to_none)
    before = head.whole()[0]
    head(*batch(1)).backward()
    second = head.drawn
    assert head._rows.rows.shape[0] == len(second) < len(torch.unique(torch.cat([first, second])))
    optimizer.step()
    assert set((head.whole()[0] != before).any(1).nonzero().flatten().tolist()) == set(second.tolist())


def test_clipping_and_other_changes_of_the_gradient_count(mesh):
    head = Head(mesh, ClassSampler(0.3))
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    attach_row_optimizer(head, optimizer)
    head(*batch(0)).backward()
    before = head.whole()[0]
    torch.nn.utils.clip_grad_norm_(head.parameters(), 0.1)
    head._rows.rows.grad = head._rows.rows.grad * 0.5
    optimizer.step()
    torch.testing.assert_close((head.whole()[0] - before).norm().item(), 0.05, rtol=1e-4, atol=0)  # clipping adds 1e-6


def test_a_second_backward_pass_adds_up(mesh):
    head = Head(mesh, ClassSampler(0.3))
    loss = head(*batch(0))
    loss.backward(retain_graph=True)
    once = head._rows.rows.grad.clone()
    loss.backward()
    assert torch.equal(head._rows.rows.grad, 2 * once)


def test_a_gradient_that_was_changed_stays_when_more_are_added(mesh):
    head = Head(mesh, ClassSampler(1))
    gradients = []
    for step in range(2):
        head.zero_grad()
        head(*batch(step)).backward()
        gradients.append(head._rows.rows.grad.clone())
    head._rows.rows.grad.mul_(3)
    head(*batch(0)).backward()
    torch.testing.assert_close(head._rows.rows.grad, 3 * gradients[1] + gradients[0], **CLOSE)


def test_an_optimizer_may_have_other_parameters_and_groups(mesh):
    head, network = Head(mesh, ClassSampler(1), bias=True), nn.Linear(FEATURES, FEATURES).double()
    rows = {"params": [head._rows.rows], "lr": 0.5, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([{"params": [*network.parameters(), head._rows.bias_rows]}, rows], lr=0.1)
    attach_row_optimizer(head, optimizer)
    before = head.whole()
    head(network(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
    # Adam's first step is the learning rate in size, but for eps.
    torch.testing.assert_close((head.whole()[0] - before[0]).abs(), torch.full_like(before[0], 0.5), rtol=1e-4, atol=0)
    decayed = before[1] * (1 - 0.1 * 0.01)
    torch.testing.assert_close((head.whole()[1] - decayed).abs(), torch.full_like(decayed, 0.1), rtol=1e-4, atol=0)
    assert {"step", "exp_avg", "exp_avg_sq"} == optimizer.state[network.weight].keys()


def test_a_closure_draws_before_the_step(mesh):
    heads, values = [Head(mesh, ClassSampler(0.3)) for _ in range(2)], ([], [])
    for head, of_head in zip(heads, values):
        optimizer = torch.optim.Adagrad(head.parameters(), lr=0.1)
        attach_row_optimizer(head, optimizer)
        for step in range(3):

            def closure(head=head, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = head(*batch(step))
                loss.backward()
                return loss.item()

            if head is heads[0]:
                of_head.append(closure())
                optimizer.step()
            else:
                of_head.append(optimizer.step(closure))
    assert values[0] == values[1]
    assert torch.equal(heads[0].whole()[0], heads[1].whole()[0])


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_skips_moves_nothing(mesh, fused):
    """Fused optimizers are called all the same, and look for themselves."""
    head = Head(mesh, ClassSampler(0.2, seed=4))
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, fused=fused)
    attach_row_optimizer(head, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, bad in enumerate([True, False, True, False]):
        before = head.whole()[0]
        states = {key: value.full_tensor().clone() for key, value in head.state_dict().items() if ".state." in key}
        x, labels = batch(step)
        optimizer.zero_grad()
        scaler.scale(head(torch.where(x == x[0, 0], torch.inf, x) if bad else x, labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = set((head.whole()[0] != before).any(1).nonzero().flatten().tolist())
        assert moved == (set() if bad else set(head.drawn.tolist()))
        for key, value in states.items():
            assert torch.equal(head.state_dict()[key].full_tensor(), value) == bad
    assert scaler.get_scale() == 256.0
    # What came after a skipped step is what a run without it has: the scale is a power of two.
    other = Head(mesh, ClassSampler(0.2, seed=4))
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.1, fused=fused)
    attach_row_optimizer(other, optimizer)
    for step in (1, 3):
        other._rows.step.fill_(step)
        train(other, optimizer, 1, first=step)
    torch.testing.assert_close(head.whole()[0], other.whole()[0], **CLOSE)


def test_grad_scaler_unscales_what_is_clipped(mesh):
    heads = [Head(mesh, ClassSampler(0.3)) for _ in range(2)]
    for head in heads:
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
        attach_row_optimizer(head, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=head is heads[1])
        for step in range(2):
            optimizer.zero_grad()
            scaler.scale(head(*batch(step))).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(head.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(heads[0].whole()[0], heads[1].whole()[0], **CLOSE)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_backward_pass_after_the_step_is_refused(mesh):
    head = Head(mesh, ClassSampler(0.3))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, fused=True)
    attach_row_optimizer(head, optimizer)
    early = head(*batch(0))
    train(head, optimizer, 1)
    with pytest.raises(RuntimeError, match="the class weights have changed since the forward of this backward pass"):
        early.backward()
    train(head, optimizer, 1)


def test_loading_between_forward_and_step_is_refused(mesh):
    head = Head(mesh, ClassSampler(0.3))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    attach_row_optimizer(head, optimizer)
    saved = {key: value.clone() for key, value in head.state_dict().items()}
    loss = head(*batch(0))
    head.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="have changed since the forward"):
        loss.backward()
    head(*batch(0)).backward()
    head.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="have changed since the backward pass.*call zero_grad"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="have changed since the backward pass.*call zero_grad"):
        head(*batch(0)).backward()
    train(head, optimizer, 1)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_that_is_not_attached_is_refused(mesh, fused):
    head = Head(mesh, ClassSampler(0.3))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, fused=fused)
    for _ in range(2):  # gradients need no optimizer
        head(*batch(0)).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="expected the optimizer to be attached"):
        head(*batch(1))


def test_optimizers_without_the_rows_are_refused(mesh):
    head = Head(mesh, ClassSampler(0.3), bias=True)
    with pytest.raises(ValueError, match="expected the optimizer to hold the head's parameters.*but rows is not"):
        attach_row_optimizer(head, torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1))
    with pytest.raises(ValueError, match="but bias_rows is not"):
        attach_row_optimizer(head, torch.optim.SGD([head._rows.rows], lr=0.1))
    with pytest.raises(ValueError, match="expected a head with a sampler"):
        attach_row_optimizer(Head(mesh), torch.optim.SGD(head.parameters(), lr=0.1))


def test_optimizers_that_cannot_go_by_row_are_refused(mesh):
    head = Head(mesh, ClassSampler(0.3))
    with pytest.raises(ValueError, match="expected dampening to be 0, but got 0.1"):
        attach_row_optimizer(head, torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, dampening=0.1))
    with pytest.raises(ValueError, match="expected an optimizer that keeps tensors like its parameter.*Adafactor"):
        attach_row_optimizer(head, torch.optim.Adafactor(head.parameters()))
    with pytest.raises(ValueError, match="expected an optimizer that moves each of rows by itself, but Muon's step"):
        attach_row_optimizer(head, torch.optim.Muon(head.parameters()))
    with pytest.raises(TypeError, match="whose step needs no closure, but got LBFGS"):
        attach_row_optimizer(head, torch.optim.LBFGS(head.parameters()))


def test_an_optimizer_whose_states_change_is_refused(mesh):
    head = Head(mesh, ClassSampler(0.3))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    attach_row_optimizer(head, optimizer)
    train(head, optimizer, 1)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(RuntimeError, match="has begun to keep 'momentum_buffer'.*call attach_row_optimizer"):
        train(head, optimizer, 1)
    attach_row_optimizer(head, optimizer)
    train(head, optimizer, 2)
    assert "_rows.state.momentum_buffer.1" in head.state_dict()


# ---- what is saved ---------------------------------------------------------------------------------------------------


def test_a_state_dict_has_the_states_of_all_rows(mesh):
    head = Head(mesh, ClassSampler(0.3), bias=True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    attach_row_optimizer(head, optimizer)
    names = [f"{bias}state.{name}.{k}" for bias in ("", "bias_") for name in ("exp_avg", "exp_avg_sq") for k in (0, 1)]
    weights = [f"{name}.{k}" for name in ("weight", "bias") for k in (0, 1)]
    assert sorted(head.state_dict()) == sorted(weights + ["_rows.step"] + [f"_rows.{name}" for name in names])
    train(head, optimizer, 3)
    head(*batch(3)).backward()  # rows that are drawn now are no part of it
    head._rows.step.sub_(1)
    saved, optimizer_saved = head.state_dict(), copy.deepcopy(optimizer.state_dict())  # load_state_dict keeps tensors
    assert saved["_rows.state.exp_avg.0"].placements == saved["weight.0"].placements
    assert [value.keys() for value in optimizer_saved["state"].values()] == [{"step"}] * 2

    other = Head(mesh, ClassSampler(0.3), bias=True)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"call attach_row_optimizer\(head, optimizer\) first"):
        other.load_state_dict(saved)
    attach_row_optimizer(other, other_optimizer)
    other.load_state_dict(saved)
    other_optimizer.load_state_dict(optimizer_saved)
    for each, its in ((head, optimizer), (other, other_optimizer)):
        train(each, its, 3, first=3)
    for got, expected in zip(other.whole(), head.whole()):
        assert torch.equal(got, expected)


def test_states_without_the_optimizers_part_are_refused(mesh):
    head = Head(mesh, ClassSampler(0.3))
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    attach_row_optimizer(head, optimizer)
    train(head, optimizer, 1)
    other = Head(mesh, ClassSampler(0.3))
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    attach_row_optimizer(other, other_optimizer)
    other.load_state_dict(head.state_dict())
    with pytest.raises(RuntimeError, match="optimizer's state_dict to be loaded together with the head's.*no 'step'"):
        train(other, other_optimizer, 1)


def test_an_optimizer_that_is_attached_later_starts_anew(mesh):
    head, fresh = Head(mesh, ClassSampler(1)), Head(mesh, ClassSampler(1))
    first = OPTIMIZERS["momentum"](list(head.parameters()))
    attach_row_optimizer(head, first)
    train(head, first, 2)
    for block, other in zip(head.weight, fresh.weight):
        other.copy_(block)
    for each in (head, fresh):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.1)
        attach_row_optimizer(each, optimizer)
        train(each, optimizer, 2, first=2)
    assert torch.equal(head.whole()[0], fresh.whole()[0])
    assert head.state_dict().keys() == fresh.state_dict().keys()
    before = head.whole()[0]
    head(*batch(4)).backward()
    first.step()  # which is no longer the head's
    assert torch.equal(head.whole()[0], before)


def test_a_copy_of_a_head_is_its_own(mesh):
    head = Head(mesh, ClassSampler(0.3))
    optimizer = OPTIMIZERS["momentum"](list(head.parameters()))
    attach_row_optimizer(head, optimizer)
    train(head, optimizer, 1)
    other = copy.deepcopy(head)
    its = OPTIMIZERS["momentum"](list(other.parameters()))
    before = head.whole()[0]
    other(*batch(1)).backward()
    its.step()
    with pytest.raises(RuntimeError, match="expected the optimizer to be attached"):
        other(*batch(1))
    other.zero_grad()
    attach_row_optimizer(other, its)
    train(other, its, 1, first=1)
    assert torch.equal(head.whole()[0], before) and not torch.equal(other.whole()[0], before)


def test_blocks_may_be_appended(mesh):
    head = Head(mesh, ClassSampler(1), sizes=(13,))
    optimizer = OPTIMIZERS["momentum"](list(head.parameters()))
    attach_row_optimizer(head, optimizer)
    x, labels = batch(0, 13)
    head(x, labels).backward()
    optimizer.step()
    momentum = head.state_dict()["_rows.state.momentum_buffer.0"].full_tensor().clone()
    head.weight.register_buffer("1", distribute_tensor(initial(17)[0][13:], mesh, [Shard(0)]))
    head.ranges.append((13, 4))
    head._rows.extend(head.ranges)
    state = head.state_dict()
    assert torch.equal(state["_rows.state.momentum_buffer.0"].full_tensor(), momentum)
    assert torch.equal(state["_rows.state.momentum_buffer.1"].full_tensor(), torch.zeros(4, FEATURES).double())
    before = head.whole()[0]
    train(head, optimizer, 1)
    assert (head.whole()[0] != before).any(1).all()


def test_a_rank_without_classes_steps_along(mesh):
    """AdamW's step count stays that of the other ranks."""
    blocks = [distribute_tensor(torch.zeros(0, FEATURES), mesh, [Shard(0)])]
    rows = DrawnRows(blocks, None, [(3, 0)], ClassSampler(0.3))
    head = nn.Module()
    head._rows = rows
    optimizer, scaler = torch.optim.AdamW(head.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    attach_row_optimizer(head, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        sample = rows.draw(torch.tensor([1, 5]))
        assert sample.weight.shape == (0, FEATURES) and len(sample.classes) == len(sample.drawn_by_hash_alone) == 0
        scaler.scale(sample.weight.sum()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[rows.rows]["step"] == 2


def test_rows_may_be_centers_of_a_class(mesh):
    """Blocks [C, K, D] are drawn by class."""
    whole = initial(14)[0].view(7, 2, FEATURES)
    head, plain = nn.Module(), nn.Parameter(whole.clone())
    blocks = [distribute_tensor(part, mesh, [Shard(0)]) for part in whole.split([4, 3])]
    head._rows = DrawnRows(blocks, None, [(0, 4), (4, 3)], ClassSampler(0.3))
    optimizers = [OPTIMIZERS["momentum"](list(each)) for each in (head.parameters(), [plain])]
    attach_row_optimizer(head, optimizers[0])
    for _ in range(2):  # the same classes twice, so that the optimizer of all rows knows no others
        sample = head._rows.draw(torch.tensor([2, 5]))
        head._rows.step.zero_()
        assert sample.weight.shape == (len(sample.classes), 2, FEATURES)
        for optimizer, rows in zip(optimizers, (sample.weight, plain[sample.classes])):
            optimizer.zero_grad()
            rows.square().sum().backward()
            optimizer.step()
    moved = torch.cat([block.full_tensor() for block in blocks])
    torch.testing.assert_close(moved[sample.classes], plain.detach()[sample.classes], **CLOSE)
    others = torch.ones(7, dtype=torch.bool).index_fill(0, sample.classes, False)
    assert torch.equal(moved[others], whole[others]) and others.any()


def test_a_head_may_be_cast_after_it_was_attached(mesh):
    head = Head(mesh, ClassSampler(1), bias=True)
    optimizer = OPTIMIZERS["momentum"](list(head.parameters()))
    attach_row_optimizer(head, optimizer)
    head.float()
    before = head.whole()
    for _ in range(2):
        sample = head._rows.draw(torch.tensor([1]))
        (sample.weight.sum() + sample.bias.sum()).backward()
        optimizer.step()
    for got, old in zip(head.whole(), before):
        assert got.dtype == torch.float32 and (got != old).all()
    assert head.state_dict()["_rows.state.momentum_buffer.0"].dtype == torch.float32


def _save(rank, world, folder, name, steps):
    mesh = init_device_mesh("cpu", (world,))
    head, optimizer = _attached(mesh, name)
    train(head, optimizer, steps)
    model, of_optimizer = get_state_dict(head, optimizer)
    dcp.save({"head": model, "optimizer": of_optimizer}, checkpoint_id=folder)
    train(head, optimizer, steps, first=steps)
    return _everything(head)


def _load(rank, world, folder, name, steps):
    mesh = init_device_mesh("cpu", (world,))
    head, optimizer = _attached(mesh, name)
    model, of_optimizer = get_state_dict(head, optimizer)
    state = {"head": model, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(head, optimizer, model_state_dict=state["head"], optim_state_dict=state["optimizer"])
    train(head, optimizer, steps, first=steps)
    return _everything(head)


def _attached(mesh, name):
    """Eleven classes over three ranks: four, four and three; two classes: one, one and none."""
    head = Head(mesh, ClassSampler(0.3, seed=2), bias=True, sizes=(11, 2))
    optimizer = (OPTIMIZERS | ALSO_AT_RATE_1)[name](list(head.parameters()))
    attach_row_optimizer(head, optimizer)
    return head, optimizer


def _everything(head):
    return {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in head.state_dict().items()
    }


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_what_three_ranks_save_two_and_one_load(tmp_path, name):
    """Training goes on as on three ranks, at the same draws; this loss needs no exchange."""
    folder, steps = str(tmp_path / "saved"), 3
    saved = ranks.on(3, _save, folder, name, steps)
    assert saved[0]["_rows.step"] == 2 * steps
    for size in (2, 1):
        for loaded in ranks.on(size, _load, folder, name, steps):
            assert loaded.keys() == saved[0].keys()
            for key, value in loaded.items():
                torch.testing.assert_close(value, saved[0][key], **CLOSE)
    assert any(".state." in key and value.abs().max() > 0 for key, value in saved[0].items())


# ---- steps in the backward pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["momentum", "nesterov", "adagrad", "adamw"])
def test_steps_in_the_backward_pass_are_those_after_it(mesh, name, bias):
    make = (OPTIMIZERS | ALSO_AT_RATE_1)[name]
    inside, after = Head(mesh, bias=bias), Head(mesh, bias=bias)
    optimizers = [make(list(head.parameters())) for head in (inside, after)]
    step_in_backward(inside, optimizers[0])
    for step in range(4):
        inside(*batch(step)).backward()
        assert all(block.grad is None for block in inside.parameters())
    train(after, optimizers[1], 4)
    for got, expected in zip(inside.whole(), after.whole()):
        assert torch.equal(got, expected)


def test_one_gradient_at_a_time(mesh):
    """A block's step comes before the next block's gradient."""
    head, seen = Head(mesh, sizes=(3, 4, 5)), []
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(
        lambda *_: seen.append([k for k, block in enumerate(head.weight) if block.grad is not None])
    )
    step_in_backward(head, optimizer)
    head(*batch(0, 12)).backward()
    assert sorted(seen) == [[0], [1], [2]]


def test_handles_take_the_steps_back(mesh):
    head = Head(mesh, bias=True)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    handles = step_in_backward(head, optimizer)
    assert head._steps_in_backward and len(handles) == 4
    with pytest.raises(RuntimeError, match="steps in the backward pass already"):
        step_in_backward(head, optimizer)
    for handle in handles:
        assert head._steps_in_backward
        handle.remove()
    assert not head._steps_in_backward
    before = head.whole()[0]
    (2 * head(*batch(0))).backward()
    assert all(block.grad is not None for block in head.parameters())
    assert torch.equal(head.whole()[0], before)


def test_a_loss_that_is_scaled_is_refused(mesh):
    head = Head(mesh)
    step_in_backward(head, torch.optim.SGD(head.parameters(), lr=0.1))
    before = head.whole()[0]
    for scale in (0.5, 1024.0):
        with pytest.raises(RuntimeError, match=f"to be 1, but got {scale:g}: .*GradScaler.*gradient accumulation"):
            (scale * head(*batch(0))).backward()
    assert torch.equal(head.whole()[0], before)
    check_step_in_backward_upstream(torch.ones(3))
    with pytest.raises(RuntimeError, match="to be 1, but got nan"):
        check_step_in_backward_upstream(torch.tensor(torch.nan))


def test_a_second_backward_pass_after_steps_inside_is_refused(mesh):
    head = Head(mesh)
    step_in_backward(head, torch.optim.AdamW(head.parameters(), lr=0.1, fused=True))
    x = batch(0)[0].requires_grad_()
    loss = sum((x @ block.to_local().T).sum() for block in head.weight)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified inplace"):
        loss.backward()


def test_optimizers_of_other_parameters_are_refused(mesh):
    head = Head(mesh, bias=True)
    with pytest.raises(ValueError, match=r"to hold all blocks of the head, but it lacks weight.1, bias.0, bias.1"):
        step_in_backward(head, torch.optim.SGD([head.weight[0]], lr=0.1))
    with pytest.raises(ValueError, match="the head's 4 blocks alone, but it has 5 parameters"):
        step_in_backward(head, torch.optim.SGD([*head.parameters(), nn.Parameter(torch.zeros(2))], lr=0.1))
    sampled = Head(mesh, ClassSampler(0.3))
    with pytest.raises(ValueError, match="expected a head without a sampler"):
        step_in_backward(sampled, torch.optim.SGD(sampled.parameters(), lr=0.1))
    assert not head._steps_in_backward and not sampled._steps_in_backward
