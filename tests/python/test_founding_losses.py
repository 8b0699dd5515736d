"""Every founding loss against its paper: values, gradients, and float32 at full size."""

import math

import pytest
import torch

import torchmargin.functional as F

import oracle
from conftest import gradients, problem
from rounding import LinearRounding, assert_within

LOSSES = oracle.founding_losses()


@pytest.mark.parametrize("name", LOSSES)
def test_float64_matches_the_paper(name, workspace):
    reference, parameters = LOSSES[name]
    x, w, y, b = problem(*workspace, bias=name == "softmax")
    extra = () if b is None else (b,)
    expected = reference(x, w, y, *extra)
    loss = F.linear_margin_cross_entropy(x, w, y, b, reduction="none", **parameters)
    # The papers' forms have the angle from its cosine: 1 / sin(theta) as far off, and the slope once more.
    rounding = LinearRounding(x, w, y, b, **parameters)
    from_cosine = 1 / rounding.sine.min()
    assert_within(loss, expected, rounding.loss() * from_cosine)

    upstream = torch.randn(workspace.rows, dtype=torch.float64)
    grads = [gradients(losses, x, w, b, upstream=upstream) for losses in (loss, expected)]
    for ours, theirs, bound in zip(*grads, rounding.loss_gradients(upstream)):
        assert_within(ours, theirs, bound * from_cosine**2)


def _trained_head(rows, features, classes, generator):
    """Unit weights, and rows at chosen distances from their class: losses from 1e-12 to 150."""
    w = torch.randn(classes, features, generator=generator, dtype=torch.float64)
    y = torch.randint(0, classes, (rows,), generator=generator)
    unit = torch.nn.functional.normalize(w)
    angles = torch.linspace(0.0, math.pi, rows, dtype=torch.float64)
    noise = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    along = unit[y]
    across = torch.nn.functional.normalize(noise - (noise * along).sum(1, keepdim=True) * along)
    x = 3.0 * (angles.cos()[:, None] * along + angles.sin()[:, None] * across)
    return x.float(), w.float(), y


# Logits at scale 64 in float32, o and t: each is rounded, and the sum of its product rounds about as much again. A
# loss far below 1 has the same error, relative to itself.
LOSS_ERROR = 4 * 64 * 2.0**-24


@pytest.mark.parametrize("name", ["normalized_softmax", "cosface", "arcface", "combined"])
def test_float32_at_scale_64_and_100000_classes(name):
    """Per row, for losses from 1e-12 (no digit left in a float32 cross_entropy) to 150."""
    reference, parameters = LOSSES[name]
    generator = torch.Generator().manual_seed(5)
    # Row 0 is exactly at its class and the last exactly opposite: their gradients have no
    # textbook form, so the reference starts one row in.
    x, w, y = _trained_head(64, 128, 100_000, generator)
    x, y = x[1:-1], y[1:-1]
    x64, w64 = x.double().requires_grad_(), w.double().requires_grad_()
    expected = reference(x64, w64, y)
    x.requires_grad_()
    w.requires_grad_()
    loss = F.linear_margin_cross_entropy(x, w, y, reduction="none", **parameters)
    assert loss.dtype == torch.float32
    assert expected.min() < 1e-3 and expected.max() > 80
    assert_within(loss, expected, LOSS_ERROR * expected.detach())

    # Every row counts the same, however small its loss: upstream 1 / (1 - p).
    upstream = -1 / torch.expm1(-expected.detach())
    ours = gradients(loss, x, w, upstream=upstream.float())
    theirs = gradients(expected, x64, w64, upstream=upstream)
    # A softmax weight has the error of its logit and that of o; the projection onto a tangent plane doubles it, and
    # leaves of a row near its class, or opposite, a part like sin(theta).
    error = 4 * LOSS_ERROR
    for got, true in zip(ours, theirs):
        assert (got - true).norm() <= error * true.norm()
    sine = LinearRounding(x, w, y).sine
    rows = lambda got, true: (got - true).norm(dim=1) / true.norm(dim=1)  # noqa: E731
    assert (rows(ours[0].double(), theirs[0]) <= error / sine).all()
    assert (rows(ours[1][y].double(), theirs[1][y]) <= error / sine.min()).all()  # two rows may share a class


@pytest.mark.parametrize("size", [1e-3, 1e-12])
def test_float32_row_with_a_tiny_loss(size):
    """A row built to have just this loss; 1 - p is right too."""
    scale, classes, features = 64.0, 100_000, 64
    w = torch.randn(classes, features, dtype=torch.float64)
    x = w[:1].clone()
    reference = lambda s: oracle.normalized_softmax(x, w, torch.tensor([0]), s)  # noqa: E731
    low, high = 1.0, scale
    for _ in range(60):  # the scale that gives the loss
        middle = (low + high) / 2
        low, high = (middle, high) if reference(middle) > size else (low, middle)
    w32 = w.float().requires_grad_()
    x32 = (x + 1e-3 * torch.randn_like(x)).float().requires_grad_()
    expected = oracle.normalized_softmax(x32.double(), w32.double(), torch.tensor([0]), high)
    loss = F.linear_margin_cross_entropy(x32, w32, torch.tensor([0]), scale=high, reduction="none")
    assert abs(loss.item() - expected.item()) <= LOSS_ERROR * expected.item()
    assert 0.5 * size < loss.item() < 2 * size
    lse = F.linear_margin_lse(x32, w32, torch.tensor([0]), scale=high)
    q = torch.sigmoid(lse.other_lse - lse.target_logit).item()
    assert abs(q + math.expm1(-expected.item())) <= LOSS_ERROR * q


def test_float32_row_with_a_loss_of_150():
    x, w, y = torch.tensor([[-1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 1e-3]]), torch.tensor([0])
    loss = F.linear_margin_cross_entropy(x, w, y, scale=64.0, m3=0.35)
    expected = oracle.cosface(x.double(), w.double(), y, 64.0, 0.35)
    assert 149 < expected.item() < 151
    assert abs(loss.item() - expected.item()) <= LOSS_ERROR * expected.item()
