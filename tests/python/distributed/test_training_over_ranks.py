"""A network and a head over ranks, trained, beside one process with all rows and all classes."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import torchmargin
from torchmargin.distributed import ClassParallel, class_parallel_cross_entropy

from ranks import on, share

IN, D, C = 7, 6, 23
BATCHES = {1: [9], 2: [7, 2], 3: [4, 0, 5]}
# Float64 on both sides, of logits up to 64 and their gradients: some hundred roundings a step of numbers below 1000.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
LOSSES = {
    "AdaFace": ("AdaFaceLoss", {}),
    "MagFace": ("MagFaceLoss", {"a_min": 1.0, "a_max": 4.0}),
    "SphereFace, annealed": ("SphereFaceLoss", {"lambda_base": 5.0}),
    "CosFace, margins of classes": ("CosFaceLoss", {"margin": torch.linspace(0.1, 0.4, C, dtype=torch.float64)}),
    "ArcFace, smoothed, bias": ("MarginLoss", {"scale": 16.0, "m2": 0.3, "label_smoothing": 0.1, "bias": True}),
}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def _batch():
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(0, C, (9,), generator=generator)
    y[5] = -100
    return torch.randn(9, IN, dtype=torch.float64, generator=generator), y


def _parts(name):
    torch.manual_seed(11)
    kind, options = LOSSES[name]
    network = nn.Sequential(nn.Linear(IN, 12), nn.PReLU(), nn.Linear(12, D)).double()
    return network, getattr(torchmargin, kind)(D, C, dtype=torch.float64, **options)


def _full(parameters):
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in parameters]


def _steps(network, head, x, y, optimizers, steps, accumulated=1):
    values = []
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for _ in range(accumulated):
            value, statistics = head(network(x), y, return_statistics=True)
            (value / accumulated).backward()
        for optimizer in optimizers:
            optimizer.step()
        values.append(torch.stack([value.detach(), *statistics]))
    return torch.stack(values)


def _trained(rank, world, name, optimizer, wrapped, accumulated):
    network, loss = _parts(name)
    mesh = init_device_mesh("cpu", (world,))
    head = ClassParallel(loss, mesh, blocks=2)
    network = DistributedDataParallel(network) if wrapped == "ddp" else fully_shard(network, mesh=mesh)
    x, y = (share(rank, BATCHES[world], each) for each in _batch())
    optimizers = [OPTIMIZERS[optimizer](module.parameters()) for module in (network, head)]
    values = _steps(network, head, x, y, optimizers, 4, accumulated)
    weight = torch.cat(_full(head.weight))
    state = {key: of for key, of in loss.state_dict().items() if not isinstance(of, DTensor)}
    return values, _full(network.parameters()), weight, state


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("optimizer", "wrapped", "accumulated"), [("sgd", "ddp", 1), ("adamw", "fsdp2", 1), ("sgd", "ddp", 2)]
)
def test_training_is_that_of_one_process(name, optimizer, wrapped, accumulated):
    """Losses, statistics, the network, the class weights and the state of the loss, on batches of 4, 0 and 5 rows."""
    network, loss = _parts(name)
    optimizers = [OPTIMIZERS[optimizer](module.parameters()) for module in (network, loss)]
    values = _steps(network, loss, *_batch(), optimizers, 4, accumulated)
    for found, parameters, weight, state in on(3, _trained, name, optimizer, wrapped, accumulated):
        torch.testing.assert_close(found, values, **CLOSE)
        torch.testing.assert_close(parameters, _full(network.parameters()), **CLOSE)
        torch.testing.assert_close(weight, loss.weight.detach(), **CLOSE)
        for key, of in state.items():
            # AdaFace's statistics are float32: a rounding apart where the lengths' sums are.
            torch.testing.assert_close(of, loss.state_dict()[key], rtol=1e-6, atol=0)


class Hooks(torchmargin.ArcFaceLoss):
    """Notes which rows its hooks see."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("calls", torch.tensor(0.0))
        self.seen = []

    def advance(self, embeddings, labels):
        self.seen.append(("advance", embeddings.detach().clone(), labels.clone()))
        self.calls.add_(1)

    def sample_margins(self, embeddings, labels):
        self.seen.append(("sample_margins", embeddings.detach().clone(), labels.clone()))
        return {}

    def row_penalty(self, embeddings, labels):
        self.seen.append(("row_penalty", embeddings.detach().clone(), labels.clone()))


def _hooked(rank, world):
    torch.manual_seed(11)
    loss = Hooks(D, C, dtype=torch.float64)
    head = ClassParallel(loss, init_device_mesh("cpu", (world,)))
    x = torch.arange(9 * D, dtype=torch.float64).view(9, D)
    mine, y = share(rank, BATCHES[world], x).requires_grad_(), share(rank, BATCHES[world], _batch()[1])
    head(mine, y)
    first, loss.seen = loss.seen, []
    head.eval()
    head(mine, y)
    evaluated = [name for name, *_ in loss.seen]
    head.train()
    before = loss.calls.item()
    checkpoint(lambda rows: head(rows, y), mine, use_reentrant=False).backward()
    return first, evaluated, loss.calls.item() - before


def test_hooks_see_the_rows_of_all_ranks_once_a_forward():
    """advance before sample_margins, both with all rows; row_penalty with this rank's. A recompute moves no state."""
    x, y = torch.arange(9 * D, dtype=torch.float64).view(9, D), _batch()[1]
    for rank, (first, evaluated, calls) in enumerate(on(3, _hooked)):
        assert [name for name, *_ in first] == ["advance", "sample_margins", "row_penalty"]
        for _, rows, labels in first[:2]:
            valid = labels != -100
            assert (
                len(rows) == 15 and torch.equal(rows[valid], x[y != -100]) and torch.equal(labels[valid], y[y != -100])
            )
        assert torch.equal(first[2][1], share(rank, BATCHES[3], x))
        assert evaluated == ["sample_margins", "row_penalty"] and calls == 1


def _counted(rank, world, statistics):
    head = ClassParallel(torchmargin.ArcFaceLoss(D, C), init_device_mesh("cpu", (world,)), blocks=3, max_rows=4)
    x, y = torch.randn(4, D).requires_grad_(), torch.randint(0, C, (4,))
    head(x, y).backward()  # the first call asks whether all ranks want gradients
    with CommDebugMode() as counted:
        found = head(x, y, return_statistics=statistics)
        (found[0] if statistics else found).backward()
    return {str(op).split(".")[1].rstrip(">'\")"): count for op, count in counted.get_comm_counts().items() if count}


@pytest.mark.parametrize("statistics", [False, True])
def test_six_collectives_and_no_others(statistics):
    for counts in on(2, _counted, statistics):
        assert counts == {
            "all_gather_into_tensor": 2, "all_to_all_single": 2, "all_reduce": 1, "reduce_scatter_tensor": 1
        }  # fmt: skip


def _compiled(rank, world, backend):
    w, x = torch.randn(C // world + 1, D).requires_grad_(), torch.randn(4, D).requires_grad_()
    y, first = torch.randint(0, 10, (4,)), rank * (C // world + 1)

    def loss(x, w, y):
        return class_parallel_cross_entropy(
            x, [w], [first], y, 24, group=torch.distributed.group.WORLD, scale=16.0, m2=0.3, max_rows=4
        )

    results = []
    for function in (loss, torch.compile(loss, backend=backend, fullgraph=True)):
        value = function(x, w, y)
        results.append((value.detach(), *torch.autograd.grad(value, [x, w])))
    return results


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_function_compiles_whole(backend):
    for plain, compiled in on(2, _compiled, backend):
        assert all(torch.equal(one, other) for one, other in zip(plain, compiled))


def _overflow(rank, world):
    """One rank's shard of the gradient is infinite in the second step."""
    head = ClassParallel(torchmargin.ArcFaceLoss(D, C), init_device_mesh("cpu", (world,)))
    optimizer, scaler = torch.optim.SGD(head.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y, seen = torch.randn(4, D).requires_grad_(), torch.randint(0, C, (4,)), []
    for step in range(3):
        before = _full(head.weight)[0].clone()
        optimizer.zero_grad()
        scaler.scale(head(x, y)).backward()
        if step == 1 and rank == 0:
            head.weight[0].grad.to_local()[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        seen.append((scaler.get_scale(), torch.equal(before, _full(head.weight)[0])))
    return seen


def test_an_infinity_in_one_shard_makes_every_rank_skip():
    for seen in on(2, _overflow):
        assert seen == [(1024.0, False), (512.0, True), (512.0, False)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("world", [1, 2])
def test_on_gpus(world):
    if torch.cuda.device_count() < world:
        pytest.skip(f"there are fewer than {world} GPUs")
    for values, expected in on(world, _on_gpus, backend="nccl"):
        torch.testing.assert_close(values, expected, **CLOSE)


def _on_gpus(rank, world):
    """A head on GPUs beside one process with all rows on each of them."""
    torch.manual_seed(11)
    loss, one = (torchmargin.ArcFaceLoss(D, C, dtype=torch.float64, device="cuda") for _ in range(2))
    one.load_state_dict(loss.state_dict())
    torch.distributed.broadcast(one.weight.data, 0)
    head = ClassParallel(loss, init_device_mesh("cuda", (world,)), input_grad_scale=1.0)
    x, y = torch.randn(9, D, dtype=torch.float64, device="cuda"), torch.randint(0, C, (9,), device="cuda")
    for each in (x, y):
        torch.distributed.broadcast(each, 0)
    mine = share(rank, BATCHES[world], x).clone().requires_grad_()
    value = head(mine, share(rank, BATCHES[world], y))
    value.backward()
    everything = x.clone().requires_grad_()
    expected = one(everything, y)
    expected.backward()
    found = [value.detach(), mine.grad, torch.cat(_full([block.grad for block in head.weight]))]
    true = [expected.detach(), share(rank, BATCHES[world], everything.grad), one.weight.grad]
    return [each.cpu() for each in found], [each.cpu() for each in true]
