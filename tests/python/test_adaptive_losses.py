"""AdaFace, MagFace and ElasticFace against their papers' formulas, written out with arccos and one-hot."""

import math

import pytest
import torch
from torch.nn import functional as tf

import torchmargin

import oracle
from conftest import gradients
from rounding import LinearRounding, assert_within, monte_carlo, unit_roundoff


def _batch(rows=12, length=20.0):
    x = torch.randn(rows, 8, dtype=torch.float64)
    lengths = length * (0.2 + 2 * torch.rand(rows, 1, dtype=torch.float64))
    return (tf.normalize(x) * lengths).requires_grad_(), torch.randint(0, 17, (rows,))


def _angles(loss, x, y):
    cosine = tf.normalize(x) @ tf.normalize(loss.weight).T
    return cosine, cosine[torch.arange(len(y)), y].arccos()


def _compare(value, expect, *leaves):
    """Both sides round as often."""
    with_gradients = lambda value: [value, *gradients(value, *leaves)]  # noqa: E731
    expected, bounds = monte_carlo(lambda: with_gradients(expect()))
    for got, true, bound in zip(with_gradients(value), expected, bounds):
        assert_within(got, true, 2 * bound)


def test_adaface():
    """Paper, eq. 13 to 17; the statistics move by `momentum` in training and stay otherwise."""
    loss = torchmargin.AdaFaceLoss(8, 17, momentum=0.2, ignore_index=3, dtype=torch.float64)
    mean, std, steps = 20.0, 100.0, 0
    for training in (True, True, False):
        loss.train(training)
        x, y = _batch()
        y[5] = 3
        with torch.no_grad():
            x[y == 3] = math.nan if mean == 20.0 else 90.0  # ignored rows do not count for the statistics
        rows = y != 3
        lengths = x.detach()[rows].norm(dim=1)
        if training:
            mean = 0.8 * mean + 0.2 * lengths.mean().item()
            std = 0.8 * std + 0.2 * lengths.std().item()
            steps += 1
        value = loss(x, y)
        # The buffers are float32, as the published code has them: a step rounds the batch's, a difference, a product
        # and a sum, each below 100.
        held = 100 * 4 * steps * unit_roundoff(torch.float32)
        assert abs(loss.length_mean.item() - mean) <= held and abs(loss.length_std.item() - std) <= held

        def expect():
            deviation = (loss.length_std + 1e-3).double()  # added in float32
            q = ((lengths - loss.length_mean.double()) / deviation * 0.333).clamp(-1, 1)  # noqa: B023
            cosine, theta = _angles(loss, x[rows], y[rows])  # noqa: B023
            target = (theta - 0.4 * q).clamp(0, math.pi).cos() - (0.4 + 0.4 * q)
            return oracle.loss_of(64 * cosine, y[rows], 64 * target).mean()  # noqa: B023

        _compare(value, expect, x, loss.weight)
    numbers = {"scale", "margin", "h", "momentum"}
    assert set(loss.state_dict()) == {"weight", "length_mean", "length_std"} | numbers
    loss.train()
    before = loss.length_mean.clone()
    loss(*_batch(rows=1))  # one row has no deviation
    assert torch.equal(loss.length_mean, before)


def test_magface():
    """Paper, eq. 2, 3 and 4: the gradient reaches the length by the margin and by the regulariser."""
    loss = torchmargin.MagFaceLoss(8, 17, ignore_index=5, dtype=torch.float64)
    x, y = _batch(length=60.0)
    y[0] = 5
    with torch.no_grad():
        x[0] = math.nan
    rows = y != 5

    def expect():
        a = x[rows].norm(dim=1).clamp(10, 110)
        margin = (0.8 - 0.45) / (110 - 10) * (a - 10) + 0.45
        cosine, theta = _angles(loss, x[rows], y[rows])
        past = theta + margin > math.pi
        target = torch.where(past, theta.cos() - margin * margin.sin(), (theta + margin).cos())
        return oracle.loss_of(64 * cosine, y[rows], 64 * target) + 35 * (a / 110**2 + 1 / a)

    _compare(loss(x, y), lambda: expect().mean(), x, loss.weight)
    loss.reduction = "none"
    per_row, statistics = loss(x, y, return_statistics=True)
    (expected,), (bound,) = monte_carlo(expect)
    assert_within(per_row[rows], expected, 2 * bound)
    assert per_row[0] == 0 and statistics.accuracy.isfinite()
    # Lengths outside [10, 110] have no say of their own.
    loss.reduction = "mean"
    short = (0.01 * x.detach()[1:]).requires_grad_()
    (grad,) = torch.autograd.grad(loss(short, y[1:]), short)
    rounding = LinearRounding(short, loss.weight, y[1:], scale=64.0, m2=0.45)
    # As far off as the gradient along the row, and the product's terms.
    product = 8 * unit_roundoff(torch.float64) * (grad * short).abs().sum(1)
    along = (rounding.loss_gradients(1 / 11)[0] * short.abs()).sum(1)
    assert_within((grad * short).sum(1), torch.zeros(11), along + product)


@pytest.mark.parametrize("kind", ["arc", "cos"])
def test_elasticface(kind):
    """Paper, eq. 5 and 6: margins drawn anew for each row and step."""
    loss = torchmargin.ElasticFaceLoss(8, 17, kind=kind, margin=0.35, deviation=0.05, dtype=torch.float64)
    x, y = _batch()
    torch.manual_seed(3)
    value = loss(x, y)
    torch.manual_seed(3)
    margins = 0.35 + 0.05 * torch.randn(12, dtype=torch.float64)

    def expect():
        cosine, theta = _angles(loss, x, y)
        target = (theta + margins).cos() if kind == "arc" else theta.cos() - margins
        return oracle.loss_of(64 * cosine, y, 64 * target).mean()

    _compare(value, expect, x, loss.weight)
    assert loss(x, y) != value
    loss.eval()
    assert torch.equal(loss(x, y), loss(x, y))


LOSSES = {name: getattr(torchmargin.losses, name) for name in torchmargin.losses.__all__ if name.endswith("Loss")}
del LOSSES["MarginLoss"], LOSSES["AnnealedMarginLoss"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_a_row_that_is_not_finite_stays_alone(name, value):
    """One overflowed embedding under AMP: its own loss is NaN, its batch's are not, and the next batch is clean."""
    loss = LOSSES[name](8, 17, reduction="none")
    clean = torch.randn(8, 8) * 20
    y = torch.arange(8)
    x = clean.clone()
    x[3, 5] = value
    values = loss(x, y)
    assert values.isfinite().tolist() == [row != 3 for row in range(8)]
    assert all(buffer.isfinite().all() for buffer in loss.buffers())
    assert loss(clean, y).isfinite().all()


def test_statistics_are_those_of_the_finite_rows():
    one, other = (torchmargin.AdaFaceLoss(8, 17, momentum=0.5, dtype=torch.float64) for _ in range(2))
    x, y = _batch(rows=8)
    spoiled = x.detach().clone()
    spoiled[2, 0], spoiled[6, 1] = math.nan, math.inf
    one(spoiled, y)
    rows = [0, 1, 3, 4, 5, 7]
    other(x[rows], y[rows])
    assert torch.equal(one.length_mean, other.length_mean) and torch.equal(one.length_std, other.length_std)
    huge = torch.full((8, 8), 1e38)  # finite, and of infinite length in float32
    before = torchmargin.AdaFaceLoss(8, 17)
    before(huge, y)
    assert before.length_mean == 20.0 and before.length_std == 100.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_a_masked_row_adds_nothing_to_any_gradient(name, value):
    """reduction="none" and an upstream gradient of exactly 0, as a masked loss gives it: whatever the row holds."""
    found = []
    for spoiled in (value, 1.0):
        torch.manual_seed(1)
        loss = LOSSES[name](8, 17, reduction="none", dtype=torch.float64)
        x, y = 20 * torch.randn(6, 8, dtype=torch.float64), torch.arange(6)
        x[2, 3] = spoiled
        if name in ("AdaFaceLoss", "CurricularFaceLoss"):
            loss.eval()  # the statistics would differ
        x.requires_grad_()
        mask = torch.tensor([1.0, 1, 0, 1, 1, 1], dtype=torch.float64)
        loss(x, y).backward(mask)
        found.append([x.grad, loss.weight.grad])
    for got, expected in zip(*found):
        assert torch.equal(got, expected)  # the other rows' sums have the same terms
    assert found[0][0][2].abs().max() == 0


@pytest.mark.parametrize("name", ["AdaFaceLoss", "MagFaceLoss"])
def test_embeddings_of_length_one_are_warned_of_once(name):
    loss = LOSSES[name](8, 17)
    x, y = torch.randn(8, 8), torch.arange(8)
    with pytest.warns(
        UserWarning, match=f"^{name}: the embeddings are already of length 1; .* before any normalisation"
    ):
        loss(tf.normalize(x), y)
    loss(tf.normalize(x), y)  # warnings are errors in these tests
    for quiet in (lambda: LOSSES[name](8, 17)(x, y), lambda: LOSSES[name](8, 17).eval()(tf.normalize(x), y)):
        quiet()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: torchmargin.AdaFaceLoss(8, 17, margin=28.0), "radians, not degrees"),
        (lambda: torchmargin.MagFaceLoss(8, 17, a_min=9.0, a_max=8.0), "expected 0 < a_min < a_max, but got 9.0 and 8"),
        (lambda: torchmargin.MagFaceLoss(8, 17, m_max=30.0), "m_max in radians, not degrees"),
        (lambda: torchmargin.ElasticFaceLoss(8, 17, kind="ark"), "expected kind to be 'arc' or 'cos', but got 'ark'"),
        (lambda: torchmargin.ElasticFaceLoss(8, 17, deviation=-1.0), "expected deviation not to be negative"),
    ],
)
def test_bad_parameters(make, text):
    with pytest.raises(ValueError, match=text):
        make()
