"""The ops against the eager specification: all parameters, all results, all dtypes."""

import itertools

import pytest
import torch

import torchmargin
import torchmargin.functional as F
from torchmargin import reference

from conftest import gradients, problem

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
    for name, got, expected in zip(ours._fields, ours, theirs):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=name)
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
        for got, expected in zip(*pair):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_cross_entropy_matches_the_specification(reduction, label_smoothing, with_bias, workspace):
    x, w, y, b = problem(*workspace, bias=with_bias)
    y[1] = y[4] = 7  # ignore_index may lie inside [0, C)
    parameters = dict(scale=8.0, m2=0.4, label_smoothing=label_smoothing, ignore_index=7, reduction=reduction)
    ours = F.linear_margin_cross_entropy(x, w, y, b, **parameters)
    theirs = reference.linear_margin_cross_entropy(x, w, y, b, **parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(ours)
    for got, expected in zip(
        gradients(ours, x, w, b, upstream=upstream), gradients(theirs, x, w, b, upstream=upstream)
    ):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_sample_margins_and_their_gradients(workspace):
    x, w, y, _ = problem(*workspace)
    m2, m3 = 0.2 * torch.rand(2, workspace.rows, dtype=torch.float64)
    m2, m3 = m2.detach().requires_grad_(), m3.detach().requires_grad_()
    y[3] = -1
    for extension in EXTENSIONS:
        parameters = dict(scale=5.0, m2=0.3, m3=0.1, extension=extension, sample_m2=m2, sample_m3=m3)
        ours = F.linear_margin_lse(x, w, y, **parameters).target_logit
        theirs = reference.linear_margin_lse(x, w, y, **parameters).target_logit
        torch.testing.assert_close(ours, theirs)
        for got, expected in zip(gradients(ours.sum(), x, w, m2, m3), gradients(theirs.sum(), x, w, m2, m3)):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["lse", "loss", "cosine", "logits"])
def test_float64_sample_margins_beside_any_dtype(op, dtype):
    """Read as they are, in float64, and so are their gradients: a float32 copy would differ."""
    x, w, y, _ = problem(dtype=torch.float64)
    x, w = x.detach().to(dtype), w.detach().to(dtype)
    m2, m3 = (0.2 * torch.rand(2, 9, dtype=torch.float64)).unbind()
    weight = torch.rand(9, dtype=torch.float64)
    cosine = (torch.nn.functional.normalize(x.double()) @ torch.nn.functional.normalize(w.double()).T).to(dtype)
    upstream = torch.randn(9, dtype=torch.float64)

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
    # Sums over the classes are acc's; the target pass is float64 and rounded once.
    tolerance = 1e-12 if acc == torch.float64 else 2e-6
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(grads, true):
        torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=10 * tolerance)


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
    assert abs(ours.item() - theirs.item()) <= 1e-5 * theirs.item()
    for got, expected in zip(gradients(ours, x, w, b), gradients(theirs, *wide)):
        assert got.dtype == dtype
        # float32 sums, then one rounding of each element to the input's dtype.
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert (got.double() - expected).norm() <= (1e-5 + rounding) * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_strides(dtype):
    x0, w0, y0, _ = problem(rows=8, features=5, classes=12, dtype=dtype)
    expected = F.linear_margin_cross_entropy(x0, w0, y0, scale=8.0, m2=0.2, label_smoothing=0.1)
    true = gradients(expected, x0, w0)
    transposed = lambda t: t.detach().t().contiguous().t()  # noqa: E731
    spaced = lambda t: torch.stack([t.detach(), t.detach() + 1], dim=2)[:, :, 0]  # noqa: E731
    for view in (transposed, spaced):
        x, w = view(x0).requires_grad_(), view(w0).requires_grad_()
        y = torch.stack([y0, y0], dim=1)[:, 0]
        loss = F.linear_margin_cross_entropy(x, w, y, scale=8.0, m2=0.2, label_smoothing=0.1)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
        for got, wanted in zip(gradients(loss, x, w), true):
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
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
    for got, expected in zip(merged, whole):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    loss = lambda r: (torch.logaddexp(r.other_lse, r.target_logit) - r.target_logit).sum()  # noqa: E731
    for got, expected in zip(gradients(loss(merged), x, w), gradients(loss(whole), x, w)):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


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
    assert abs(loss.item() - expected.item()) <= 2e-5 * expected.item()
    for got, true in zip(gradients(loss, x, w), gradients(expected, *wide)):
        assert (got - true).norm() <= 1e-4 * true.norm()


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
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    assert abs(loss.item() - expected.item()) <= tolerance * expected.item()
    rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    for got, true in zip(grads, gradients(expected, *wide)):
        assert (got.double() - true).norm() <= (tolerance + rounding) * true.norm()
