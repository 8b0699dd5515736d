"""One against all: SphereFace2's and UniFace's loss beside the materialised reference, and its refusals."""

import math

import pytest
import torch

import torchmargin
import torchmargin.functional as F
from torchmargin import reference as R

from conftest import gradients
from rounding import assert_within, monte_carlo

FORMS = {
    "sphereface2": {"kind": "c", "power": 3.0, "margin": 0.2, "positive_weight": 0.7, "negative_weight": 0.3},
    "angle": {"kind": "a", "power": 2.5, "margin": 0.3},
    "uniface": {"kind": "m", "power": 1.0, "margin": 0.4},
}


def _problem(centers, classes=23, rows=9, features=6):
    x = torch.randn(rows, features, dtype=torch.float64).requires_grad_()
    w = torch.randn(classes * centers, features, dtype=torch.float64).requires_grad_()
    return x, w, torch.randint(0, classes, (rows,)), torch.randn((), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("centers", [1, 3])
@pytest.mark.parametrize("scale", [16.0, 64.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_values_and_gradients(form, centers, scale, reduction):
    x, w, y, b = _problem(centers)
    y[2], y[3] = -100, 23  # ignored; absent: negatives only

    def run(library=R):
        loss = library.linear_margin_binary_cross_entropy(
            x, w, y, b, scale=scale, sub_centers=centers, reduction=reduction, **FORMS[form]
        )
        return [loss, *gradients(loss.sum(), x, w, b)]

    expected, bounds = monte_carlo(run)
    for limit in (64 << 20, 16 << 10):
        with torchmargin.workspace_limit(limit):
            for got, true, bound in zip(run(F), expected, bounds):
                # Twice, for both round. The reference's angle is that of a rounded cosine's sine.
                assert_within(got, true, 2 * bound + 1e-13 * scale)


@pytest.mark.parametrize("form", ["sphereface2", "uniface"])
def test_gradcheck(form):
    x, w, y, b = _problem(2, classes=5, rows=4)
    y[1] = -100

    def loss(x, w, b):
        return F.linear_margin_binary_cross_entropy(x, w, y, b, scale=4.0, sub_centers=2, **FORMS[form])

    assert torch.autograd.gradcheck(loss, (x, w, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (x, w, b), fast_mode=True)


def test_opcheck():
    x, w, y, b = _problem(2)
    options = {"scale": 4.0, "sub_centers": 2, **FORMS["sphereface2"]}
    torch.library.opcheck(torch.ops.torchmargin.linear_margin_binary_cross_entropy.default, (x, w, y, b), options)


def test_an_ignored_row_reaches_nothing():
    x, w, y, b = _problem(1)
    y[4] = -100
    clean = gradients(F.linear_margin_binary_cross_entropy(x, w, y, b, scale=16.0), x, w, b)
    with torch.no_grad():
        x[4] = torch.nan
    for got, true in zip(gradients(F.linear_margin_binary_cross_entropy(x, w, y, b, scale=16.0), x, w, b), clean):
        assert torch.equal(got, true)


REFUSALS = {
    "kind to be one of 'c', 'a', 'm', but got 'x'": {"kind": "x"},
    "power to be finite and at least 1, but got 0.5": {"power": 0.5},
    "a whole power with kind 'm'": {"kind": "m", "power": 1.5},
    "margin to be finite, but got nan": {"margin": math.nan},
    "positive_weight to be finite and not negative, but got -1": {"positive_weight": -1.0},
    "negative_weight to be finite and not negative, but got inf": {"negative_weight": math.inf},
    "bias to be 0-dimensional, but got [23]": {"bias": torch.zeros(23, dtype=torch.float64)},
    "reduction to be one of": {"reduction": "all"},
    "sub_centers in [1, 255]": {"sub_centers": 0},
}


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    x, w, y, _ = _problem(1)
    with pytest.raises(RuntimeError) as error:
        F.linear_margin_binary_cross_entropy(x, w, y, **REFUSALS[text])
    assert str(error.value).startswith("linear_margin_binary_cross_entropy: expected ") and text in str(error.value)


@pytest.mark.parametrize("label", [23, -1])
def test_a_label_that_is_no_class_is_an_error_to_the_losses(label):
    """As to every loss; the op, for shards of classes, makes it one where it is asked to."""
    x, w, y, _ = _problem(1)
    y = torch.where(y < 0, 0, y)
    y[1], y[2] = label, -100
    text = rf"^linear_margin_binary_cross_entropy: expected target values in \[0, 23\) .* but got {label} at row 1"
    assert F.linear_margin_binary_cross_entropy(x, w, y).isfinite()
    with pytest.raises(IndexError, match=text):
        F.linear_margin_binary_cross_entropy(x, w, y, require_target=True)
    for kind in (torchmargin.SphereFace2Loss, torchmargin.UniFaceLoss):
        loss = kind(x.shape[1], 23, dtype=torch.float64)
        for statistics in (False, True):
            with pytest.raises(IndexError, match=text):
                loss(x, y, return_statistics=statistics)
    known = torch.where(y == label, -100, y)
    value = F.linear_margin_binary_cross_entropy(x, w, known)
    assert torch.equal(F.linear_margin_binary_cross_entropy(x, w, known, require_target=True), value)


def test_curricularface_moves_t_before_it_uses_it():
    """t <- (1 - momentum) t + momentum mean cos(theta), over the rows that count, once a training forward."""
    loss = torchmargin.CurricularFaceLoss(6, 23, dtype=torch.float64)
    x, _, y, _ = _problem(1)
    y[2] = -100
    angle = F.linear_target_angle(x, loss.weight, y)
    mean = angle[y >= 0].cos().mean()
    value = loss(x, y)
    assert loss.t.item() == pytest.approx(0.01 * mean.item(), rel=2**-23)
    t = loss.t.double()
    coefficients = torch.stack([torch.ones_like(t), t, torch.zeros_like(t)])
    expected = R.linear_margin_cross_entropy(
        x, loss.weight, y, scale=64.0, m2=0.5, extension="linear", hard_coefficients=coefficients
    )
    assert_within(value, expected, 1e-11)
    before = loss.t.clone()
    loss.eval()(x, y)
    assert torch.equal(loss.t, before)


def test_dominant_centers():
    """Samples around two centers of each class, most of them at the second."""
    loss = torchmargin.SubCenterArcFaceLoss(8, 4, sub_centers=2, dtype=torch.float64)
    y = torch.arange(4).repeat_interleave(5)
    at = torch.tensor([0, 1, 1, 1, 0] * 4)
    x = loss.weight.detach()[2 * y + at] + 1e-3 * torch.randn(20, 8, dtype=torch.float64)
    counts = loss.center_counts(x[:7], y[:7]) + loss.center_counts(x[7:], y[7:])
    assert counts.tolist() == [[2, 3]] * 4
    centers = loss.dominant_centers(counts)
    assert centers.tolist() == [1] * 4
    assert torch.equal(loss.angle_to_centers(x, y, centers) < 0.1, at == 1)
    single = loss.with_centers(centers)
    assert single.sub_centers == 1 and torch.equal(single.weight, loss.weight[1::2])


def test_sphereface2_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="^SphereFace2Loss: expected no label_smoothing"):
        torchmargin.SphereFace2Loss(8, 4, label_smoothing=0.1)
    with pytest.raises(ValueError, match="^SphereFace2Loss: expected no interclass_filter"):
        torchmargin.SphereFace2Loss(8, 4, interclass_filter=0.4)
    with pytest.raises(ValueError, match="expected margin in radians, not degrees"):
        torchmargin.SphereFace2Loss(8, 4, kind="a", margin=11.0)
    loss = torchmargin.SphereFace2Loss(8, 4, sub_centers=2)
    with pytest.raises(RuntimeError, match=r"expected target to have shape \[3\], but got \[2\]"):
        loss(torch.randn(3, 8), torch.zeros(2, dtype=torch.long))
    with pytest.raises(RuntimeError, match="expected power to be finite and at least 1, but got 0.5"):
        loss.t = 0.5
    assert loss.t == 3.0


def test_unifaces_bias_starts_at_its_paper():
    loss = torchmargin.UniFaceLoss(8, 40, dtype=torch.float64)
    assert loss.bias.item() == -math.log(400)
    with torch.no_grad():
        loss.bias.zero_()
    loss.reset_parameters()
    assert loss.bias.item() == -math.log(400)
