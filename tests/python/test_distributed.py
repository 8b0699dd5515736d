"""A network with its loss module under DistributedDataParallel and FSDP2, two gloo ranks on this machine."""

import gc
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import torchmargin


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
        expected = _gradients(Model(make_loss), *_batch())
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)]
        assert ranks[0].keys() == expected.keys()
        for key, gradient in expected.items():
            assert torch.equal(ranks[0][key], ranks[1][key])
            # The mean over halves of eight rows, and over sixteen: the same up to the order of a sum.
            torch.testing.assert_close(ranks[0][key], gradient, rtol=1e-11, atol=1e-13)


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
        model = Model(make_loss)
        x, y = _batch()
        expected = _gradients(model, x, y)
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)]
        for key, gradient in expected.items():
            assert torch.equal(ranks[0][0][key], ranks[1][0][key])
            torch.testing.assert_close(ranks[0][0][key], gradient, rtol=1e-11, atol=1e-13)
        logits = torch.cat([rank[1] for rank in ranks])
        torch.testing.assert_close(logits, model.loss.logits(model.network(x)).detach(), rtol=1e-11, atol=1e-13)


def _narrow_rank(rank, folder):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

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


def test_a_bfloat16_network_before_a_float32_loss_under_fsdp2(tmp_path):
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
            # The ranks are single-threaded: the sums are those of other threads' lanes at most.
            torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=0)
            grad_wide, grad_weight = torch.autograd.grad(expected, (wide, loss.weight))
            torch.testing.assert_close(upstream, grad_wide.bfloat16(), rtol=2**-7, atol=1e-6)  # one rounding apart
            gradients.append(grad_weight)
        torch.testing.assert_close(given, sum(gradients) / 2, rtol=1e-5, atol=1e-6)
