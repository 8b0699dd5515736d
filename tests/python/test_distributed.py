"""A network with its loss module under DistributedDataParallel, two gloo ranks on this machine."""

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


def _rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        x, y = _batch()
        mine = slice(8 * rank, 8 * rank + 8)
        for name, make_loss in LOSSES.items():
            model = nn.parallel.DistributedDataParallel(Model(make_loss))
            torch.save(_gradients(model, x[mine], y[mine]), f"{folder}/{name}-{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_give_one_processs_gradients(tmp_path):
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2, join=True)
    for name, make_loss in LOSSES.items():
        expected = _gradients(Model(make_loss), *_batch())
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)]
        assert ranks[0].keys() == expected.keys()
        for key, gradient in expected.items():
            assert torch.equal(ranks[0][key], ranks[1][key])
            # The mean over halves of eight rows, and over sixteen: the same up to the order of a sum.
            torch.testing.assert_close(ranks[0][key], gradient, rtol=1e-11, atol=1e-13)
