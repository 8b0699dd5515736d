"""A row whose upstream gradient is exactly 0 contributes exactly 0 to every gradient, whatever it holds."""

import math

import pytest
import torch

import torchmargin.functional as F
from torchmargin import reference

from conftest import problem
from rounding import CosineRounding, LinearRounding, assert_within, monte_carlo

ROW, FORMS = 2, ["linear", "cosine", "statistics"]


def _leaves(form, content):
    """Leaf tensors with `content` in row ROW: of the input (the cosines) and of the margins of rows."""
    x, w, y, b = problem(bias=True)
    m2, m3 = (0.1 * torch.rand(2, 9, dtype=torch.float64)).unbind()
    if form == "cosine":
        x = torch.nn.functional.normalize(x.detach()) @ torch.nn.functional.normalize(w.detach()).T
        leaves = {"x": x, "sample_m2": m2, "sample_m3": m3}
    else:
        leaves = {"x": x, "w": w, "b": b, "sample_m2": m2, "sample_m3": m3}
    leaves = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        if name not in ("w", "b"):
            leaf[ROW] = content
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}, y


def _losses(form, leaves, y, **options):
    given = dict(leaves)
    options = {"scale": 8.0, "m2": 0.3, "reduction": "none", **options}
    if form == "cosine":
        return F.margin_cross_entropy(given.pop("x"), y, **given, **options)
    op = torch.ops.torchmargin.linear_margin_cross_entropy
    if form == "statistics":
        op = torch.ops.torchmargin._linear_margin_cross_entropy_statistics
    loss = op(given.pop("x"), given.pop("w"), y, given.pop("b"), **given, **options)
    return loss[0] if form == "statistics" else loss


def _without(leaves, y):
    """The same without the row."""
    keep = torch.arange(9) != ROW
    rest = {
        name: (leaf.detach() if name in ("w", "b") else leaf.detach()[keep]).clone().requires_grad_()
        for name, leaf in leaves.items()
    }
    return rest, y[keep], keep


def _bounds(form, leaves, y, upstream, label_smoothing):
    """How far rounding may move the gradients of the losses."""
    options = {"scale": 8.0, "m2": 0.4, "m3": 0.1}  # the largest margins of rows
    if form == "cosine":
        rounding = CosineRounding(leaves["x"], y, **options)
        of_margins = rounding.sample_gradients(upstream)
        bounds = {"x": rounding.loss_gradient(upstream, label_smoothing)}
    else:
        rounding = LinearRounding(leaves["x"], leaves["w"], y, leaves["b"], **options)
        of_margins = rounding.sample_gradients(upstream)
        bounds = dict(zip(("x", "w", "b"), rounding.loss_gradients(upstream, label_smoothing)))
    return {**bounds, "sample_m2": of_margins, "sample_m3": of_margins}


# Ways in which a caller leaves a row out.
def _by_upstream(losses):
    weights = torch.arange(1.0, 10.0, dtype=losses.dtype)
    weights[ROW] = 0
    return losses, weights


def _by_index(losses):
    mask = torch.arange(9) != ROW
    return (losses[mask] * torch.arange(1.0, 10.0, dtype=losses.dtype)[mask]).sum(), None


def _by_weight(losses):
    weights = torch.arange(1.0, 10.0, dtype=losses.dtype)
    weights[ROW] = 0
    return (losses * weights).sum(), None


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("content", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("way", [_by_upstream, _by_index, _by_weight])
@pytest.mark.parametrize("form", FORMS)
def test_first_derivatives(form, way, content, label_smoothing):
    leaves, y = _leaves(form, content)
    value, upstream = way(_losses(form, leaves, y, label_smoothing=label_smoothing))
    value.backward(upstream)
    rest, y_rest, keep = _without(leaves, y)
    true = (_losses(form, rest, y_rest, label_smoothing=label_smoothing) * torch.arange(1.0, 10.0).double()[keep]).sum()
    true.backward()
    bounds = _bounds(form, rest, y_rest, torch.arange(1.0, 10.0)[keep], label_smoothing)
    for name, leaf in leaves.items():
        if name in ("w", "b"):
            assert_within(leaf.grad, rest[name].grad, bounds[name], name)
        else:
            assert (leaf.grad[ROW] == 0).all(), name
            assert_within(leaf.grad[keep], rest[name].grad, bounds[name], name)


@pytest.mark.parametrize("content", [math.nan, math.inf])
@pytest.mark.parametrize("form", FORMS)
def test_a_mean_that_counts_for_nothing(form, content):
    leaves, y = _leaves(form, content)
    (_losses(form, leaves, y, reduction="mean", label_smoothing=0.1) * 0).backward()
    assert all((leaf.grad == 0).all() for leaf in leaves.values())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("content", [math.nan, math.inf])
@pytest.mark.parametrize("form", ["linear", "cosine"])
def test_second_derivatives(form, content, label_smoothing):
    """Of the masked row's own gradient nothing is asked: it is 0, and what is made of it is masked by the caller."""

    def of_penalty(losses, leaves, y, weights):
        values, leaves = losses(form, leaves, y, label_smoothing=label_smoothing), list(leaves.values())
        grads = torch.autograd.grad(values, leaves, weights, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)

    def reference_losses(form, leaves, y, **options):
        given, options = dict(leaves), {"scale": 8.0, "m2": 0.3, "reduction": "none", **options}
        if form == "cosine":
            return reference.margin_cross_entropy(given.pop("x"), y, **given, **options)
        return reference.linear_margin_cross_entropy(
            given.pop("x"), given.pop("w"), y, given.pop("b"), **given, **options
        )

    leaves, y = _leaves(form, content)
    weights = torch.arange(1.0, 10.0, dtype=torch.float64)
    weights[ROW] = 0
    got = of_penalty(_losses, leaves, y, weights)
    rest, y_rest, keep = _without(leaves, y)
    expected = of_penalty(_losses, rest, y_rest, weights[keep])
    _, bounds = monte_carlo(lambda: of_penalty(reference_losses, rest, y_rest, weights[keep]))
    for name, grad, true, bound in zip(leaves, got, expected, bounds):
        if name not in ("w", "b"):
            assert (grad[ROW] == 0).all(), name
            grad = grad[keep]
        assert_within(grad, true, 2 * bound, name)  # the library's formula rounds as often as the reference


def test_a_finite_row_without_upstream_keeps_its_derivative_to_the_upstream():
    """jvp by two backwards starts from an upstream of zeros: masking by value must not cut that."""
    x, w, y, _ = problem()

    def losses(x, module=F):
        return module.linear_margin_cross_entropy(x, w.detach(), y, scale=4.0, m2=0.2, reduction="none")

    direction = torch.randn_like(x)
    by_two_backwards = torch.autograd.functional.jvp(losses, x, direction)[1]
    # A row's loss is of that row of x alone: its derivative is the row's gradient times the direction.
    by_gradient = lambda module: (torch.autograd.grad(losses(x, module).sum(), x)[0] * direction).sum(1)  # noqa: E731
    (expected,), (bound,) = monte_carlo(lambda: by_gradient(reference))
    for got in (by_two_backwards, torch.func.jvp(losses, (x,), (direction,))[1], by_gradient(F)):
        assert_within(got, expected, 2 * bound)


@pytest.mark.parametrize("form", ["linear", "cosine"])
def test_compiled(form):
    leaves, y = _leaves(form, math.nan)
    step = torch.compile(lambda leaves, y: _losses(form, leaves, y), backend="aot_eager", fullgraph=True)
    value, weights = _by_upstream(step(leaves, y))
    value.backward(weights)
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())
    assert (leaves["x"].grad[ROW] == 0).all() and (leaves["x"].grad[0] != 0).any()


@pytest.mark.parametrize("form", ["linear", "cosine"])
def test_a_compiled_backward(form):
    leaves, y = _leaves(form, math.nan)
    value, weights = _by_upstream(_losses(form, leaves, y, label_smoothing=0.1))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        value.backward(weights)
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())
    assert (leaves["x"].grad[ROW] == 0).all() and (leaves["x"].grad[0] != 0).any()
