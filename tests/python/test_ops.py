"""The ops against the eager specification: all parameters, all results, all dtypes."""

import itertools
import math

import pytest
import torch

import torchmargin
import torchmargin.functional as F
from torchmargin import reference

from conftest import gradients, packed, problem
from rounding import LinearRounding, assert_within, stored

EXTENSIONS = ["none", "linear", "continuous", "easy", "clip", "monotonic"]


def _parameters(extension, margin_gradient, normalize_input, normalize_weight):
    return {
        "scale": 3.0,
        "m1": 1.0 if extension in ("linear", "continuous", "easy") else 1.7,
        "m2": 0.6,
        "m3": 0.2,
        "extension": extension,
        "margin_gradient": margin_gradient,
        "margin_weight": 0.8,
        "normalize_input": normalize_input,
        "normalize_weight": normalize_weight,
    }


SWITCHES = list(
    itertools.product(EXTENSIONS, ["exact", "straight_through"], [True, False], [True, False], [True, False])
)


@pytest.mark.parametrize(("extension", "margin_gradient", "normalize_input", "normalize_weight", "with_bias"), SWITCHES)
def test_lse_matches_the_specification(
    extension, margin_gradient, normalize_input, normalize_weight, with_bias, workspace
):
    x, w, y, b = problem(*workspace, bias=with_bias)
    y[2], y[5], y[6] = -1, workspace.classes, y[7]  # two absent targets, one shared by two rows
    parameters = _parameters(extension, margin_gradient, normalize_input, normalize_weight)
    parameters["sample_margin_weight"] = torch.rand(workspace.rows, dtype=torch.float64)
    ours = F.linear_margin_lse(x, w, y, b, **parameters)
    theirs = reference.linear_margin_lse(x, w, y, b, **parameters)
    rounding = LinearRounding(x, w, y, b, **parameters)
    for name, got, expected, bound in zip(ours._fields, ours, theirs, rounding.results()):
        assert_within(got, expected, bound, name)
    assert not ours.target_angle.requires_grad and not ours.max_other_logit.requires_grad
    upstream = [torch.randn(workspace.rows, dtype=torch.float64) for _ in range(3)]
    for chosen in ([0], [1], [2], [0, 1, 2]):
        pair = [
            torch.autograd.grad(
                [results[i] for i in chosen],
                [leaf for leaf in (x, w, b) if leaf is not None],
                [upstream[i] for i in chosen],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for results in (ours, theirs)
        ]
        bounds = rounding.gradients(*(upstream[i] if i in chosen else 0.0 for i in range(3)))
        for got, expected, bound in zip(*pair, bounds):
            assert_within(got, expected, bound)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_cross_entropy_matches_the_specification(reduction, label_smoothing, with_bias, workspace):
    x, w, y, b = problem(*workspace, bias=with_bias)
    y[1] = y[4] = 7  # ignore_index may lie inside [0, C)
    parameters = dict(scale=8.0, m2=0.4, label_smoothing=label_smoothing, ignore_index=7, reduction=reduction)
    ours = F.linear_margin_cross_entropy(x, w, y, b, **parameters)
    theirs = reference.linear_margin_cross_entropy(x, w, y, b, **parameters)
    rounding = LinearRounding(x, w, y, b, **parameters)
    divisor = {"none": None, "mean": (y != 7).sum(), "sum": 1}[reduction]
    assert_within(ours, theirs, rounding.loss(label_smoothing, divisor))
    upstream = torch.randn_like(ours)
    bounds = rounding.loss_gradients(upstream / (divisor or 1), label_smoothing)
    for got, expected, bound in zip(
        gradients(ours, x, w, b, upstream=upstream), gradients(theirs, x, w, b, upstream=upstream), bounds
    ):
        assert_within(got, expected, bound)


def test_sample_margins_and_their_gradients(workspace):
    x, w, y, _ = problem(*workspace)
    m2, m3 = 0.2 * torch.rand(2, workspace.rows, dtype=torch.float64)
    m2, m3 = m2.detach().requires_grad_(), m3.detach().requires_grad_()
    y[3] = -1
    for extension in EXTENSIONS:
        parameters = dict(scale=5.0, m2=0.3, m3=0.1, extension=extension, sample_m2=m2, sample_m3=m3)
        ours = F.linear_margin_lse(x, w, y, **parameters).target_logit
        theirs = reference.linear_margin_lse(x, w, y, **parameters).target_logit
        rounding = LinearRounding(x, w, y, scale=5.0, m2=0.5, m3=0.3)  # the largest margins of rows
        assert_within(ours, theirs, rounding.target)
        # psi's slopes to m2 and m3 have the bound of psi itself.
        bounds = (*rounding.gradients(0.0, 1.0)[:2], rounding.target, rounding.target)
        pairs = zip(gradients(ours.sum(), x, w, m2, m3), gradients(theirs.sum(), x, w, m2, m3))
        for (got, expected), bound in zip(pairs, bounds):
            assert_within(got, expected, bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["lse", "loss", "cosine", "logits"])
def test_float64_sample_margins_beside_any_dtype(op, dtype):
    """Read as they are, in float64, and so are their gradients: a float32 copy would differ."""
    x, w, y, _ = problem(dtype=torch.float64)
    x, w = x.detach().to(dtype), w.detach().to(dtype)
    m2, m3 = (0.2 * torch.rand(2, 9, dtype=torch.float64)).unbind()
    weight = torch.rand(9, dtype=torch.float64)
    cosine = (torch.nn.functional.normalize(x.double()) @ torch.nn.functional.normalize(w.double()).T).to(dtype)
    upstream = torch.randn(9).double()  # numbers of float32

    def run(module, to, *samples):
        leaves = [sample.clone().requires_grad_() for sample in samples[:2]]
        given = dict(zip(("sample_m2", "sample_m3", "sample_margin_weight"), (*leaves, samples[2])), scale=4.0, m2=0.1)
        if op == "lse":
            result = module.linear_margin_lse(x.to(to), w.to(to), y, **given).target_logit
        elif op == "loss":
            result = module.linear_margin_cross_entropy(x.to(to), w.to(to), y, reduction="none", **given)
        elif op == "logits":
            result = module.margin_logits(x.to(to), w.to(to), y, **given).gather(1, y[:, None]).squeeze(1)
        else:
            result = module.margin_cross_entropy(cosine.to(to), y, reduction="none", **given)
        return result, gradients(result, *leaves, upstream=upstream.to(result.dtype))

    got, grads = run(F, dtype, m2, m3, weight)
    expected, true = run(reference, torch.float64, m2, m3, weight)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.dtype == acc and [g.dtype for g in grads] == [torch.float64] * 2
    # The loss is of all results that with the largest bound; it is rounded once.
    rounding = LinearRounding(x, w, y, scale=4.0, m2=0.3, m3=0.2)
    assert_within(got, expected, rounding.loss() + stored(expected, acc))
    for ours, theirs in zip(grads, true):
        assert_within(ours, theirs, rounding.sample_gradients(upstream))


def test_one_float64_margin_expanded_to_every_row():
    """A 0-dim buffer expanded to [B], stride 0, is the number in it, bit for bit: 0.35 is not rounded to float32."""
    x, w, y, _ = problem(dtype=torch.float32)
    for name, number in (("m2", 0.35), ("m3", 0.35), ("margin_weight", 0.7)):
        one = torch.tensor(number, dtype=torch.float64, requires_grad=name != "margin_weight")
        rest = {"m2": 0.2} if name == "margin_weight" else {}
        for sample in [one.expand(9)] + [one] * (name == "margin_weight"):
            got = F.linear_margin_cross_entropy(x, w, y, scale=32.0, **{f"sample_{name}": sample}, **rest)
            expected = F.linear_margin_cross_entropy(x, w, y, scale=32.0, **{name: number}, **rest)
            assert torch.equal(got, expected)
            grads = gradients(got, x, w, *([one] if one.requires_grad else []))
            for ours, theirs in zip(grads, gradients(expected, x, w)):
                assert torch.equal(ours, theirs)
            assert all(g.dtype == torch.float64 for g in grads[2:])


def test_a_scalar_sample_margin_weight_stands_for_every_row():
    x, w, y, _ = problem()
    one = F.linear_margin_cross_entropy(x, w, y, scale=9.0, m2=0.5, sample_margin_weight=torch.tensor(0.25).double())
    assert torch.equal(one, F.linear_margin_cross_entropy(x, w, y, scale=9.0, m2=0.5, margin_weight=0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [True, False])
def test_other_dtypes(dtype, normalize, workspace):
    """Nothing but the inputs and the returned gradients is rounded to 16 bits."""
    x, w, y, b = problem(*workspace, dtype=dtype, bias=True)
    y[3] = -100
    parameters = dict(scale=16.0, m2=0.3, normalize_input=normalize, normalize_weight=normalize, label_smoothing=0.1)
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    ours = F.linear_margin_cross_entropy(x, w, y, b, **parameters)
    theirs = reference.linear_margin_cross_entropy(wide[0], wide[1], y, wide[2], **parameters)
    assert ours.dtype == torch.float32
    rounding = LinearRounding(x, w, y, b, **parameters)
    counted = (y >= 0).sum()
    assert_within(ours, theirs, rounding.loss(0.1, counted) + stored(theirs, torch.float32))
    bounds = rounding.loss_gradients(1 / counted, 0.1)
    for got, expected, bound in zip(gradients(ours, x, w, b), gradients(theirs, *wide), bounds):
        assert got.dtype == dtype
        assert_within(got, expected, bound + stored(expected, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_strides(dtype):
    x0, w0, y0, _ = problem(rows=8, features=5, classes=12, dtype=dtype)
    expected = F.linear_margin_cross_entropy(x0, w0, y0, scale=8.0, m2=0.2, label_smoothing=0.1)
    true = gradients(expected, x0, w0)
    rounding = LinearRounding(x0, w0, y0, scale=8.0, m2=0.2)
    bounds = rounding.loss_gradients(1 / 8, 0.1)
    transposed = lambda t: t.detach().t().contiguous().t()  # noqa: E731
    spaced = lambda t: torch.stack([t.detach(), t.detach() + 1], dim=2)[:, :, 0]  # noqa: E731
    for view in (transposed, spaced):
        x, w = view(x0).requires_grad_(), view(w0).requires_grad_()
        y = torch.stack([y0, y0], dim=1)[:, 0]
        loss = F.linear_margin_cross_entropy(x, w, y, scale=8.0, m2=0.2, label_smoothing=0.1)
        # Both are the library's: each may be as far from the truth as the other.
        assert_within(loss, expected, 2 * (rounding.loss(0.1, 8) + stored(expected, loss.dtype)))
        for got, wanted, bound in zip(gradients(loss, x, w), true, bounds):
            assert_within(got, wanted, 2 * (bound + stored(wanted, dtype)))
    row = x0.detach()[:1].expand(8, 5)
    same = F.linear_margin_cross_entropy(row, w0, y0, scale=8.0, reduction="none")
    copied = F.linear_margin_cross_entropy(row.contiguous(), w0, y0, scale=8.0, reduction="none")
    assert torch.equal(same, copied)


def test_shards_merge_to_the_whole():
    """The core op's rule for absent targets: split the classes in two and merge the results."""
    x, w, y, _ = problem(classes=30)
    parameters = dict(scale=16.0, m2=0.3, m3=0.1)
    whole = F.linear_margin_lse(x, w, y, **parameters)
    first = F.linear_margin_lse(x, w[:11], y, **parameters)
    second = F.linear_margin_lse(x, w[11:], y - 11, **parameters)
    merged = F.LinearMarginLse(
        torch.logaddexp(first.other_lse, second.other_lse),
        first.target_logit + second.target_logit,
        first.logit_sum + second.logit_sum,
        first.target_angle + second.target_angle,
        torch.maximum(first.max_other_logit, second.max_other_logit),
    )
    rounding = LinearRounding(x, w, y, **parameters)
    for got, expected, bound in zip(merged, whole, rounding.results()):
        assert_within(got, expected, 2 * bound)  # of the parts, and of the whole
    loss = lambda r: (torch.logaddexp(r.other_lse, r.target_logit) - r.target_logit).sum()  # noqa: E731
    bounds = rounding.loss_gradients()
    for got, expected, bound in zip(gradients(loss(merged), x, w), gradients(loss(whole), x, w), bounds):
        assert_within(got, expected, 2 * bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_forward_with_a_given_state(dtype, normalize, workspace):
    """The rows' state is what a first forward returned: the same bits, of the whole weight and of its shards."""
    x, w, y, b = (t.detach() for t in problem(*workspace, dtype=dtype, bias=True))
    y[2] = -1
    options = dict(scale=16.0, m2=0.3, normalize_input=normalize, normalize_weight=normalize)

    def forward(state, first=0, last=None, with_sum=True, kept=0):
        arguments = packed(x, w[first:last], y - first, b[first:last], **options)
        return torch.ops.torchmargin._linear_margin_forward(*arguments, None, with_sum, kept, state)

    whole = forward(None)
    state = whole[11]
    for with_sum, kept in ((True, 0), (False, 0), (True, 7)):
        for got, expected in zip(forward(state, with_sum=with_sum, kept=kept), forward(None, 0, None, with_sum, kept)):
            assert torch.equal(got, expected)
    middle = workspace.classes // 2
    for first, last in ((0, middle), (middle, workspace.classes)):
        got, own = forward(state, first, last), forward(None, first, last)
        for ours, true in zip(got[:6], own[:6]):
            assert torch.equal(ours, true)
        held = (first <= y) & (y < last)
        assert torch.equal(got[1][held], whole[1][held]) and (got[1][~held] == 0).all()
        assert torch.equal(got[11], state) and got[11].data_ptr() != state.data_ptr()
    # The state is read: a right angle's has delta and sigma of 2, squared.
    right = state.clone()
    right[:, 2:4] = 2.0
    lengths = 1.0 if normalize else state[:, :2].sqrt().prod(1)
    own_bias = b.double()[y.clamp(min=0)]
    expected = torch.where(y >= 0, 16.0 * lengths * math.cos(math.pi / 2 + 0.3) + own_bias, 0.0)
    # Two roots, an angle of up to pi, its cosine and three products.
    bound = 2.0**-53 * 16 * (16.0 * lengths + own_bias.abs())
    assert_within(forward(right)[1], expected, bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_compute_dtype_is_a_lower_bound_of_precision(dtype):
    """On the CPU products stay in float32."""
    x, w, y, _ = problem(dtype=torch.float32)
    plain = F.linear_margin_cross_entropy(x, w, y, scale=16.0)
    assert torch.equal(F.linear_margin_cross_entropy(x, w, y, scale=16.0, compute_dtype=dtype), plain)


def test_100000_rows():
    x, w, y, _ = problem(rows=100_000, features=4, classes=50, dtype=torch.float32)
    loss = F.linear_margin_cross_entropy(x, w, y, scale=16.0, m2=0.2)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    expected = reference.linear_margin_cross_entropy(*wide, y, scale=16.0, m2=0.2)
    rounding = LinearRounding(x, w, y, scale=16.0, m2=0.2)
    assert_within(loss, expected, rounding.loss(0.0, len(y)) + stored(expected, torch.float32))
    bounds = rounding.loss_gradients(1 / len(y))
    for got, true, bound in zip(gradients(loss, x, w), gradients(expected, *wide), bounds):
        assert_within(got, true, bound + stored(true, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [64 << 10, 1 << 20, 256 << 20])
def test_lanes(dtype, limit):
    """Chunks dealt to two threads, several row tiles, some products kept: the same results."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x, w, y, b = problem(rows=300, features=5, classes=2500, dtype=dtype, bias=True)
        y[7], y[8] = -1, y[9]
        parameters = dict(scale=6.0, m2=0.3, label_smoothing=0.2, ignore_index=-1)
        wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
        expected = reference.linear_margin_cross_entropy(wide[0], wide[1], y, wide[2], **parameters)
        with torchmargin.workspace_limit(limit):
            assert dtype != torch.float32 or torchmargin.plan(300, 5, 2500).lanes == (1 if limit == 64 << 10 else 2)
            loss = F.linear_margin_cross_entropy(x, w, y, b, **parameters)
            grads = gradients(loss, x, w, b)
            with torch.inference_mode():
                assert torch.equal(F.linear_margin_cross_entropy(x, w, y, b, **parameters), loss)
    finally:
        torch.set_num_threads(threads)
    rounding = LinearRounding(x, w, y, b, **parameters)
    counted = (y >= 0).sum()
    assert_within(loss, expected, rounding.loss(0.2, counted) + stored(expected, loss.dtype))
    bounds = rounding.loss_gradients(1 / counted, 0.2)
    for got, true, bound in zip(grads, gradients(expected, *wide), bounds):
        assert_within(got, true, bound + stored(true, dtype))
