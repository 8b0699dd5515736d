"""A network with its loss module under DistributedDataParallel and FSDP2, two gloo ranks on this machine."""

import copy
import gc
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import torchmargin

from rounding import assert_within, monte_carlo


class Model(nn.Module):
    """Network and loss as one module, so that DDP averages the gradients of both."""

    def __init__(self, make_loss):
        super().__init__()
        torch.manual_seed(5)
        self.network = nn.Sequential(nn.Linear(10, 16), nn.PReLU(), nn.Linear(16, 8)).double()
        self.loss = make_loss()

    def forward(self, x, y):
        return self.loss(self.network(x), y)


LOSSES = {
    "arcface": lambda: torchmargin.ArcFaceLoss(8, 13, dtype=torch.float64),
    "sphereface": lambda: torchmargin.SphereFaceLoss(8, 13, dtype=torch.float64),
    "softmax": lambda: torchmargin.SoftmaxLoss(8, 13, dtype=torch.float64),
}


def _batch():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(16, 10, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 13, (16,), generator=generator)


def _gradients(model, x, y):
    model(x, y).backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def _gradients_and_bounds(make_loss):
    """Of one process, and what roundings may move them by; with the logits. A copy for each run: some have a state."""
    made, (x, y) = Model(make_loss), _batch()

    def run():
        model = copy.deepcopy(made)
        return {**_gradients(model, x, y), "logits": model.loss.logits(model.network(x))}

    values, bounds = monte_carlo(lambda: list(run().values()))
    names = run().keys()
    return dict(zip(names, values)), dict(zip(names, bounds))


def _spawn(function, folder, seconds=300):
    """Two ranks; one that hangs is a failure, not a test that never ends."""
    context = mp.spawn(_as_rank, args=(function, str(folder)), nprocs=2, join=False)
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"the ranks have not ended after {seconds} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def _as_rank(rank, function, folder):
    """Runs function(rank, folder) in a group of two."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        function(rank, folder)
        # What holds the group (sharded modules do) goes before it: else its threads would outlive the interpreter.
        gc.collect()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _rank(rank, folder):
    x, y = _batch()
    mine = slice(8 * rank, 8 * rank + 8)
    for name, make_loss in LOSSES.items():
        model = nn.parallel.DistributedDataParallel(Model(make_loss))
        torch.save(_gradients(model, x[mine], y[mine]), f"{folder}/{name}-{rank}.pt")


def test_two_ranks_give_one_processs_gradients(tmp_path):
    _spawn(_rank, tmp_path)
    for name, make_loss in LOSSES.items():
        expected, bounds = _gradients_and_bounds(make_loss)
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)]
        assert ranks[0].keys() == expected.keys() - {"logits"}
        for key, gradient in ranks[0].items():
            assert torch.equal(gradient, ranks[1][key])
            # The mean over halves of eight rows, and over sixteen: sums in another order.
            assert_within(gradient, expected[key], 2 * bounds[key], key)


def _fsdp_rank(rank, folder):
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    x, y = _batch()
    mine = slice(8 * rank, 8 * rank + 8)
    for name, make_loss in LOSSES.items():
        model = Model(make_loss)
        for part in (model.network, model.loss, model):
            fully_shard(part, mesh=mesh)
        gradients = {key: grad.full_tensor() for key, grad in _gradients(model, x[mine], y[mine]).items()}
        with torch.no_grad():
            embeddings = model.network(x[mine])
            with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):  # FSDP2 does not know logits
                model.loss.logits(embeddings)
            register_fsdp_forward_method(model.loss, "logits")
            logits = model.loss.logits(embeddings)
        torch.save((gradients, logits), f"{folder}/{name}-{rank}.pt")


def test_fsdp2_shards_the_class_weights(tmp_path):
    """docs/losses.md: the gradients of one process, and logits outside forward once their name is registered."""
    pytest.importorskip("torch.distributed.fsdp", reason="this torch has no FSDP")
    if not hasattr(torch.distributed.fsdp, "register_fsdp_forward_method"):
        pytest.skip("this torch has no FSDP2")
    _spawn(_fsdp_rank, tmp_path)
    for name, make_loss in LOSSES.items():
        expected, bounds = _gradients_and_bounds(make_loss)
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)]
        found = {**ranks[0][0], "logits": torch.cat([rank[1] for rank in ranks])}
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert key == "logits" or torch.equal(ranks[0][0][key], ranks[1][0][key])
            assert_within(found[key], value, 2 * bounds[key], key)


def _narrow_rank(rank, folder):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(1)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    x, y = _batch()
    mine = slice(8 * rank, 8 * rank + 8)
    for name in NARROW:
        torch.manual_seed(5)
        network, loss = nn.Linear(10, 8), getattr(torchmargin, name)(8, 13)
        fully_shard(network, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        fully_shard(loss, mesh=mesh)
        embeddings = network(20 * x[mine].float())
        embeddings.retain_grad()
        value = loss(embeddings, y[mine])
        value.backward()
        gradient = loss.weight.grad.full_tensor()
        torch.save((embeddings.detach(), embeddings.grad, value.detach(), gradient), f"{folder}/{name}-{rank}.pt")


NARROW = ["ArcFaceLoss", "AdaFaceLoss", "MagFaceLoss"]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_bfloat16_network_before_a_float32_loss_under_fsdp2(tmp_path, one_thread):
    """docs/losses.md: mixed precision of the network alone needs nothing: the loss of the widened embeddings."""
    pytest.importorskip("torch.distributed.fsdp", reason="this torch has no FSDP")
    if not hasattr(torch.distributed.fsdp, "MixedPrecisionPolicy"):
        pytest.skip("this torch has no FSDP2")
    _spawn(_narrow_rank, tmp_path)
    _, y = _batch()
    for name in NARROW:
        gradients, given = [], None
        for rank in range(2):
            embeddings, upstream, value, given = torch.load(tmp_path / f"{name}-{rank}.pt")
            assert embeddings.dtype == upstream.dtype == torch.bfloat16 and value.dtype == given.dtype == torch.float32
            torch.manual_seed(5)
            nn.Linear(10, 8)
            loss = getattr(torchmargin, name)(8, 13)
            wide = embeddings.float().requires_grad_()
            expected = loss(wide, y[8 * rank : 8 * rank + 8])
            # The same bits, of as many threads as a rank has.
            assert torch.equal(value, expected.detach())
            grad_wide, grad_weight = torch.autograd.grad(expected, (wide, loss.weight))
            assert torch.equal(upstream, grad_wide.bfloat16())
            gradients.append(grad_weight)
        assert torch.equal(given, sum(gradients) / 2)  # halving is exact
