"""The edges: angles of 0 and pi, zero rows, one class, no rows, ignored rows, NaN, memory."""

import math

import pytest
import torch

import torchmargin
import torchmargin.functional as F
from torchmargin import reference

from conftest import WORKSPACES, gradients, packed, problem
from rounding import LinearRounding, assert_within

ARCFACE = {"scale": 64.0, "m2": 0.5, "extension": "linear"}


def test_the_small_workspaces_cross_what_they_should():
    plans = {}
    for name, (limit, sizes) in WORKSPACES.items():
        with torchmargin.workspace_limit(limit):
            plans[name] = torchmargin.plan(*sizes, dtype=torch.float64)
    kept, recomputed = plans["4KiB-kept"], plans["4KiB-recomputed"]
    assert kept.class_chunk < kept.kept_classes < 61 - kept.class_chunk
    assert recomputed.kept_classes == 0
    assert recomputed.row_tile < 40 and recomputed.class_chunk < 20


# cos(theta) = +1 and -1 exactly, and angles at which an arccos in float32 has lost every digit.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("extension", ["none", "linear", "continuous", "easy", "clip", "monotonic"])
@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-7, 1e-4])
def test_near_parallel(dtype, extension, opposite, angle):
    """Finite everywhere, and the tangent's direction right however small the angle is."""
    w = torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 1.0]], dtype=dtype).requires_grad_()
    sign = -1.0 if opposite else 1.0
    x = torch.tensor([[sign * 2 * math.cos(angle), 2 * math.sin(angle), 0.0]], dtype=dtype).requires_grad_()
    margin = {"m2": 0.5, "scale": 8.0, "extension": extension}
    result = F.linear_margin_lse(x, w, torch.tensor([0]), **margin)
    theta = math.pi - angle if opposite else angle
    # Two of x's numbers are rounded to its dtype and turn it by 2 u of its angle; unit vectors are four roundings in
    # float64 off, and a difference of two twice that.
    u, difference = torch.finfo(dtype).eps / 2, 8 * 2.0**-53
    turned = 2 * u * angle + 2 * difference
    assert abs(result.target_angle.item() - theta) <= turned + u * theta
    grad_x, grad_w = gradients(result.target_logit.sum(), x, w)
    assert grad_x.isfinite().all() and grad_w.isfinite().all()
    if angle == 0.0:  # the gradient of theta is 0 there
        assert (grad_x == 0).all() and (grad_w[0] == 0).all()
        return
    slope = torch.tensor(theta, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(reference.psi(slope, m2=0.5, extension=extension), slope)
    # d theta / dx is a vector of length 1 / |x| across x: -y at theta = 0, where more y opens the angle.
    size = 8.0 * expected.item() / 2
    true = size * torch.tensor([-math.sin(angle), (-1 if opposite else 1) * math.cos(angle), 0.0], dtype=torch.float64)
    # The slope is psi's where x has turned to (|psi''| <= 1 in each of these extensions). What the difference of unit
    # vectors is off lies along x: the tangent has it over the angle, its length the square of that.
    along = difference / angle
    rounding = 8.0 / 2 * turned + abs(size) * (2 * difference + 2 * u)
    bound = rounding + abs(size) * torch.tensor([along, along**2, 0.0], dtype=torch.float64)
    assert_within(grad_x[0], true, bound)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("side", ["input", "weight", "both"])
def test_zero_rows(side, normalize):
    """No gradient to a zero row where it is normalised, the linear one where it is not."""
    x, w, y, _ = problem()
    with torch.no_grad():
        if side != "weight":
            x[3] = 0
        if side != "input":
            w[y[3]] = 0
    parameters = {"scale": 4.0, "normalize_input": normalize, "normalize_weight": normalize}
    result = F.linear_margin_lse(x, w, y, **parameters)
    assert result.target_angle[3] == math.pi / 2
    loss = F.linear_margin_cross_entropy(x, w, y, **parameters)
    grad_x, grad_w = gradients(loss, x, w)
    rounding = LinearRounding(x, w, y, **parameters)
    if normalize:
        plain = reference.linear_margin_cross_entropy(x, w, y, **parameters)
        assert_within(loss, plain, rounding.loss(0.0, 9))
        if side != "weight":
            assert (grad_x[3] == 0).all()
        if side != "input":
            assert (grad_w[y[3]] == 0).all()
    else:  # a dead-ReLU embedding learns under softmax
        plain = torch.nn.functional.cross_entropy(4.0 * x @ w.T, y)
        assert_within(loss, plain, rounding.loss(0.0, 9))
        for got, expected, bound in zip((grad_x, grad_w), gradients(plain, x, w), rounding.loss_gradients(1 / 9)):
            assert_within(got, expected, bound)


def test_one_class():
    x, w, _, b = problem(classes=1, bias=True)
    y = torch.zeros(9, dtype=torch.long)
    result = F.linear_margin_lse(x, w, y, b, **ARCFACE)
    assert (result.other_lse == -math.inf).all() and (result.max_other_logit == -math.inf).all()
    loss = F.linear_margin_cross_entropy(x, w, y, b, **ARCFACE)
    assert loss == 0
    assert all((grad == 0).all() for grad in gradients(loss, x, w, b))
    # whatever the upstream gradient of other_lse is
    upstream = torch.full((9,), math.nan, dtype=torch.float64)
    again = F.linear_margin_lse(x, w, y, b, **ARCFACE)
    assert all((g == 0).all() for g in gradients(again.other_lse, x, w, b, upstream=upstream))


def test_no_rows():
    x, w, y, b = problem(rows=0, bias=True)
    mean = F.linear_margin_cross_entropy(x, w, y, b)
    assert mean.isnan()
    assert F.linear_margin_cross_entropy(x, w, y, b, reduction="sum") == 0
    assert F.linear_margin_cross_entropy(x, w, y, b, reduction="none").shape == (0,)
    for grad, leaf in zip(gradients(mean, x, w, b), (x, w, b)):
        assert grad.shape == leaf.shape and (grad == 0).all()


def test_all_rows_ignored():
    x, w, _, b = problem(bias=True)
    y = torch.full((9,), -100)
    loss = F.linear_margin_cross_entropy(x, w, y, b, label_smoothing=0.1)
    assert loss.isnan()
    assert all((grad == 0).all() for grad in gradients(loss, x, w, b))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("content", [math.nan, math.inf])
@pytest.mark.parametrize("ignored", [-7, 2])  # also one of the classes
def test_ignored_rows_add_nothing_even_if_they_hold_nan(ignored, content, label_smoothing, workspace):
    x, w, y, b = problem(*workspace, bias=True)
    keep = torch.ones(len(y), dtype=torch.bool)
    keep[[1, 6]] = False
    with torch.no_grad():
        x[1] = content
    y[y == ignored] = ignored + 1
    y[~keep] = ignored
    parameters = {**ARCFACE, "label_smoothing": label_smoothing, "ignore_index": ignored}
    loss = F.linear_margin_cross_entropy(x, w, y, b, **parameters)
    rest = x.detach()[keep].requires_grad_()
    expected = F.linear_margin_cross_entropy(rest, w, y[keep], b, **parameters)
    rounding, counted = LinearRounding(rest, w, y[keep], b, **ARCFACE), keep.sum()
    assert_within(loss, expected, rounding.loss(label_smoothing, counted))
    grad_x, *others = gradients(loss, x, w, b)
    assert (grad_x[~keep] == 0).all()
    bounds = rounding.loss_gradients(1 / counted, label_smoothing)
    for got, true, bound in zip((grad_x[keep], *others), gradients(expected, rest, w, b), bounds):
        assert_within(got, true, bound)


@pytest.mark.parametrize("content", [math.nan, math.inf])
def test_non_finite_inputs_reach_the_loss_of_their_rows(content):
    x, w, y, _ = problem()
    with torch.no_grad():
        x[2, 1] = content
    loss = F.linear_margin_cross_entropy(x, w, y, reduction="none", **ARCFACE)
    assert loss[2].isnan() and loss[torch.arange(9) != 2].isfinite().all()
    with torch.no_grad():
        x[2, 1] = 0.5
        w[5, 0] = content
    result = F.linear_margin_lse(x, w, y, **ARCFACE)
    assert (result.other_lse.isnan() | (y == 5)).all() and (result.max_other_logit.isnan() | (y == 5)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("classes", [3, 5000])  # the second crosses blocks and chunks
@pytest.mark.parametrize("others", [0.0, 1e4])
def test_an_infinite_logit_of_another_class_is_an_infinite_log_sum_exp(dtype, classes, others):
    """As torch.logsumexp has it, wherever the logit stands among larger and smaller ones."""
    for place in {1, classes // 2, classes - 1}:
        bias = torch.linspace(-others, others, classes, dtype=dtype)
        bias[place] = math.inf
        x, w = torch.randn(2, 3, dtype=dtype), torch.randn(classes, 3, dtype=dtype)
        y = torch.tensor([0, place])
        lse = F.linear_margin_lse(x, w, y, bias)
        assert lse.other_lse[0] == math.inf and lse.max_other_logit[0] == math.inf
        assert lse.other_lse[1].isfinite()
        loss = F.linear_margin_cross_entropy(x, w, y, bias, reduction="none")
        assert loss[0] == math.inf and loss[1] == 0
        cosine = bias.expand(2, classes).contiguous()
        assert F.margin_cross_entropy(cosine, torch.zeros(2, dtype=torch.long), reduction="none")[0] == math.inf


@pytest.mark.parametrize("size", [200.0, -200.0])
def test_logits_whose_exponential_float32_does_not_hold(size):
    """Of vectors that are not normalised: exp(200) would be infinite and exp(-200) zero."""
    x, w, y = torch.full((2, 1), size), torch.tensor([[1.0], [1.0], [0.75]]), torch.zeros(2, dtype=torch.long)
    lse = F.linear_margin_lse(x, w, y, normalize_input=False, normalize_weight=False).other_lse
    # Products are exact, and the smaller logit's e^-50 is lost beside the larger one's 1.
    assert torch.equal(lse, (x.double() @ w[1:].double().T).logsumexp(1).float())


def test_a_bias_of_minus_infinity_masks_a_class():
    x, w, y, b = problem(bias=True)
    y[:] = 0
    with torch.no_grad():
        b[5] = -math.inf
    keep = torch.arange(23) != 5
    masked = F.linear_margin_lse(x, w, y, b).other_lse
    rest = F.linear_margin_lse(x, w[keep], y, b[keep]).other_lse
    assert_within(masked, rest, LinearRounding(x, w[keep], y, b[keep]).lse)
    grads = gradients(masked.sum(), x, w, b)
    assert all(g.isfinite().all() for g in grads) and (grads[1][5] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("limit", [4096, 1 << 20])
def test_the_same_bits_every_run(dtype, limit):
    rows = 6 if limit == 4096 else 300
    x, w, y, b = problem(rows=rows, features=8, classes=700, dtype=dtype, bias=True)
    with torchmargin.workspace_limit(limit):
        runs = []
        for _ in range(3):
            loss = F.linear_margin_cross_entropy(x, w, y, b, label_smoothing=0.1, **ARCFACE)
            runs.append((loss, *gradients(loss, x, w, b)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run))


def test_retain_graph_twice(workspace):
    """Backward never writes into a kept chunk."""
    x, w, y, _ = problem(*workspace)
    loss = F.linear_margin_cross_entropy(x, w, y, **ARCFACE)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w), retain_graph=True)
    third = torch.autograd.grad(loss, (x, w))
    for other in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(first, other))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, (x, w))


def test_the_limit_may_change_between_forward_and_backward():
    x, w, y, _ = problem(classes=500)
    expected = gradients(F.linear_margin_cross_entropy(x, w, y, **ARCFACE), x, w)
    bounds = LinearRounding(x, w, y, **ARCFACE).loss_gradients(1 / 9)
    for before, after in ((1 << 20, 4096), (4096, 1 << 20), (20_000, 4096)):
        with torchmargin.workspace_limit(before):
            loss = F.linear_margin_cross_entropy(x, w, y, **ARCFACE)
        with torchmargin.workspace_limit(after):
            for got, true, bound in zip(gradients(loss, x, w), expected, bounds):
                assert_within(got, true, bound)


@pytest.mark.parametrize("power", [-24, 24])
def test_loss_scaling_is_exact(power):
    x, w, y, b = problem(rows=40, features=16, classes=300, dtype=torch.float32, bias=True)
    loss = F.linear_margin_cross_entropy(x, w, y, b, label_smoothing=0.1, **ARCFACE)
    plain = torch.autograd.grad(loss, (x, w, b), retain_graph=True)
    scaled = torch.autograd.grad(loss, (x, w, b), torch.tensor(2.0**power))
    for one, other in zip(plain, scaled):
        assert torch.equal(one * 2.0**power, other)


def test_only_wanted_gradients_are_made():
    x, w, y, _ = problem()
    both = gradients(F.linear_margin_cross_entropy(x, w, y, **ARCFACE), x, w)
    only_w = F.linear_margin_cross_entropy(x.detach(), w, y, **ARCFACE)
    only_x = F.linear_margin_cross_entropy(x, w.detach(), y, **ARCFACE)
    assert torch.equal(gradients(only_x, x)[0], both[0]) and torch.equal(gradients(only_w, w)[0], both[1])
    assert not F.linear_margin_cross_entropy(x.detach(), w.detach(), y, **ARCFACE).requires_grad


def _peak_beyond_results(limit, classes, rows=256):
    """torch's own allocations during forward and backward, beyond inputs and gradients."""
    x = torch.randn(rows, 64).requires_grad_()
    w = torch.randn(classes, 64).requires_grad_()
    y = torch.randint(0, classes, (rows,))
    with torchmargin.workspace_limit(limit):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profile:
            loss = F.linear_margin_cross_entropy(x, w, y, **ARCFACE)
            grads = gradients(loss, x, w)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak - sum(g.nbytes for g in grads)


@pytest.mark.parametrize("limit", [4 << 20, 64 << 20])
def test_memory_stays_under_the_limit(limit):
    classes = 60_000
    peak = _peak_beyond_results(limit, classes)
    assert 0 < peak <= limit + 16 * classes + (1 << 16)  # vectors of length C, and of length B


def test_memory_of_many_rows_stays_under_the_limit():
    """Their operands, 4 MiB here where two lanes share them, are workspace too."""
    rows, classes, limit, threads = 8192, 2000, 12 << 20, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        peak = _peak_beyond_results(limit, classes, rows)
    finally:
        torch.set_num_threads(threads)
    assert 0 < peak <= limit + 16 * classes + 200 * rows  # vectors of length B: results, state, upstream gradients


@pytest.mark.skipif(not torchmargin.config.cuda_architectures(), reason="the library has no CUDA kernels")
def test_the_plan_of_a_gpu():
    """Plans need no GPU: which operands, how many slices, all under the limit."""
    plan = torchmargin.plan(1024, 512, 360_232, device="cuda", compute_dtype=torch.bfloat16)
    assert plan.operand_dtype == torch.float16 and plan.input_splits == 2 and plan.fits
    assert plan.scratch_bytes + 4 * 1024 * plan.kept_classes <= plan.workspace_limit
    assert torchmargin.plan(4, 5, 6, torch.bfloat16, "cuda").operand_dtype == torch.bfloat16
    assert torchmargin.plan(4, 5, 6, device="cuda").operand_dtype == torch.float32
    assert torchmargin.plan(4, 5, 6, torch.bfloat16).operand_dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize_weight", [True, False])
@pytest.mark.parametrize("rows", [9, 0])
def test_a_shard_without_classes_changes_nothing(dtype, normalize_weight, rows):
    """What merges as nothing: other_lse and the maximum -inf, the rest 0; gradients 0, of all that has one."""
    x, _, y, _ = problem(rows)
    x, w, b = x.detach().to(dtype).requires_grad_(), torch.zeros(0, 6, dtype=dtype).requires_grad_(), None
    margins = {"sample_m2": torch.ones(rows, dtype=torch.float64).requires_grad_(), "m3": 0.1, "extension": "clip"}
    for b in (None, torch.zeros(0, dtype=dtype).requires_grad_()):
        result = F.linear_margin_lse(x, w, y, b, normalize_weight=normalize_weight, **margins)
        assert [each.shape for each in result] == [(rows,)] * 5
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        assert all(each.dtype == acc for each in result)
        assert (result.other_lse == -math.inf).all() and (result.max_other_logit == -math.inf).all()
        assert not result.target_logit.any() and not result.logit_sum.any() and not result.target_angle.any()
        leaves = [x, w, margins["sample_m2"], *([] if b is None else [b])]
        found = torch.autograd.grad(
            [result.other_lse, result.target_logit, result.logit_sum], leaves, [torch.ones(rows, dtype=acc)] * 3
        )
        for leaf, gradient in zip(leaves, found):
            assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype and not gradient.any()


def test_second_derivatives_of_a_shard_without_classes():
    x, _, y, _ = problem()
    w = torch.zeros(0, 6, dtype=torch.float64).requires_grad_()
    total = sum(each.sum() for each in F.linear_margin_lse(x, w, y, **ARCFACE)[1:3])
    (first,) = torch.autograd.grad(total, x, create_graph=True)
    (second,) = torch.autograd.grad((first * x).sum(), x)  # the product's other factor alone
    assert not first.any() and not second.any()
    tangent = torch.func.jvp(
        lambda x: F.linear_margin_lse(x, w.detach(), y, **ARCFACE)[0], (x.detach(),), (x.detach(),)
    )
    assert (tangent[0] == -math.inf).all() and not tangent[1].any()


def test_a_shard_without_classes_as_a_fake_tensor():
    x, w = torch.zeros(4, 6, device="meta"), torch.zeros(0, 6, device="meta")
    assert F.linear_margin_lse(x, w, torch.zeros(4, dtype=torch.long, device="meta")).other_lse.shape == (4,)


def test_margin_logits_need_a_class():
    x, _, y, _ = problem()
    with pytest.raises(RuntimeError, match=r"^margin_logits: expected weight to hold at least one class"):
        F.margin_logits(x, torch.zeros(0, 6, dtype=torch.float64), y)
    for op, more in (("_margin_logits_forward", []), ("_margin_logits_backward", None)):
        arguments = packed(x.detach(), torch.zeros(0, 6, dtype=torch.float64), y)
        if more is None:
            state = torch.zeros(9, 5, dtype=torch.float64)
            more = [torch.zeros(9, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), state, [True] * 5]
        with pytest.raises(RuntimeError, match=rf"^{op}: expected weight to hold at least one class"):
            getattr(torch.ops.torchmargin, op)(*arguments, *more)


def test_blocks_of_classes_share_the_limit_for_what_they_keep():
    """Forwards whose backward will come hold what they keep together."""
    x, w, y, _ = problem(32, 6, 20000)
    limit = 8 << 20
    with torchmargin.workspace_limit(limit):
        kept = []
        for calls in (1, 4):
            seen = []
            with _Kept(seen):
                torch.ops.torchmargin._linear_margin_partials(x, w, y, calls=calls)
            kept.append(seen[0])
    assert kept[0] == 20000 and 0 < kept[1] <= limit // (4 * 32 * 8)


class _Kept(torch.utils._python_dispatch.TorchDispatchMode):
    """How many classes forwards were asked to keep."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.torchmargin._linear_margin_forward.default:
            self.seen.append(args[12])
        return func(*args, **(kwargs or {}))
