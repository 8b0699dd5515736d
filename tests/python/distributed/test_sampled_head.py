"""ClassParallel with a sampler: what a step sees, and what ranks agree on."""

import math

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import torchmargin
import torchmargin.functional as F
from torchmargin.distributed import ClassParallel, ClassSampler, attach_row_optimizer

from ranks import on, outcomes, share

D, C = 6, 41
BATCHES = {1: [10], 2: [7, 3], 3: [5, 0, 5]}
# Float64 on both sides, of logits up to 64: some hundred roundings of numbers below 100.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def _batch():
    generator = torch.Generator().manual_seed(3)
    x = 10 * torch.randn(10, D, dtype=torch.float64, generator=generator)
    y = torch.randint(0, C, (10,), generator=generator)
    y[4] = -100
    return x, y


def _one(name="ArcFaceLoss", **options):
    torch.manual_seed(11)
    return getattr(torchmargin, name)(D, C, dtype=torch.float64, **options)


def _head(world, sampler, name="ArcFaceLoss", blocks=2, **options):
    mesh = init_device_mesh("cpu", (world,))
    return ClassParallel(_one(name, **options), mesh, blocks=blocks, sampler=sampler, input_grad_scale=1.0)


def _attached(head):
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    attach_row_optimizer(head, optimizer)
    return optimizer


def _whole(head):
    return torch.cat([block.full_tensor() for block in head.weight])


def _step(head, optimizer, x, y):
    loss = head(x.requires_grad_(), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def _train(rank, world, name, rate, steps):
    head = _head(world, ClassSampler(rate), name)
    optimizer, (x, y) = _attached(head), (share(rank, BATCHES[world], each) for each in _batch())
    values = []
    for _ in range(steps):
        head.prepare(y)
        values.append(_step(head, optimizer, x, y))
    return values, _whole(head)


@pytest.mark.parametrize("name", ["ArcFaceLoss", "AdaFaceLoss", "MagFaceLoss"])
def test_rate_1_trains_as_one_process_with_all_classes(name):
    one, (x, y) = _one(name), _batch()
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    expected = []
    for _ in range(3):
        loss = one(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.detach())
    for values, weight in on(3, _train, name, 1.0, 3):
        torch.testing.assert_close(values, expected, **CLOSE)
        torch.testing.assert_close(weight, one.weight.detach(), **CLOSE)


def test_training_is_the_same_at_any_world_size():
    """The same classes are drawn, so losses and weights agree, rows that were not drawn bit for bit."""
    (alone,) = on(1, _train, "ArcFaceLoss", 0.3, 3)
    still = alone[1] == _one().weight
    assert still.all(1).any() and not still.all()
    for world in (2, 3):
        for values, weight in on(world, _train, "ArcFaceLoss", 0.3, 3):
            torch.testing.assert_close(values, alone[0], **CLOSE)
            torch.testing.assert_close(weight, alone[1], **CLOSE)
            assert torch.equal(weight[still], alone[1][still])


def _drawn(rank, world, correction, bias, ignore_index):
    name, options = ("SoftmaxLoss", {"bias": True}) if bias else ("ArcFaceLoss", {"scale": 16.0})
    head = _head(world, ClassSampler(0.3, correction=correction), name, ignore_index=ignore_index, **options)
    x, y = (share(rank, BATCHES[world], each) for each in _batch())
    y = torch.where(y == -100, ignore_index, y)
    if bias:
        for block in head.bias:
            block.to_local().copy_(torch.arange(len(block.to_local())).double() / 7)
    seen = []
    draw = head._rows.draw
    head._rows.draw = lambda *args: seen.append(draw(*args)) or seen[-1]
    loss, statistics = head(x.requires_grad_(), y, return_statistics=True)
    loss.backward()
    biases = torch.cat([block.full_tensor() for block in head.bias]) if bias else None
    return loss.detach(), list(statistics), x.grad, seen[0].classes, seen[0].drawn_by_hash_alone, biases


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 7])  # the second is a class's number
def test_a_step_is_the_loss_among_the_drawn_classes(correction, bias, ignore_index):
    found = on(3, _drawn, correction, bias, ignore_index)
    order = torch.cat([classes for *_, classes, _, _ in found]).argsort()
    classes = torch.cat([classes for *_, classes, _, _ in found])[order]
    alone = torch.cat([alone for *_, alone, _ in found])[order]
    x, y = _batch()
    y = torch.where(y == -100, ignore_index, y)
    valid = y != ignore_index
    assert torch.equal(classes[~alone], y[valid].unique()) and len(classes) < C and alone.any()
    raised = torch.where(alone, -math.log(0.3) if correction else 0.0, 0.0).double()
    added = raised if found[0][5] is None else raised + found[0][5][classes]
    place = torch.where(valid, torch.searchsorted(classes, y), -1)
    margin = {"normalize_input": False, "normalize_weight": False} if bias else {}
    margin |= {} if bias else {"scale": 16.0, "m2": 0.5, "extension": "linear"}
    weight = _one(*(["SoftmaxLoss"] if bias else [])).weight.detach()[classes]
    expected = F.linear_margin_cross_entropy(x.requires_grad_(), weight, place, added, ignore_index=-1, **margin)
    (gradient,) = torch.autograd.grad(expected, x)
    for rank, (loss, statistics, grad, *_) in enumerate(found):
        torch.testing.assert_close(loss, expected.detach(), **CLOSE)
        torch.testing.assert_close(grad, share(rank, BATCHES[3], gradient), **CLOSE)
        assert torch.equal(torch.stack(statistics), torch.stack(found[0][1]))


def _overflow(rank, world):
    """One rank's gradient of rows is infinite in the second step."""
    head = _head(world, ClassSampler(0.5))
    optimizer, (x, y) = _attached(head), (share(rank, BATCHES[world], each) for each in _batch())
    scaler, seen = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    for step in range(3):
        before, optimizer_step = _whole(head), head._rows._tables[0].agreed
        if step == 1 and rank == 0:
            head._rows._tables[0].agreed = lambda g: optimizer_step(g.index_fill(0, torch.tensor([0]), torch.inf))  # noqa: B023
        optimizer.zero_grad()
        scaler.scale(head(x.requires_grad_(), y)).backward()
        head._rows._tables[0].agreed = optimizer_step
        scaler.step(optimizer)
        scaler.update()
        seen.append((scaler.get_scale(), torch.equal(before, _whole(head))))
    return seen


def test_an_infinity_of_a_scaled_loss_makes_every_rank_skip():
    for seen in on(2, _overflow):
        assert seen == [(1024.0, False), (512.0, True), (512.0, False)]


def _recomputed(rank, world, reentrant):
    head = _head(world, ClassSampler(0.3))
    optimizer, (x, y) = _attached(head), (share(rank, BATCHES[world], each) for each in _batch())
    results = []
    for through in (lambda x: checkpoint(lambda rows: head(rows, y), x, use_reentrant=reentrant), lambda x: head(x, y)):
        head._rows.step.fill_(5)
        optimizer.zero_grad()
        own = x.detach().requires_grad_()
        loss = through(own)
        loss.backward()
        assert head._rows.step.item() == 6
        results.append((loss.detach(), own.grad, head._rows.rows.grad.clone()))
    return results


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recompute_sees_the_classes_of_its_first_run(reentrant):
    for checkpointed, plain in on(2, _recomputed, reentrant):
        assert all(torch.equal(one, other) for one, other in zip(checkpointed, plain))


def _smoothed(rank, world, late):
    head = _head(world, ClassSampler(0.5), label_smoothing=0.0 if late else 0.1)
    head.loss.label_smoothing = 0.1
    head(*_batch())


def test_smoothing_with_a_sampler_is_refused():
    for kind, text in outcomes(2, _smoothed, False):
        assert kind == "ValueError" and "no label_smoothing with a sampler: it is a mean over all classes" in text
    for kind, text in outcomes(2, _smoothed, True):
        assert kind == "RuntimeError" and "label_smoothing is a mean over all classes" in text


def _save(rank, world, folder):
    head = _head(world, ClassSampler(0.3))
    optimizer, (x, y) = _attached(head), (share(rank, BATCHES[world], each) for each in _batch())
    losses = []
    for step in range(4):
        losses.append(_step(head, optimizer, x, y))
        if step == 1:
            dcp.save({"head": head.state_dict()}, checkpoint_id=folder)
    return losses


def _load(rank, world, folder):
    head = _head(world, ClassSampler(0.3))
    optimizer, (x, y) = _attached(head), (share(rank, BATCHES[world], each) for each in _batch())
    head.reset_parameters()  # others, whatever is loaded
    state = {"head": head.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    head.load_state_dict(state["head"])
    return [_step(head, optimizer, x, y) for _ in range(2)]


def test_training_goes_on_at_another_world_size(tmp_path):
    """Weights, momentum of every row and the count of draws are in the head's state_dict."""
    folder = str(tmp_path / "checkpoint")
    expected = on(3, _save, folder)[0][2:]
    for world in (2, 1):
        for losses in on(world, _load, folder):
            torch.testing.assert_close(losses, expected, **CLOSE)


def _changed(rank, world):
    head = _head(world, ClassSampler(0.3))
    optimizer, (x, y) = _attached(head), (share(rank, BATCHES[world], each) for each in _batch())

    def step():
        return _step(head, optimizer, x, y).isfinite().item()

    finite = [step()]
    head.append_classes(9)
    before = _whole(head)[:C]
    assert before.shape == (C, D) and head.num_classes == C + 9
    finite += [step(), step()]
    head.reset_parameters()
    states = [store.to_local().abs().sum().item() for store in head._rows.state["momentum_buffer"].buffers()]
    finite.append(step())
    return finite, states, head._rows.step.item()


def test_classes_are_appended_and_all_drawn_anew():
    for finite, states, draws in on(2, _changed):
        assert all(finite) and states == [0.0] * 3 and draws == 1
