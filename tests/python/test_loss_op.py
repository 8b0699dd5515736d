"""_margin_loss, the loss from a forward's results, and its backward: one loop on the CPU, ATen's ops elsewhere.

The CPU's loop is called as it is, ATen's ops by the modes of autograd that only they serve; both against Python's math.
Tolerances: float64 has u = 2^-53, exp and log1p have an error of 2 u at most, any other operation one of u.
"""

import math

import pytest
import torch
from torch.autograd import forward_ad

from rounding import assert_within, stored

LOSS, BACKWARD = torch.ops.torchmargin._margin_loss, torch.ops.torchmargin._margin_loss_backward
U = 2.0**-53
NONE, MEAN, SUM = 0, 1, 2
IGNORED = -100
# Gaps o - t at which a form of the loss overflows, cancels or ends: the last has no other class.
GAPS = [0.0, 1.0, -1.0, 20.5, -20.5, 36.9, -36.9, 700.0, -700.0, 1000.0, -1000.0, math.inf, -math.inf]


def _rows(smoothing, ignored=True):
    """other_lse, target_logit, mean_logit or None, target; the ignored rows hold NaN and infinities."""
    own = torch.randn(len(GAPS) + 20, dtype=torch.float64)
    other = own + torch.cat([torch.tensor(GAPS, dtype=torch.float64), 5 * torch.randn(20, dtype=torch.float64)])
    mean = torch.randn_like(own)
    target = torch.randint(0, 9, own.shape)
    if ignored:
        for row, content in ((2, math.nan), (15, math.inf), (20, -math.inf), (30, math.nan)):
            other[row] = own[row] = mean[row] = content
            target[row] = IGNORED
    return other, own, mean if smoothing else None, target


def _finite(rows):
    """Without the gap of +inf, whose loss is no number."""
    keep = rows[0] != math.inf
    return [None if tensor is None else tensor[keep] for tensor in rows]


def _by_aten(other, own, mean, *rest):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(other.clone(), torch.zeros_like(other))
        return forward_ad.unpack_dual(LOSS(dual, own, mean, *rest)).primal


def _softplus(gap):
    return max(gap, 0.0) + math.log1p(math.exp(-abs(gap)))


def _sigmoid(gap):
    return 1 / (1 + math.exp(-gap)) if gap > -700 else math.exp(gap)


def _reduced(losses, target, reduction):
    return {NONE: losses, SUM: losses.sum(), MEAN: losses.sum() / (target != IGNORED).sum()}[reduction]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_the_loss_is_the_formula(reduction, smoothing, dtype):
    other, own, mean, target = rows = _finite(_rows(smoothing))
    losses, sizes = [], []
    for i, (o, t) in enumerate(zip(other.tolist(), own.tolist())):
        smoothed = smoothing * (t - mean[i].item()) if smoothing else 0.0
        losses.append(_softplus(o - t) + smoothed if target[i] != IGNORED else 0.0)
        # exp, log1p and a sum; a difference, a product and a sum.
        size = 5 * _softplus(o - t) + (4 * smoothing * (abs(t) + abs(mean[i].item())) if smoothing else 0.0)
        sizes.append(U * size if target[i] != IGNORED else 0.0)
    losses, bounds = torch.tensor(losses, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
    expected = _reduced(losses, target, reduction)
    # Up to B sums, and a division.
    bound = bounds if reduction == NONE else _reduced(bounds + len(other) * U * losses.abs(), target, reduction)
    bound = 2 * bound + (stored(expected, dtype) if dtype == torch.float32 else 0.0) + 2 * U * expected.abs()
    for form in (LOSS, _by_aten):
        got = form(*rows, smoothing, IGNORED, reduction, dtype == torch.float64)
        assert got.dtype == dtype and got.shape == expected.shape
        assert_within(got, expected, bound, form)
    assert torch.equal(got == 0, LOSS(*rows, smoothing, IGNORED, reduction, dtype == torch.float64) == 0)


def _gradients(form, grad, other, own, target, *rest):
    if form == "aten":
        grad = grad.clone().requires_grad_()
    return [gradient.detach() for gradient in BACKWARD(grad, other, own, target, *rest)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_the_gradients_are_the_formula(reduction, smoothing, dtype):
    other, own, _, target = _rows(smoothing)
    grad = torch.randn(other.shape if reduction == NONE else (), dtype=dtype)
    counted = target != IGNORED
    upstream = torch.where(counted, grad.double() / (counted.sum() if reduction == MEAN else 1), 0.0)
    expected, bounds = [], []
    for o, t, g in zip(other.tolist(), own.tolist(), upstream.tolist()):
        p, rest = (_sigmoid(o - t), _sigmoid(t - o)) if g else (0.0, 0.0)
        slope = smoothing - p if p < 0.5 else rest - (1 - smoothing)
        expected.append([g * p, g * slope, -g * smoothing])
        # exp, a sum and a quotient; a difference; the product with g.
        size = smoothing + p if p < 0.5 else rest + 1 - smoothing
        bounds.append([5 * U * abs(g) * p, 7 * U * abs(g) * size, U * abs(g)])
    for form in ("cpu", "aten"):
        got = _gradients(form, grad, other, own, target, smoothing, IGNORED, reduction)
        for ours, true, bound in zip(got, zip(*expected), zip(*bounds)):
            true, bound = (torch.tensor(numbers, dtype=torch.float64) for numbers in (true, bound))
            assert_within(ours, true, 2 * bound, form)
            assert ours.dtype == torch.float64 and (ours[~counted] == 0).all()


def test_rows_without_an_upstream_gradient_give_nothing():
    content = [math.nan, math.inf, -math.inf]
    pairs = torch.tensor([[o, t] for o in [*content, 1.0] for t in [*content, 1.0]], dtype=torch.float64)
    other, own = pairs.T.contiguous()
    target, grad = torch.zeros(16, dtype=torch.long), torch.zeros(16, dtype=torch.float64)
    grad[-1] = 2.0  # of the one row that holds numbers
    for form in ("cpu", "aten"):
        to_other, to_own, to_mean = _gradients(form, grad, other, own, target, 0.25, IGNORED, NONE)
        for got, true in ((to_other, 1.0), (to_own, -0.5), (to_mean, -0.5)):
            assert torch.equal(got[:-1] == 0, torch.ones(15, dtype=torch.bool)) and got[-1] == true
        to_other = _gradients(form, torch.ones_like(grad), other, own, target, 0.25, IGNORED, NONE)[0]
        assert torch.equal(to_other.isnan(), (other - own).isnan())


def test_non_finite_losses():
    other, own, mean, target = _rows(0.1, ignored=False)
    for form in (LOSS, _by_aten):
        losses = form(other, own, mean, target, 0.1, IGNORED, NONE, True)
        assert torch.equal(losses == math.inf, other == math.inf) and not losses.isnan().any()
        # One class: no loss but the smoothing.
        alone = GAPS.index(-math.inf)
        assert_within(losses[alone], 0.1 * (own - mean)[alone], 2 * U * (own - mean)[alone].abs())
        assert form(other, own, None, target, 0.0, IGNORED, NONE, True)[alone] == 0
        holed = other.clone()
        holed[3] = math.nan
        assert form(holed, own, mean, target, 0.1, IGNORED, NONE, True).isnan().sum() == 1
        assert form(holed, own, mean, target, 0.1, IGNORED, SUM, True).isnan()


@pytest.mark.parametrize("rows", [0, 3])
def test_no_row_that_counts(rows):
    vector, target = torch.zeros(rows, dtype=torch.float64), torch.full((rows,), IGNORED)
    for form in (LOSS, _by_aten):
        assert torch.equal(form(vector, vector, vector, target, 0.1, IGNORED, NONE, False), vector.float())
        assert form(vector, vector, vector, target, 0.1, IGNORED, SUM, False) == 0
        assert form(vector, vector, vector, target, 0.1, IGNORED, MEAN, False).isnan()
    for form in ("cpu", "aten"):
        for reduction in (MEAN, SUM):
            one = torch.ones((), dtype=torch.float32)
            for gradient in _gradients(form, one, vector, vector, target, 0.1, IGNORED, reduction):
                assert torch.equal(gradient, vector)


def test_any_strides():
    rows = [None if tensor is None else torch.stack([tensor, tensor], 1)[:, 0] for tensor in _rows(0.1)]
    options = (0.1, IGNORED, SUM)
    copies = [tensor.contiguous() for tensor in rows]
    assert torch.equal(LOSS(*_finite(rows), *options, True), LOSS(*_finite(copies), *options, True))
    grad = torch.ones(1, dtype=torch.float64).expand(len(rows[0]))
    got = BACKWARD(grad, *rows[:2], rows[3], 0.1, IGNORED, NONE)
    expected = BACKWARD(grad.contiguous(), *copies[:2], copies[3], 0.1, IGNORED, NONE)
    for ours, true in zip(got, expected):
        assert torch.allclose(ours, true, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_derivatives_of_both_orders(reduction, smoothing):
    leaves = [torch.randn(5, dtype=torch.float64).requires_grad_() for _ in range(3 if smoothing else 2)]
    target = torch.tensor([0, 1, IGNORED, 2, 0])

    def loss(other, own, mean=None):
        return LOSS(other, own, mean, target, smoothing, IGNORED, reduction, True)

    assert torch.autograd.gradcheck(loss, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, leaves, check_fwd_over_rev=True)

    def backward(grad, other, own):
        return BACKWARD(grad, other, own, target, smoothing, IGNORED, reduction)[:2]

    grad = torch.randn(5 if reduction == NONE else (), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(backward, (grad, *leaves[:2]))
    assert torch.autograd.gradgradcheck(backward, (grad, *leaves[:2]))


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_opcheck(reduction):
    leaves = [torch.randn(5, dtype=torch.float64).requires_grad_() for _ in range(3)]
    target = torch.tensor([0, 1, IGNORED, 2, 0])
    torch.library.opcheck(LOSS.default, (*leaves, target, 0.1, IGNORED, reduction, False))
    grad = torch.randn(5 if reduction == NONE else (), dtype=torch.float32)
    torch.library.opcheck(BACKWARD.default, (grad, *leaves[:2], target, 0.1, IGNORED, reduction))


GOOD = {
    "other_lse": torch.zeros(4).double(),
    "target_logit": torch.zeros(4).double(),
    "mean_logit": torch.zeros(4).double(),
    "target": torch.zeros(4, dtype=torch.long),
    "label_smoothing": 0.1,
    "ignore_index": IGNORED,
    "reduction": MEAN,
    "wide": False,
}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"other_lse": torch.zeros(4, 1).double()}, r"expected other_lse to have shape \[B\], but got \[4, 1\]"),
        (
            {"other_lse": torch.zeros(4)},
            r"expected other_lse to have shape \[4\] and dtype Double, but got \[4\] and Float",
        ),
        (
            {"target_logit": torch.zeros(3).double()},
            r"expected target_logit to have shape \[4\] and dtype Double, but got \[3\] and Double",
        ),
        (
            {"mean_logit": torch.zeros(())},
            r"expected mean_logit to have shape \[4\] and dtype Double, but got \[\] and Float",
        ),
        (
            {"target": torch.zeros(4, dtype=torch.int32)},
            r"expected target to have shape \[4\] and dtype Long, but got \[4\] and Int",
        ),
        ({"reduction": 3}, "expected reduction to be 0, 1 or 2, but got 3"),
        ({"reduction": -1}, "expected reduction to be 0, 1 or 2, but got -1"),
    ],
)
def test_the_loss_refuses_what_does_not_fit(change, text):
    LOSS(**GOOD)
    with pytest.raises(RuntimeError, match="_margin_loss: " + text):
        LOSS(**{**GOOD, **change})


@pytest.mark.parametrize(("reduction", "shape"), [(NONE, ()), (NONE, (3,)), (NONE, (4, 1)), (MEAN, (4,)), (SUM, (1,))])
def test_the_backward_refuses_a_gradient_of_another_shape(reduction, shape):
    rows = (GOOD["other_lse"], GOOD["target_logit"], GOOD["target"], 0.1, IGNORED, reduction)
    text = "_margin_loss_backward: expected grad to have the shape of the loss, but got "
    with pytest.raises(RuntimeError, match=text):
        BACKWARD(torch.ones(shape), *rows)
    with pytest.raises(RuntimeError, match=r"_margin_loss_backward: expected other_lse to have shape \[B\], but got"):
        BACKWARD(torch.ones(()), torch.zeros(4, 1).double(), *rows[1:])
