"""margin_cross_entropy, margin_logits and margin_transform: values, the ends at +-1, dtypes, strides, errors."""

import math

import pytest
import torch

import torchmargin.functional as F
from torchmargin import reference

from conftest import gradients, problem
from rounding import CosineRounding, LinearRounding, assert_within, stored, unit_roundoff

EXTENSIONS = ["none", "linear", "continuous", "easy", "clip", "monotonic"]


def test_published_values_of_paddle():
    """paddle.nn.functional.margin_cross_entropy's documentation: s = 64, m2 = 0.5, targets 1 and 0."""
    cosine = torch.tensor([[-0.59561850, 0.32797505, 0.80279214, 0.00144975],
                           [-0.16265212, 0.84155098, 0.62008629, 0.79126072]])  # fmt: skip
    loss = F.margin_cross_entropy(cosine, torch.tensor([1, 0]), scale=64.0, m2=0.5, reduction="none")
    # Theirs come from logits of at most 128 apart in float32: the logits, their difference and the result are rounded.
    theirs = torch.tensor([61.94391901, 93.30853839])
    assert_within(loss, theirs, 4 * 128 * torch.finfo(torch.float32).eps / 2)


def test_the_published_continuation_of_wespeaker():
    """theta = 3.1, m = 0.2, s = 32: 32 (cos(3.1) - (1 + cos(pi - 0.2))), and no jump at theta + m = pi."""
    m = 0.2
    x = torch.tensor([[math.cos(3.1), math.sin(3.1)]], dtype=torch.float64)
    w, y = torch.eye(2, dtype=torch.float64), torch.tensor([0])
    margin = {"m2": m, "extension": "continuous"}
    logit = F.linear_margin_lse(x, w, y, scale=32.0, **margin).target_logit
    expected = 32 * (math.cos(3.1) - (1 + math.cos(math.pi - m)))
    assert abs(expected + 32.610) < 5e-4  # three decimals are printed
    # x is rounded, too: 3.1 by some u over sin(3.1), where psi's slope to the angle is that sine.
    true = torch.tensor([expected], dtype=torch.float64)
    assert_within(logit, true, LinearRounding(x, w, y, scale=32.0, m2=m).target)
    assert_within(F.margin_transform(x[:, 0], **margin), true / 32, CosineRounding(x, m2=m).psi)
    seam = torch.tensor([math.pi - m - 1e-9, math.pi - m + 1e-9], dtype=torch.float64).cos()
    before, past = F.margin_transform(seam, **margin)
    assert abs(before - past) < 1e-9 and abs(past + 1) < 1e-9  # the slopes, at most sin(m), times the step of 1e-9


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("margin_gradient", ["exact", "straight_through"])
def test_agrees_with_the_reference(extension, margin_gradient):
    cosine = (2 * torch.rand(40, 2500, dtype=torch.float64) - 1).requires_grad_()
    target = torch.randint(0, 2500, (40,))
    target[3] = -100
    margin = {"m2": 0.4, "m3": 0.1, "extension": extension, "margin_gradient": margin_gradient}
    options = {"scale": 20.0, "label_smoothing": 0.1, **margin}
    weight = torch.rand(40, dtype=torch.float64)
    for samples in ({}, {"sample_margin_weight": weight}, {"sample_m2": 0.1 * weight, "sample_m3": 0.1 * weight}):
        got = F.margin_cross_entropy(cosine, target, **options, **samples)
        expected = reference.margin_cross_entropy(cosine, target, **options, **samples)
        rounding = CosineRounding(cosine, target, scale=20.0, m2=0.5, m3=0.2)  # the largest margins of rows
        assert_within(got, expected, rounding.loss(0.1).sum() / 39)
        assert_within(
            *(torch.autograd.grad(loss, cosine)[0] for loss in (got, expected)), rounding.loss_gradient(1 / 39, 0.1)
        )
    got, expected = F.margin_transform(cosine, **margin), reference.margin_transform(cosine, **margin)
    assert_within(got, expected, rounding.psi)
    assert_within(*(torch.autograd.grad(y.sum(), cosine)[0] for y in (got, expected)), rounding.slope)


@pytest.mark.parametrize("m1", [1.0, 2.0, 4.0, 1.5])
def test_multiplied_angles_agree_with_the_reference(m1):
    cosine = (1.998 * torch.rand(300, dtype=torch.float64) - 0.999).requires_grad_()
    for extension in ("none", "clip", "monotonic"):
        margin = {"m1": m1, "m2": 0.1, "extension": extension, "margin_weight": 0.7}
        got, expected = F.margin_transform(cosine, **margin), reference.margin_transform(cosine, **margin)
        rounding = CosineRounding(cosine, m1=m1, m2=0.1)
        assert_within(got, expected, rounding.psi)
        slopes = [torch.autograd.grad(y.sum(), cosine)[0] for y in (got, expected)]
        assert_within(*slopes, rounding.slope)


# At the ends: 1 - mu + mu e, with e = +-m1^2 cos(phi) on a cosine, m1^2 |cos(phi)| for monotonic, 1 on a fallback,
# 0 where clip is flat.
@pytest.mark.parametrize("beyond", [0.0, 1e-7, 0.5])
@pytest.mark.parametrize(
    ("margin", "at_one", "at_minus_one"),
    [
        ({"m3": 0.35}, 1.0, 1.0),
        ({"m1": 3.0}, 9.0, 9.0),  # cos(3 theta) is a polynomial: 9 at both ends
        ({"m1": 4.0, "extension": "monotonic"}, 16.0, 16.0),
        ({"m2": 0.5}, math.cos(0.5), math.cos(0.5)),
        ({"m2": 0.5, "extension": "linear"}, math.cos(0.5), 1.0),
        ({"m2": 0.5, "extension": "continuous"}, math.cos(0.5), 1.0),
        ({"m2": 0.5, "extension": "easy"}, math.cos(0.5), 1.0),
        ({"m2": 0.5, "extension": "clip"}, math.cos(0.5), 0.0),
        ({"m2": 0.5, "margin_weight": 0.25}, 0.75 + 0.25 * math.cos(0.5), 0.75 + 0.25 * math.cos(0.5)),
        ({"m2": 0.5, "margin_gradient": "straight_through"}, 1.0, 1.0),
    ],
)
def test_the_ends(margin, at_one, at_minus_one, beyond):
    cosine = torch.tensor([1.0 + beyond, -1.0 - beyond], dtype=torch.float64).requires_grad_()
    value = F.margin_transform(cosine, **margin)
    rounding = CosineRounding(cosine, scale=2.0, m1=margin.get("m1", 1.0), m2=margin.get("m2", 0.0))
    assert_within(value, reference.margin_transform(cosine.detach(), **margin), rounding.psi)
    (slope,) = torch.autograd.grad(value.sum(), cosine)
    # A cosine, squares and products of it: no division by the sine.
    ends = torch.tensor([at_one, at_minus_one], dtype=torch.float64)
    assert_within(slope, ends, 8 * unit_roundoff(torch.float64) * (1 + ends.abs()))
    # The loss has the same at its target.
    matrix = torch.tensor([[1.0 + beyond, 0.1], [0.2, -1.0 - beyond]], dtype=torch.float64).requires_grad_()
    loss = F.margin_cross_entropy(matrix, torch.tensor([0, 1]), scale=2.0, reduction="sum", **margin)
    (grad,) = torch.autograd.grad(loss, matrix)
    own = F.margin_transform(matrix.detach().diagonal(), **margin)
    other = torch.tensor([0.1, 0.2], dtype=torch.float64)
    expected = -2.0 * torch.sigmoid(2 * (other - own)) * slope
    # The sigmoid has the relative error of its argument.
    assert_within(grad.diagonal(), expected, expected.abs() * (4 * rounding.psi + 16 * unit_roundoff(torch.float64)))


def test_true_limits():
    """Where the limit at the ends is finite, the slope there is it."""
    near, at = (torch.tensor([c, -c], dtype=torch.float64).requires_grad_() for c in (1 - 1e-10, 1.0))
    for margin in ({"m1": 3.0}, {"m1": 2.0, "extension": "monotonic"}, {"m3": 0.2}):
        slopes = [torch.autograd.grad(F.margin_transform(c, **margin).sum(), c)[0] for c in (near, at)]
        # 1e-10 from the end the slope has moved by less than m1^4 1e-10 (a polynomial's), and is divided by a sine.
        bound = margin.get("m1", 1.0) ** 4 * 1e-10 + CosineRounding(near, m1=margin.get("m1", 1.0), m3=0.2).slope
        assert_within(*slopes, bound)


def test_without_an_angle_it_is_the_cosine_itself():
    cosine = 2 * torch.rand(1000, dtype=torch.float64) - 1
    for extension in EXTENSIONS:
        assert torch.equal(F.margin_transform(cosine, extension=extension), cosine)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_easy_at_a_right_angle_has_no_margin(dtype):
    """cos(theta) = 0 exactly, from a cosine, from orthogonal rows and from a zero row: the cosine is not above 0."""
    margin = {"m2": 0.5, "extension": "easy", "scale": 64.0}
    cosine = torch.zeros(1, 3, dtype=dtype)
    w = torch.eye(3, dtype=dtype)
    for module in (F, reference):
        loss = module.margin_cross_entropy(cosine, torch.tensor([1]), **margin)
        # The reference's angle, pi / 2, is rounded to dtype and its cosine with it; three logits of it, and a result.
        eps = torch.finfo(dtype).eps
        assert_within(loss, torch.tensor(math.log(3), dtype=torch.float64), (3 * 64 + 8) * eps)
        assert module.margin_transform(cosine, m2=0.5, extension="easy").abs().max() <= eps
        for x in (torch.zeros(1, 3, dtype=dtype), torch.tensor([[0.0, 0.0, 2.0]], dtype=dtype)):
            logit = module.linear_margin_lse(x, w, torch.tensor([1]), **margin).target_logit
            assert logit.abs() <= 64 * eps
            expected = torch.logsumexp(torch.tensor([0.0, 0.0, 64.0 * x[0, 2].sign()], dtype=dtype), 0)
            loss = module.linear_margin_cross_entropy(x, w, torch.tensor([1]), **margin)
            assert_within(loss, expected, (64 + 8 * (1 + 64)) * eps)


def test_easy_at_a_right_angle_in_forward_mode():
    """The ops' formula has the same branch as the op: the tangent is that of cos(theta) itself."""
    w, y = torch.eye(3, dtype=torch.float64), torch.tensor([1])
    x, direction = torch.tensor([[0.0, 0.0, 2.0]], dtype=torch.float64), torch.tensor([[0.0, 1.0, 0.0]]).double()
    logit = lambda x: F.linear_margin_lse(x, w, y, scale=4.0, m2=0.5, extension="easy").target_logit  # noqa: E731
    value, tangent = torch.func.jvp(logit, (x,), (direction,))
    rounding = LinearRounding(x, w, y, scale=4.0, m2=0.5)
    assert_within(value, logit(x), rounding.target)
    assert_within(tangent, torch.tensor([2.0]), rounding.gradients(0.0, 1.0)[0][0])


@pytest.mark.parametrize("samples", [False, True])
def test_the_reference_runs_under_autocast(samples):
    """With the op's rules: the weight's dtype, float64 margins beside it, nothing rounded to 16 bits."""
    x, w, y, b = (None if t is None else t.detach() for t in problem(dtype=torch.float32, bias=True))
    given = {"sample_m2": torch.full((9,), 0.3, dtype=torch.float64)} if samples else {"m2": 0.3}
    cosine = (torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(w).T).bfloat16()
    rounding, u = LinearRounding(x, w, y, b, scale=8.0, m2=0.3), unit_roundoff(torch.float32)
    with torch.autocast("cpu"):
        for call in (
            lambda module: module.linear_margin_cross_entropy(x.bfloat16(), w, y, b, scale=8.0, **given),
            lambda module: module.margin_logits(x.bfloat16(), w, y, b, scale=8.0, **given),
            lambda module: module.linear_margin_lse(x, w, y, scale=8.0, **given).other_lse,
            lambda module: module.margin_cross_entropy(cosine, y, scale=8.0, **given),
        ):
            got, expected = call(F), call(reference)
            assert got.dtype == expected.dtype == torch.float32
            # The reference does all in float32, its target's angle, psi and sums too: some thirty roundings.
            assert_within(got, expected, (rounding.lse + 30 * 8.0 * u).max() + stored(expected, torch.float32))


def test_nan_stays():
    cosine = torch.tensor([[0.1, math.nan], [0.1, 0.2]])
    loss = F.margin_cross_entropy(cosine, torch.tensor([0, 0]), m2=0.3, reduction="none")
    assert loss.isnan().tolist() == [True, False]
    assert F.margin_transform(cosine, m2=0.3).isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_cosines_have_float32_losses(dtype):
    cosine = (2 * torch.rand(9, 1500) - 1).to(dtype).requires_grad_()
    target = torch.randint(0, 1500, (9,))
    loss = F.margin_cross_entropy(cosine, target, scale=30.0, m2=0.3, reduction="none")
    wide = cosine.detach().double().requires_grad_()
    expected = F.margin_cross_entropy(wide, target, scale=30.0, m2=0.3, reduction="none")
    assert loss.dtype == torch.float32
    rounding = CosineRounding(cosine, target, scale=30.0, m2=0.3)
    assert_within(loss, expected, rounding.loss() + stored(expected, torch.float32))
    (grad,) = gradients(loss.sum(), cosine)
    assert grad.dtype == dtype
    (true,) = gradients(expected.sum(), wide)
    # The flush takes what is below exp(-50).
    assert_within(grad, true, rounding.loss_gradient() + stored(true, dtype) + 30 * math.exp(-50))
    assert F.margin_transform(cosine, m2=0.3).dtype == dtype


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_strides(layout):
    plain = 2 * torch.rand(12, 2100, dtype=torch.float64) - 1
    cosine = {
        "transposed": lambda: plain.T.contiguous().T,
        "sliced": lambda: plain.repeat_interleave(3, 1)[:, ::3],
        "expanded": lambda: plain[:1].expand(12, -1),
    }[layout]()
    target = torch.randint(0, 2100, (24,))[::2]
    assert torch.equal(
        F.margin_cross_entropy(cosine, target, scale=9.0, m2=0.2),
        F.margin_cross_entropy(cosine.contiguous(), target.contiguous(), scale=9.0, m2=0.2),
    )
    assert torch.equal(F.margin_transform(cosine, m2=0.2), F.margin_transform(cosine.contiguous(), m2=0.2))


def test_edges_of_the_cosine_loss():
    one = torch.full((3, 1), 0.3, dtype=torch.float64, requires_grad=True)  # C = 1: nothing to lose against
    loss = F.margin_cross_entropy(one, torch.zeros(3, dtype=torch.long), scale=9.0, m2=0.2)
    assert loss == 0 and (gradients(loss, one)[0] == 0).all()
    empty = torch.empty(0, 5, requires_grad=True)
    none = torch.empty(0, dtype=torch.long)
    assert F.margin_cross_entropy(empty, none).isnan() and F.margin_cross_entropy(empty, none, reduction="sum") == 0
    ignored = torch.full((2, 3), math.nan, requires_grad=True)
    loss = F.margin_cross_entropy(ignored, torch.full((2,), 7), ignore_index=7, reduction="sum")
    assert loss == 0 and (gradients(loss, ignored)[0] == 0).all()


@pytest.mark.parametrize("normalize_input", [True, False])
@pytest.mark.parametrize("normalize_weight", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_logits_agree_with_the_reference(normalize_input, normalize_weight, with_bias, workspace):
    x, w, y, b = problem(*workspace, bias=with_bias)
    y[:2] = torch.tensor([-1, 10**6])  # absent
    options = {"scale": 7.0, "m2": 0.3, "m3": 0.1, "extension": "linear"}
    options.update(normalize_input=normalize_input, normalize_weight=normalize_weight)
    got, expected = F.margin_logits(x, w, y, b, **options), reference.margin_logits(x, w, y, b, **options)
    rounding = LinearRounding(x, w, y, b, **options)
    bound = torch.maximum(rounding.logit, rounding.target)[:, None]
    assert_within(got, expected, bound)
    upstream = torch.randn_like(got)
    leaves = [leaf for leaf in (x, w, b) if leaf is not None]
    grads = [gradients(logits, *leaves, upstream=upstream) for logits in (got, expected)]
    for ours, true, limit in zip(*grads, rounding.logits_gradients(upstream)):
        assert_within(ours, true, limit)
    plain = F.margin_logits(x, w, None, b, **options)
    assert_within(plain, reference.margin_logits(x, w, None, b, **options), rounding.logit[:, None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_have_float32_logits(dtype):
    x, w, y, _ = problem(dtype=dtype)
    logits = F.margin_logits(x, w, y, scale=64.0, m2=0.3)
    expected = F.margin_logits(x.detach().double(), w.detach().double(), y, scale=64.0, m2=0.3)
    assert logits.dtype == torch.float32
    rounding = LinearRounding(x, w, y, scale=64.0, m2=0.3)
    assert_within(logits, expected, torch.maximum(rounding.logit, rounding.target)[:, None])
    assert all(g.dtype == dtype for g in gradients(logits.sum(), x, w))


COSINE, TARGET = torch.rand(4, 9), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: F.margin_cross_entropy(COSINE[0], TARGET), r"margin_cross_entropy: expected cosine to have shape"),
        (lambda: F.margin_cross_entropy(COSINE[:, :0], TARGET), r"with C > 0, but got \[4, 0\]"),
        (lambda: F.margin_cross_entropy(COSINE.long(), TARGET), "expected cosine to be float64, float32"),
        (lambda: F.margin_cross_entropy(COSINE, TARGET.int()), "expected target to be int64, but got int32"),
        (lambda: F.margin_cross_entropy(COSINE, TARGET[:2]), r"expected target to have shape \[4\], but got \[2\]"),
        (lambda: F.margin_cross_entropy(COSINE, TARGET, m1=-1.0), "margin_cross_entropy: expected m1 > 0, but got -1"),
        (lambda: F.margin_cross_entropy(COSINE, TARGET, reduction="max"), "expected reduction to be one of"),
        (lambda: F.margin_cross_entropy(COSINE, TARGET, label_smoothing=1.5), r"expected label_smoothing in \[0, 1\]"),
        (lambda: F.margin_cross_entropy(COSINE, TARGET, sample_m2=torch.zeros(3)), r"sample_m2 to have shape \[4\]"),
        (lambda: F.margin_transform(COSINE.long()), "margin_transform: expected cosine to be float64"),
        (lambda: F.margin_transform(COSINE, extension="soft"), "margin_transform: expected extension to be one of"),
        (lambda: F.margin_transform(COSINE, m2=math.inf), "margin_transform: expected m2 to be finite, but got inf"),
        (lambda: F.margin_logits(COSINE, COSINE[:, :3]), r"margin_logits: expected weight to have shape \[C, 9\]"),
        (lambda: F.margin_logits(COSINE, COSINE, TARGET[:2]), r"expected target to have shape \[4\], but got \[2\]"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inference", [False, True])
def test_bad_arguments(call, text, inference):
    with torch.inference_mode(inference), pytest.raises(RuntimeError, match=text):
        call()


def test_a_target_out_of_range():
    with pytest.raises(IndexError, match=r"margin_cross_entropy: expected target values in \[0, 9\).*got 9 at row 2"):
        F.margin_cross_entropy(COSINE, torch.tensor([0, 1, 9, 2]))
