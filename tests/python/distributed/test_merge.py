"""The merge of what shards of the classes found: log-sum-exp over them, and its gradient."""

import math

import torch

import torchmargin  # noqa: F401  (registers the ops)

merge = torch.ops.torchmargin._merge_lse


def test_it_is_log_sum_exp():
    shards = torch.tensor(
        [[1.0, -math.inf, -math.inf, math.inf, math.nan, 800.0], [2.0, 3.0, -math.inf, 1.0, 1.0, -800.0]]
    )
    shards = shards.double()
    torch.testing.assert_close(merge(shards), shards.logsumexp(0), rtol=4e-16, atol=0, equal_nan=True)  # 2 ulp
    assert merge(shards[:, :0]).shape == (0,)


def test_its_gradient_is_the_shards_share():
    shards = torch.randn(3, 50, dtype=torch.float64).mul(20).requires_grad_()
    (gradient,) = torch.autograd.grad(merge(shards).sum(), shards)
    torch.testing.assert_close(gradient, shards.softmax(0), rtol=1e-13, atol=0)  # gaps below 200, rounded


def test_shards_of_nothing_have_no_gradient():
    """torch.logsumexp's is NaN where every shard is -inf: C = 1, and the row's own class."""
    shards = torch.tensor([[-math.inf, -math.inf], [-math.inf, 2.0]], dtype=torch.float64).requires_grad_()
    merged = merge(shards)
    assert merged.tolist() == [-math.inf, 2.0]
    (gradient,) = torch.autograd.grad(merged, shards, torch.ones(2, dtype=torch.float64))
    assert gradient.tolist() == [[0.0, 0.0], [0.0, 1.0]]


def test_a_row_without_an_upstream_gradient_has_none():
    shards = torch.tensor([[math.nan, 1.0], [1.0, math.inf]], dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(merge(shards), shards, torch.zeros(2, dtype=torch.float64))
    assert not gradient.any()
