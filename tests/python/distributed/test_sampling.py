"""The classes of a step: splitmix64 against whole numbers of Python, and what does not change with the world size."""

import math

import pytest
import torch

from torchmargin.distributed import ClassSampler, sampling
from torchmargin.distributed.sampling import uniform_of

MASK = (1 << 64) - 1


def _output(seed, place):
    """The output of splitmix64 (https://prng.di.unimi.it/splitmix64.c) at a place, the first being 1."""
    z = (seed + place * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_reference_is_splitmix64():
    """The published outputs for the seed 1234567."""
    assert [_output(1234567, place) for place in (1, 2, 3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize("seed", [0, 1, -1, 12345, 2**63 - 1, 2**64 - 1, -(2**63)])
@pytest.mark.parametrize("step", [0, 7, 2**40])
def test_numbers_are_those_of_whole_numbers(seed, step):
    classes = [0, 1, 2, 1000, 2**31, 30_000_000, 2**62, 2**63 - 2]
    expected = [(_output(_output(seed & MASK, step + 1), j + 1) >> 11) / 2**53 for j in classes]
    got = uniform_of(seed, step, torch.tensor(classes))
    assert got.dtype == torch.float64
    assert got.tolist() == expected
    assert torch.equal(uniform_of(seed, torch.tensor(step), torch.tensor(classes)), got)


def test_numbers_are_uniform_and_steps_are_apart():
    classes = torch.arange(200_000)
    steps = torch.stack([uniform_of(3, step, classes) for step in range(3)])
    assert 0 <= steps.min() and steps.max() < 1
    # A mean of n uniform numbers deviates by 1 / sqrt(12 n), 0.00065; a correlation by 1 / sqrt(n), 0.0022: five times.
    assert (steps.mean(1) - 0.5).abs().max() < 0.0033
    assert (torch.corrcoef(steps) - torch.eye(3)).abs().max() < 0.012
    neighbours = torch.corrcoef(torch.stack([steps[0, :-1], steps[0, 1:]]))
    assert neighbours[0, 1].abs() < 0.012


@pytest.mark.parametrize("at_once", [1 << 20, 7])
def test_a_draw_is_the_positives_and_what_the_hash_draws(monkeypatch, at_once):
    monkeypatch.setattr(sampling, "_CLASSES_AT_ONCE", at_once)
    sampler, positives = ClassSampler(0.3, seed=5), torch.tensor([-100, 2, 40, 41, 59, 60, 99])
    classes, alone = sampler.draw(40, 20, 11, positives)
    by_hash = {40 + j for j in range(20) if (_output(_output(5, 12), 41 + j) >> 11) / 2**53 < 0.3}
    own = {40, 41, 59}
    assert own - by_hash and by_hash - own  # so that both kinds are there
    assert classes.dtype == torch.int64 and classes.tolist() == sorted(by_hash | own)
    assert alone.dtype == torch.bool
    assert alone.tolist() == [j not in own for j in sorted(by_hash | own)]


@pytest.mark.parametrize("shards", [[13, 0, 0], [2, 5, 0, 6], [1] * 13])
def test_a_draw_is_the_same_at_any_world_size(shards):
    sampler, positives = ClassSampler(0.4, seed=9), torch.tensor([0, 3, 12])
    for step in range(20):
        whole = sampler.draw(0, 13, step, positives)
        first, parts = 0, []
        for count in shards:
            parts.append(sampler.draw(first, count, step, positives))
            first += count
        for expected, pieces in zip(whole, zip(*parts)):
            assert torch.equal(torch.cat(pieces), expected)


def test_rate_1_draws_all():
    classes, alone = ClassSampler(1).draw(3, 50, 0, torch.tensor([5]))
    assert classes.tolist() == list(range(3, 53))
    assert alone.sum() == 49 and not alone[2]


def test_each_step_and_each_seed_has_a_draw_of_its_own():
    draws = {
        tuple(ClassSampler(0.5, seed).draw(0, 64, step, torch.tensor([0]))[0].tolist())
        for seed in range(3)
        for step in range(3)
    }
    assert len(draws) == 9


def test_the_correction_makes_the_sum_of_exponentials_right_on_average():
    """Horvitz and Thompson: what is drawn with probability p and counted 1 / p times."""
    logits, positives = torch.randn(500, dtype=torch.float64), torch.tensor([3, 77])
    sampler = ClassSampler(0.2, correction=True)
    sums = []
    for step in range(2000):
        classes, alone = sampler.draw(0, 500, step, positives)
        raised = torch.where(alone, -math.log(sampler.rate), 0.0)
        sums.append((logits[classes] + raised).exp().sum())
    others = logits.exp()
    others[positives] = 0
    # A sum of independent terms e with probability p, each counted 1 / p times, has the variance sum e^2 (1 - p) / p.
    deviation = (others.square().sum() * (1 - 0.2) / 0.2 / 2000).sqrt()
    assert abs(torch.stack(sums).mean() - logits.exp().sum()) < 4 * deviation


@pytest.mark.parametrize("rate", [0, -0.1, 1.5, math.nan, math.inf])
def test_a_rate_outside_0_to_1_is_refused(rate):
    with pytest.raises(ValueError, match=r"expected rate in \(0, 1\], but got"):
        ClassSampler(rate)


def test_a_sampler_says_what_it_is():
    """Ranks compare it."""
    assert repr(ClassSampler(0.1, seed=3)) == "ClassSampler(rate=0.1, seed=3, correction=False)"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_draws_the_same():
    classes = torch.arange(10_000)
    assert torch.equal(uniform_of(5, 3, classes.cuda()).cpu(), uniform_of(5, 3, classes))
    step, positives = torch.tensor(3, device="cuda"), torch.tensor([4, 77])
    for got, expected in zip(
        ClassSampler(0.1).draw(10, 5000, step, positives.cuda()), ClassSampler(0.1).draw(10, 5000, 3, positives)
    ):
        assert torch.equal(got.cpu(), expected)
