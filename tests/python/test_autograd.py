"""The ops under autograd, torch.func, opcheck and torch.compile."""

import math

import pytest
import torch

import torchmargin.functional as F
from torchmargin import reference

from conftest import margin_numbers, packed, problem
from rounding import assert_within, monte_carlo


@pytest.mark.parametrize("extension", ["none", "linear", "continuous", "easy", "clip", "monotonic"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(extension, normalize, workspace):
    x, w, y, b = problem(*workspace, bias=True)
    y[0] = -1
    m2 = 0.1 * torch.rand(workspace.rows, dtype=torch.float64)
    m3 = 0.1 * torch.rand(workspace.rows, dtype=torch.float64)

    def results(x, w, b, m2, m3):
        return F.linear_margin_lse(
            x, w, y, b, scale=2.0, m1=1.0, m2=0.2, sample_m2=m2, sample_m3=m3, extension=extension,
            normalize_input=normalize, normalize_weight=normalize,
        )[:3]  # fmt: skip

    assert torch.autograd.gradcheck(results, (x, w, b, m2.requires_grad_(), m3.requires_grad_()))


def test_gradcheck_of_the_loss(workspace):
    x, w, y, b = problem(*workspace, bias=True)
    y[0] = -100
    loss = lambda x, w, b: F.linear_margin_cross_entropy(x, w, y, b, scale=3.0, m2=0.3, label_smoothing=0.2)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (x, w, b))


EXTENSIONS = ["none", "linear", "continuous", "easy", "clip", "monotonic"]


def _cosines(rows, classes):
    """Cosines off the seams, with a row without a target, and margins of rows."""
    cosine = (1.8 * torch.rand(rows, classes, dtype=torch.float64) - 0.9).requires_grad_()
    margins = [(0.1 * torch.rand(rows, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    return cosine, torch.randint(0, classes, (rows,)), *margins


def _ops(extension, normalize):
    """Every differentiable op as (function, its float64 inputs), with bias, margins of rows and an absent target."""
    x, w, y, b = problem(5, 4, 7, bias=True)
    cosine, y_cosine, m2, m3 = _cosines(5, 7)
    y[0] = -1
    shared = {"scale": 2.0, "m2": 0.2, "extension": extension}
    linear = {**shared, "normalize_input": normalize, "normalize_weight": normalize}

    def lse(x, w, b, m2, m3):
        return F.linear_margin_lse(x, w, y, b, sample_m2=m2, sample_m3=m3, **linear)[:3]

    def loss(x, w, b, m2, m3):
        return F.linear_margin_cross_entropy(
            x, w, y.clamp(min=0), b, sample_m2=m2, sample_m3=m3, label_smoothing=0.1, **linear
        )

    def logits(x, w, b, m2, m3):
        return F.margin_logits(x, w, y, b, sample_m2=m2, sample_m3=m3, **linear)

    def cosine_loss(cosine, m2, m3):
        return F.margin_cross_entropy(cosine, y_cosine, sample_m2=m2, sample_m3=m3, label_smoothing=0.1, **shared)

    def transform(cosine):
        return F.margin_transform(cosine, m2=0.2, m3=0.1, extension=extension)

    every = {f.__name__: (f, (x, w, b, m2, m3)) for f in (lse, loss, logits)}
    return {**every, "cosine_loss": (cosine_loss, (cosine, m2, m3)), "transform": (transform, (cosine,))}


@pytest.mark.parametrize("op", ["lse", "loss", "logits", "cosine_loss", "transform"])
@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("normalize", [True, False])
def test_second_derivatives_and_forward_mode(op, extension, normalize):
    function, inputs = _ops(extension, normalize)[op]
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_second_derivatives_past_pi(extension):
    """Where the extensions differ: theta + m2 between pi and pi + 0.9."""
    _, w, y, _ = problem(4, 4, 7)
    x = (-w[y] + 0.1 * torch.randn(4, 4, dtype=torch.float64)).detach().requires_grad_()
    m2 = (0.8 + 0.05 * torch.rand(4, dtype=torch.float64)).requires_grad_()
    assert (F.linear_margin_lse(x, w, y).target_angle + m2 > 3.15).all()

    def target_logit(x, w, m2):
        return F.linear_margin_lse(x, w, y, scale=2.0, sample_m2=m2, extension=extension).target_logit

    def of_cosine(cosine, m2):
        return F.margin_cross_entropy(cosine, y, scale=2.0, sample_m2=m2, extension=extension)

    cosine = (0.1 * torch.randn(4, 7, dtype=torch.float64)).index_put(
        (torch.arange(4), y), torch.tensor(-0.95, dtype=torch.float64)
    )
    for function, inputs in ((target_logit, (x, w, m2)), (of_cosine, (cosine.requires_grad_(), m2))):
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_forward_over_reverse():
    function, inputs = _ops("monotonic", True)["loss"]
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("op", ["loss", "cosine_loss"])
def test_third_derivatives(op):
    """Of a gradient penalty's gradient, against the reference."""
    x, w, y, _ = problem(5, 4, 7)
    cosine = _cosines(5, 7)[0]

    def third(loss, leaf):
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(second.square().sum(), leaf)[0]

    def run(module):
        if op == "loss":
            return third(module.linear_margin_cross_entropy(x, w, y, scale=3.0, m2=0.2), x)
        return third(module.margin_cross_entropy(cosine, y, scale=3.0, m2=0.2), cosine)

    (expected,), (bound,) = monte_carlo(lambda: run(reference))
    assert_within(run(F), expected, 2 * bound)  # the library's formula rounds as often


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap loops over the op
@pytest.mark.parametrize("mode", ["jvp", "forward over forward", "reverse over reverse", "hessian"])
@pytest.mark.parametrize(
    ("form", "label_smoothing"),
    [("linear", 0.0), ("linear", 0.3), ("cosine", 0.0), ("cosine", 0.3), ("masked", 0.0)],
)
def test_one_class_has_no_derivatives_of_any_order(form, label_smoothing, mode):
    """The loss of one class is 0 for every input, and so is whatever is derived of it; masked: of all but one."""
    classes = 3 if form == "masked" else 1
    x, w, _, _ = problem(5, 4, classes)
    y = torch.zeros(5, dtype=torch.long)
    mask = torch.zeros(classes, dtype=torch.float64)
    mask[1:] = -math.inf

    def loss(x):
        if form == "cosine":
            return F.margin_cross_entropy(x[:, :1].tanh(), y, scale=4.0, m2=0.3, label_smoothing=label_smoothing)
        bias = mask if form == "masked" else None
        return F.linear_margin_cross_entropy(x, w, y, bias, scale=4.0, m2=0.3, label_smoothing=label_smoothing)

    x, direction = x.detach(), torch.randn(5, 4, dtype=torch.float64)
    if mode == "jvp":
        found = torch.func.jvp(loss, (x,), (direction,))
    elif mode == "forward over forward":
        found = torch.func.jvp(lambda x: torch.func.jvp(loss, (x,), (direction,))[1], (x,), (direction,))
    elif mode == "hessian":
        found = (torch.func.hessian(loss)(x),)
    else:
        x.requires_grad_()
        (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
        found = (first, *torch.autograd.grad(first.square().sum() + first.sum(), x))
    assert all((value == 0).all() for value in found)


def test_one_tensor_as_input_and_weight():
    x = problem(5, 4)[0]
    y = (torch.arange(5) + 1) % 5

    def penalty(module):
        (first,) = torch.autograd.grad(module.linear_margin_cross_entropy(x, x, y, m3=0.2), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    (expected,), (bound,) = monte_carlo(lambda: penalty(reference))
    assert_within(penalty(F), expected, 2 * bound)


def test_ignored_rows_do_not_reach_second_derivatives():
    x, w, y, _ = problem(dtype=torch.float64)
    keep = torch.arange(9) != 2

    def penalty(module, x, w, y):
        loss = module.linear_margin_cross_entropy(x, w, y, scale=3.0, m2=0.2)
        first = torch.autograd.grad(loss, (x, w), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, w))

    small = x.detach()[keep].requires_grad_()
    expected = penalty(F, small, w, y[keep])
    _, bounds = monte_carlo(lambda: penalty(reference, small, w, y[keep]))
    with torch.no_grad():
        x[2] = float("nan")
    y[2] = -100
    got = penalty(F, x, w, y)
    assert (got[0][2] == 0).all()
    for ours, true, bound in zip((got[0][keep], got[1]), expected, bounds):
        assert_within(ours, true, 2 * bound)


@pytest.mark.parametrize("weight", [torch.eye(3, dtype=torch.float64), None], ids=["exact", "rounded"])
@pytest.mark.parametrize("opposite", [False, True])
def test_second_derivatives_at_the_seam_are_nan_and_not_wrong(opposite, weight):
    """theta = 0 and pi have none with an angular margin; without one the logit is smooth there."""
    w = (torch.randn(9, 7, dtype=torch.float64) if weight is None else weight.clone()).requires_grad_()
    x = ((-3 if opposite else 3) * w.detach()).requires_grad_()
    y = torch.arange(len(w))

    def second(module, **margin):
        (first,) = torch.autograd.grad(module.linear_margin_cross_entropy(x, w, y, **margin), x, create_graph=True)
        assert first.isfinite().all()
        return torch.autograd.grad(first.square().sum(), x)[0]

    assert second(F, m2=0.3).isnan().all()
    assert second(F, m3=0.3, normalize_input=False).isfinite().all()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap loops over the op
def test_hessian():
    x, w, y, _ = problem(4, 3, 5)
    f = lambda module: lambda x: module.linear_margin_cross_entropy(x, w.detach(), y, scale=2.0, m2=0.2)  # noqa: E731
    (expected,), (bound,) = monte_carlo(lambda: torch.autograd.functional.hessian(f(reference), x.detach()))
    for hessian in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        assert_within(hessian(f(F))(x.detach()), expected, 2 * bound)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap loops over the op
def test_func_grad_and_jacrev():
    x, w, y, _ = problem()
    loss = lambda x, w: F.linear_margin_cross_entropy(x, w, y, scale=4.0, m2=0.3)  # noqa: E731
    expected = torch.autograd.grad(loss(x, w), (x, w))
    for transform in (torch.func.grad, torch.func.jacrev):
        for got, true in zip(transform(loss, argnums=(0, 1))(x.detach(), w.detach()), expected):
            assert torch.equal(got, true)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_sample_gradients():
    x, w, y, _ = problem()
    loss = lambda x, w, y: F.linear_margin_cross_entropy(x[None], w, y[None], scale=4.0, m2=0.3)  # noqa: E731
    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None, 0))(x.detach(), w.detach(), y)
    for i in range(len(y)):
        expected = torch.autograd.grad(loss(x[i], w, y[i]), (x, w))
        assert torch.equal(got[0][i], expected[0][i]) and torch.equal(got[1][i], expected[1])


OPCHECKED = {
    "linear_margin_lse": lambda x, w, y, b, c: (x, w, y, b),
    "linear_margin_cross_entropy": lambda x, w, y, b, c: (x, w, y, b),
    "margin_logits": lambda x, w, y, b, c: (x, w, y, b),
    "margin_cross_entropy": lambda x, w, y, b, c: (c, y),
    "margin_transform": lambda x, w, y, b, c: (c,),
    "_linear_margin_forward": lambda x, w, y, b, c: (*packed(x, w, y, b, scale=4.0, m2=0.3), None, True, 0, None),
    "_margin_logits_forward": lambda x, w, y, b, c: packed(x, w, y, b, scale=4.0, m2=0.3),
    "_margin_cosine_forward": lambda x, w, y, b, c: (c, None, None, y, None, margin_numbers(4.0, m2=0.3), None, True),
    "_margin_transform_forward": lambda x, w, y, b, c: (c, margin_numbers(m2=0.3)),
    "_linear_margin_cross_entropy_statistics": lambda x, w, y, b, c: (x, w, y, b),
}


@pytest.mark.parametrize("op", OPCHECKED)
def test_opcheck(op):
    x, w, y, b = problem(bias=True)
    cosine = (1.8 * torch.rand(9, 23, dtype=torch.float64) - 0.9).requires_grad_()
    options = {} if op.endswith("_forward") else {"m2": 0.3} if op == "margin_transform" else {"scale": 4.0, "m2": 0.3}
    torch.library.opcheck(getattr(torch.ops.torchmargin, op).default, OPCHECKED[op](x, w, y, b, cosine), options)


def test_compile_fullgraph_gives_the_same():
    x, w, y, _ = problem(dtype=torch.float32)

    def step(x, w, y):
        return F.linear_margin_cross_entropy(x, w, y, scale=16.0, m2=0.3) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss, expected = compiled(x, w, y), step(x, w, y)
    assert torch.equal(loss, expected)
    for got, true in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w))):
        assert torch.equal(got, true)


def test_inference_mode_and_no_grad():
    x, w, y, _ = problem()
    expected = F.linear_margin_cross_entropy(x, w, y).detach()
    with torch.inference_mode():
        assert torch.equal(F.linear_margin_cross_entropy(x, w, y), expected)
    with torch.no_grad():
        assert torch.equal(F.linear_margin_cross_entropy(x, w, y), expected)


def test_meta_tensors_have_shapes():
    x, w, y, b = (t.detach().to("meta") for t in problem(bias=True))
    assert F.linear_margin_cross_entropy(x, w, y, b).shape == ()
    for result in F.linear_margin_lse(x, w, y, b):
        assert result.shape == (9,) and result.device.type == "meta" and result.dtype == torch.float64
