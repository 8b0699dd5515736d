"""Invariances, and random problems against the reference (hypothesis)."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import torchmargin
import torchmargin.functional as F
from torchmargin import reference

from conftest import gradients, problem
from rounding import LinearRounding, assert_within, stored

SETTINGS = hypothesis.settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def problems(draw):
    """(tensors, parameters, dtype): random shapes, strides, dtypes and parameters of the linear loss."""
    rows, features, classes = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    torch.manual_seed(draw(st.integers(0, 2**31)))

    def matrix(rows, columns):
        layout = draw(st.sampled_from(["plain", "transposed", "sliced", "shifted"]))
        plain = torch.randn(rows, columns, dtype=torch.float64).to(dtype)
        if layout == "transposed":
            return plain.T.contiguous().T
        if layout == "sliced":
            return plain.repeat_interleave(2, 1)[:, ::2]
        if layout == "shifted":
            return torch.cat([plain.new_zeros(1), plain.flatten()])[1:].view(rows, columns)
        return plain

    target = torch.randint(0, classes, (rows,))
    if draw(st.booleans()):
        target[draw(st.integers(0, rows - 1))] = -100
    tensors = [matrix(rows, features), matrix(classes, features), target]
    tensors.append(torch.randn(classes, dtype=torch.float64).to(dtype) if draw(st.booleans()) else None)
    extension = draw(st.sampled_from(["none", "linear", "continuous", "easy", "clip", "monotonic"]))
    parameters = {
        "scale": draw(st.sampled_from([0.5, 1.0, 8.0, 64.0])),
        "m1": 1.0 if extension in ("linear", "continuous", "easy") else draw(st.sampled_from([1.0, 1.5, 3.0])),
        "m2": draw(st.sampled_from([0.0, 0.3, -0.2])),
        "m3": draw(st.sampled_from([0.0, 0.2])),
        "extension": extension,
        "margin_weight": draw(st.sampled_from([1.0, 0.4, 0.0])),
        "margin_gradient": draw(st.sampled_from(["exact", "straight_through"])),
        "normalize_input": draw(st.booleans()),
        "normalize_weight": draw(st.booleans()),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "reduction": draw(st.sampled_from(["mean", "sum"])),
    }
    limit = draw(st.sampled_from([256 << 20, 16384]))
    return tensors, parameters, dtype, limit


@hypothesis.given(problems())
@SETTINGS
def test_random_problems(case):
    """Loss and gradients against the reference in float64 on the same rounded inputs."""
    (x, w, y, b), parameters, dtype, limit = case
    leaves = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    with torchmargin.workspace_limit(limit):
        loss = F.linear_margin_cross_entropy(leaves[0], leaves[1], y, *leaves[2:], **parameters)
        expected = reference.linear_margin_cross_entropy(wide[0], wide[1], y, *wide[2:], **parameters)
        if expected.isnan():  # every row is ignored
            assert loss.isnan()
            return
        rounding = LinearRounding(leaves[0], leaves[1], y, *leaves[2:], **parameters)
        smoothing, divisor = parameters["label_smoothing"], (y >= 0).sum() if parameters["reduction"] == "mean" else 1
        assert_within(loss, expected, rounding.loss(smoothing, divisor) + stored(expected, loss.dtype))
        bounds = rounding.loss_gradients(1 / divisor, smoothing)
        for got, true, bound in zip(gradients(loss, *leaves), gradients(expected, *wide), bounds):
            assert got.dtype == dtype
            assert_within(got, true, bound + stored(true, dtype))


FORMS = {
    "arcface": {"scale": 16.0, "m2": 0.4, "extension": "linear"},
    "sphereface": {"m1": 4.0, "extension": "monotonic", "normalize_input": False},
    "softmax": {"normalize_input": False, "normalize_weight": False},
    "combined": {"scale": 16.0, "m1": 1.1, "m2": 0.2, "m3": 0.1},
}


def _assert_near(got, expected, rounding, upstream=1.0, times=1):
    """A loss and its gradients of input and weight, within the bounds of rounding."""
    bounds = (rounding.loss(0.0, 1 / upstream), *rounding.loss_gradients(upstream))
    for ours, theirs, bound in zip(got, expected, bounds):
        assert_within(ours, theirs, times * bound)


def _value_and_gradients(x, w, y, form, **more):
    loss = F.linear_margin_cross_entropy(x, w, y, **FORMS[form], **more)
    return loss, *gradients(loss, x, w)


@pytest.mark.parametrize("form", FORMS)
def test_rotating_all_vectors_changes_nothing(form):
    x, w, y, _ = problem()
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    loss, grad_x, grad_w = _value_and_gradients(x, w, y, form)
    turned = _value_and_gradients((x @ turn).detach().requires_grad_(), (w @ turn).detach().requires_grad_(), y, form)
    # The turned vectors are rounded as the products of D terms that they are: as much again at the most.
    _assert_near(turned, (loss, grad_x @ turn, grad_w @ turn), LinearRounding(x, w, y, **FORMS[form]), 1 / 9, times=2)


@pytest.mark.parametrize("form", FORMS)
def test_permuting_classes_permutes_the_weights_gradient(form):
    x, w, y, _ = problem()
    order = torch.randperm(23)
    loss, grad_x, grad_w = _value_and_gradients(x, w, y, form)
    permuted = _value_and_gradients(x, w[order].detach().requires_grad_(), order.argsort()[y], form)
    rounding = LinearRounding(x, w[order], order.argsort()[y], **FORMS[form])
    _assert_near(permuted, (loss, grad_x, grad_w[order]), rounding, 1 / 9)


@pytest.mark.parametrize("form", FORMS)
def test_equal_margins_of_rows_are_a_margin(form):
    x, w, y, _ = problem()
    options = dict(FORMS[form])
    m2, m3 = options.pop("m2", 0.0), options.pop("m3", 0.0)
    ones = torch.ones(9, dtype=torch.float64)
    loss = F.linear_margin_cross_entropy(
        x, w, y, sample_m2=m2 * ones, sample_m3=m3 * ones, sample_margin_weight=0.7 * ones, **options
    )
    expected = F.linear_margin_cross_entropy(x, w, y, m2=m2, m3=m3, margin_weight=0.7, **options)
    rounding = LinearRounding(x, w, y, **FORMS[form])
    _assert_near((loss, *gradients(loss, x, w)), (expected, *gradients(expected, x, w)), rounding, 1 / 9)


def test_a_zero_margin_is_no_margin():
    x, w, y, _ = problem(dtype=torch.float32)
    plain = torchmargin.NormalizedSoftmaxLoss(6, 23)
    none = {"modified": torchmargin.ModifiedSoftmaxLoss(6, 23)}
    for loss, same in (
        (torchmargin.ArcFaceLoss(6, 23, margin=0.0), plain),
        (torchmargin.CosFaceLoss(6, 23, margin=0.0), plain),
        (torchmargin.SphereFaceLoss(6, 23, margin=1.0), none["modified"]),
    ):
        loss.load_state_dict(same.state_dict(), strict=False)
        assert torch.equal(loss(x, y), same(x, y))


@pytest.mark.parametrize("form", FORMS)
def test_classes_in_two_parts_merge_to_one_call(form):
    """What sharding is built on: a target outside a part is absent from it."""
    x, w, y, b = problem(bias=True)
    whole = F.linear_margin_lse(x, w, y, b, **FORMS[form])
    parts = [
        F.linear_margin_lse(x, w[rows], y - rows.start, b[rows], **FORMS[form]) for rows in (slice(0, 9), slice(9, 23))
    ]
    merged = (
        torch.logaddexp(parts[0].other_lse, parts[1].other_lse),
        parts[0].target_logit + parts[1].target_logit,
        parts[0].logit_sum + parts[1].logit_sum,
    )
    merged += (torch.maximum(*(p.max_other_logit for p in parts)),)
    rounding = LinearRounding(x, w, y, b, **FORMS[form])
    bounds = (rounding.lse, rounding.target, rounding.total, rounding.logit)
    for got, expected, bound in zip(merged, (*whole[:3], whole.max_other_logit), bounds):
        assert_within(got, expected, 2 * bound)  # of the parts, and of the whole
    upstream = [torch.randn(9, dtype=torch.float64) for _ in range(3)]
    grads = [torch.autograd.grad(results[:3], (x, w, b), upstream) for results in (merged, whole)]
    for got, expected, bound in zip(*grads, rounding.gradients(*upstream)):
        assert_within(got, expected, 2 * bound)


@pytest.mark.parametrize("form", ["arcface", "combined"])
def test_the_cosine_loss_is_the_linear_loss_of_unit_vectors(form):
    x, w, y, _ = problem()
    cosine = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(w).T
    loss, expected = (
        F.margin_cross_entropy(cosine, y, **FORMS[form]),
        F.linear_margin_cross_entropy(x, w, y, **FORMS[form]),
    )
    # The angle of a rounded cosine is 1 / sin(theta) as far off, and its slope once more.
    rounding = LinearRounding(x, w, y, **FORMS[form])
    times = 1 / rounding.sine.min().item() ** 2
    _assert_near((loss, *gradients(loss, x, w)), (expected, *gradients(expected, x, w)), rounding, 1 / 9, times)
