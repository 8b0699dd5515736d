"""The tests' own runner of ranks: results, failures and hangs come back."""

import time

import pytest
import torch
import torch.distributed as dist

import ranks


def _sum_of_ranks(rank, world, offset):
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return rank, world, total.item()


@pytest.mark.parametrize("world", [2, 3, 1])
def test_each_rank_returns_its_own(world):
    total = sum(range(world)) + 10 * world
    assert ranks.on(world, _sum_of_ranks, 10) == [(rank, world, total) for rank in range(world)]


def _one_fails(rank, world):
    if rank == 1:
        raise KeyError("what rank 1 could not find")
    return rank


def test_an_error_is_raised_with_its_rank():
    with pytest.raises(AssertionError, match="(?s)rank 1 raised.*KeyError: 'what rank 1 could not find'"):
        ranks.on(2, _one_fails)
    assert ranks.outcomes(2, _one_fails) == [0, ("KeyError", "'what rank 1 could not find'")]


def _one_hangs(rank, world):
    if rank == 1:
        time.sleep(600)


def test_a_hang_is_a_failure_and_says_where():
    with pytest.raises(AssertionError, match="(?s)ranks .1. of 2 hang in _one_hangs.*in _one_hangs"):
        ranks.on(2, _one_hangs, seconds=5)
    assert ranks.on(2, _sum_of_ranks, 0)[0] == (0, 2, 1)
