"""Weights and optimizers that were saved by some ranks and are loaded by others, and plain weights in and out."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh

import torchmargin
from torchmargin import compat
from torchmargin.distributed import ClassParallel, export_weight, import_weight, step_in_backward

from ranks import on, outcomes, share

D, C = 6, 41
BATCHES = {1: [9], 2: [7, 2], 3: [4, 0, 5], 4: [3, 1, 3, 2]}
# Float64 on both sides, of logits up to 64: some hundred roundings a step of numbers below 100.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def _batch():
    generator = torch.Generator().manual_seed(3)
    return 10 * torch.randn(9, D, dtype=torch.float64, generator=generator), torch.randint(
        0, C, (9,), generator=generator
    )


def _head(world, name="AdaFaceLoss", blocks=3, classes=C, **options):
    torch.manual_seed(11)
    loss = getattr(torchmargin, name)(D, classes, dtype=torch.float64, **options)
    return ClassParallel(loss, init_device_mesh("cpu", (world,)), blocks=blocks)


def _train(head, optimizer, rank, world, steps, in_backward=False):
    x, y = (share(rank, BATCHES[world], each) for each in _batch())
    losses = []
    for _ in range(steps):
        loss = head(x.requires_grad_(), y)
        if not in_backward:
            optimizer.zero_grad()
        loss.backward()
        if not in_backward:
            optimizer.step()
        losses.append(loss.detach())
    return losses


def _state(head, optimizer):
    return {"head": head.state_dict(), "optimizer": get_optimizer_state_dict(head, optimizer)}


def _whole(head):
    return torch.cat([block.full_tensor().detach() for block in head.weight])


def _save(rank, world, folder, name, appended):
    head = _head(world)
    if appended:
        head.append_classes(appended)
    optimizer = OPTIMIZERS[name](head.parameters())
    _train(head, optimizer, rank, world, 2)
    dcp.save(_state(head, optimizer), checkpoint_id=folder)
    return _train(head, optimizer, rank, world, 2), _whole(head)


def _load(rank, world, folder, name, appended):
    head = _head(world)
    if appended:
        head.append_classes(appended)
    head.reset_parameters()
    optimizer = OPTIMIZERS[name](head.parameters())
    state = _state(head, optimizer)
    dcp.load(state, checkpoint_id=folder)
    head.load_state_dict(state["head"])
    set_optimizer_state_dict(head, optimizer, state["optimizer"])
    return _train(head, optimizer, rank, world, 2), _whole(head)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("appended", [0, 5])
def test_training_goes_on_at_another_world_size(tmp_path, name, appended):
    """Weights, momentum and squares, AdaFace's statistics: saved by three ranks, loaded by two, one and four."""
    folder = str(tmp_path / "checkpoint")
    losses, weight = on(3, _save, folder, name, appended)[0]
    for world in (2, 1, 4):
        for found, loaded in on(world, _load, folder, name, appended):
            torch.testing.assert_close(found, losses, **CLOSE)
            torch.testing.assert_close(loaded, weight, **CLOSE)


def _stepped(rank, world, blocks):
    head = _head(world, "ArcFaceLoss", blocks)
    optimizer = OPTIMIZERS["sgd"](head.parameters())
    handles = step_in_backward(head, optimizer)
    losses = _train(head, optimizer, rank, world, 3, in_backward=True)
    assert all(block.grad is None for block in head.weight)
    for handle in handles:
        handle.remove()
    losses += _train(head, optimizer, rank, world, 1)
    plain = _head(world, "ArcFaceLoss", blocks)
    expected = _train(plain, OPTIMIZERS["sgd"](plain.parameters()), rank, world, 4)
    return losses, expected, _whole(head), _whole(plain)


@pytest.mark.parametrize("blocks", [1, 4])
def test_steps_in_the_backward_pass_are_steps_after_it(blocks):
    for losses, expected, weight, plain in on(2, _stepped, blocks):
        assert losses == expected and torch.equal(weight, plain)


def _exported(rank, world, whole):
    head = _head(world, "ArcFaceLoss")
    import_weight(head, whole if rank == 0 else None)
    return [block.full_tensor().detach() for block in head.weight], export_weight(head)


def test_a_plain_weight_goes_in_and_out():
    whole = torch.randn(C, D, dtype=torch.float64)
    found = on(3, _exported, whole)
    assert all(torch.equal(torch.cat(blocks), whole) for blocks, _ in found)
    assert torch.equal(found[0][1], whole) and found[1][1] is found[2][1] is None


def _from_insightface(rank, world, counts):
    head = _head(world, "ArcFaceLoss")
    whole = torch.arange(C * D, dtype=torch.float64).view(C, D)
    shards = [{"state_dict_softmax_fc": {"weight": part}} for part in whole.split(counts)]
    import_weight(head, compat.from_insightface(shards)["weight"] if rank == 0 else None)
    return torch.equal(_whole(head), whole)


@pytest.mark.parametrize("counts", [[21, 20], [9, 9, 9, 9, 5]])
def test_shards_of_insightface_fit_any_world_size(counts):
    assert on(3, _from_insightface, counts) == [True] * 3


def _refused(rank, world):
    import_weight(_head(world, "ArcFaceLoss"), torch.zeros(C + 1, D) if rank == 0 else None)


def test_a_plain_weight_of_another_shape_is_refused_on_all_ranks():
    for kind, text in outcomes(2, _refused):
        assert kind == "ValueError" and text.startswith(
            f"import_weight: expected a weight of shape [{C}, {D}] on rank 0"
        )


def _drawn(rank, world):
    head = ClassParallel(
        torchmargin.ArcFaceLoss(D, C, dtype=torch.float64, device="meta"), init_device_mesh("cpu", (world,)), blocks=2
    )
    for block, (first, count) in zip(head.weight, head.class_ranges):
        assert block.to_local().shape == (count, D) and 0 <= first <= C
    return head._seed, _whole(head), _train(head, OPTIMIZERS["sgd"](head.parameters()), rank, world, 1)


def test_a_loss_of_the_meta_device_is_drawn_alike_at_any_world_size():
    """Xavier-uniform: within the bound, and with its deviation (246 numbers; the deviation of theirs is 5 %)."""
    (alone,) = on(1, _drawn)
    bound = (6 / (C + D)) ** 0.5
    assert alone[1].abs().max() < bound and abs(alone[1].std() / (bound / 3**0.5) - 1) < 0.2
    for seed, weight, losses in on(3, _drawn):
        assert seed == alone[0] and torch.equal(weight, alone[1])
        torch.testing.assert_close(losses, alone[2], **CLOSE)
