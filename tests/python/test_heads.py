"""Heads that change other classes' logits: hard negatives, the hardest ones, several centers of a class.

Values and gradients beside torchmargin.reference, which holds every logit; how far two runs in float64 may lie apart is
measured on it (rounding.monte_carlo). Rows with a class next to a threshold, or with two that are nearly as near, are
no rows of these tests unless they say so: what is hard jumps there.
"""

import itertools
import math
import random

import pytest
import torch

import torchmargin
import torchmargin.functional as F
from torchmargin import reference as R

from conftest import gradients, problem
from rounding import assert_within, monte_carlo

GAP = 1e-6  # of cosines to thresholds and to each other: no float64 rounding crosses it


def _coefficients(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# By name: options of a head, and whether it changes logits where the row's own threshold is.
HEADS = {
    "plain": {},
    "curricular": {"hard_coefficients": _coefficients(1.0, 0.3, 0.0)},
    "mv": {"hard_coefficients": _coefficients(0.0, 1.2, 0.2)},
    "filter": {"hard_coefficients": _coefficients(0.0, 0.0, 0.0), "hard_threshold": _coefficients(0.2).squeeze()},
    "falling": {"hard_coefficients": _coefficients(-0.7, 0.4, -1.5), "hard_threshold": _coefficients(-0.1).squeeze()},
    "masked": {"hard_coefficients": _coefficients(0.0, 0.0, -math.inf), "hard_threshold": _coefficients(0.3).squeeze()},
    "hardest": {"hardest": 3},
    "hardest-margin": {"hardest": 3, "hardest_margin": 0.06},
    "hardest-all": {"hardest": 40, "hardest_margin": 0.3},
}
MARGIN = {"m2": 0.3, "m3": 0.1}


def _cosines(x, w, centers):
    unit = torch.nn.functional.normalize
    return (unit(x) @ unit(w).T).unflatten(1, (-1, centers)).detach()


def _problem(rows, features, classes, centers, **head):
    """As conftest.problem, with rows drawn again until none has a class at a threshold or two that are equally near."""
    _, w, y, _ = problem(rows, features, classes)
    w = torch.randn(classes * centers, features, dtype=torch.float64)
    x = torch.randn(rows, features, dtype=torch.float64)
    for _ in range(200):
        cosines = _cosines(x, w, centers)
        best = cosines.amax(2)
        own = best.gather(1, y[:, None]).squeeze(1).arccos()
        threshold = head.get("hard_threshold")
        threshold = (own + MARGIN["m2"]).cos() - MARGIN["m3"] if threshold is None else threshold
        near = (best - threshold.reshape(-1, 1)).abs().amin(1) < GAP
        near |= (best.sort(1).values.diff(dim=1) < GAP).any(1)
        near |= (cosines.sort(2).values.diff(dim=2) < GAP).flatten(1).any(1)
        if not near.any():
            return x.requires_grad_(), w.requires_grad_(), y
        x = torch.where(near[:, None], torch.randn_like(x), x)
    raise AssertionError("no such rows")


def _grid():
    """A quarter of the whole product, the same every time: all pairs of two options are among them."""
    whole = list(itertools.product(HEADS, (1, 2, 3, 4), (2, 23, 61), (16.0, 64.0), (0.0, 0.1)))
    return random.Random(0).sample(whole, len(whole) // 4)


@pytest.mark.parametrize(("head", "centers", "classes", "scale", "smoothing"), _grid())
def test_loss_and_gradients(head, centers, classes, scale, smoothing):
    options = HEADS[head]
    if head == "masked" and smoothing:
        pytest.skip("an error: test_refusals")
    x, w, y = _problem(9, 5, classes, centers, **options)
    m2 = (0.1 * torch.rand(9, dtype=torch.float64)).requires_grad_()
    m3 = (0.1 * torch.rand(9, dtype=torch.float64)).requires_grad_()
    if "hard_coefficients" in options and "hard_threshold" not in options:
        m2, m3 = m2.detach() * 0, m3.detach() * 0  # the rows were chosen for the thresholds without them
    upstream = torch.randn(9, dtype=torch.float64)
    leaves = [leaf for leaf in (x, w, m2, m3) if leaf.requires_grad]

    def run(library=R):
        loss = library.linear_margin_cross_entropy(
            x, w, y, scale=scale, **MARGIN, sample_m2=m2, sample_m3=m3, sub_centers=centers, label_smoothing=smoothing,
            reduction="none", **options,
        )  # fmt: skip
        return [loss, *gradients(loss, *leaves, upstream=upstream)]

    expected, bounds = monte_carlo(run)
    for limit in (64 << 20, 16 << 10):  # one chunk, and many that are kept in part
        with torchmargin.workspace_limit(limit):
            for got, true, bound in zip(run(F), expected, bounds):
                # Twice, for both round; the tail of the bound is the smallest number that a sum of logits resolves.
                assert_within(got, true, 2 * bound + 1e-14 * scale, f"{head} {limit}")


@pytest.mark.parametrize("centers", [1, 3])
@pytest.mark.parametrize("head", ["curricular", "mv", "filter"])
def test_a_bias_is_added_behind_the_change(head, centers):
    x, w, y = _problem(9, 5, 23, centers, **HEADS[head])
    b = torch.randn(23, dtype=torch.float64).requires_grad_()

    def run(library=R):
        loss = library.linear_margin_cross_entropy(
            x, w, y, b, scale=16.0, **MARGIN, sub_centers=centers, label_smoothing=0.1, **HEADS[head]
        )
        return [loss, *gradients(loss, x, w, b)]

    expected, bounds = monte_carlo(run)
    for limit in (64 << 20, 16 << 10):
        with torchmargin.workspace_limit(limit):
            for got, true, bound in zip(run(F), expected, bounds):
                assert_within(got, true, 2 * bound + 1e-14)


@pytest.mark.parametrize("centers", [1, 3])
@pytest.mark.parametrize("head", ["plain", "filter", "falling", "masked"])
def test_lse_of_shards_is_that_of_the_whole(head, centers):
    """With the same threshold on each: other_lse by logsumexp, sums by sums."""
    x, w, y = _problem(9, 5, 23, centers, **HEADS[head])
    options = {"scale": 16.0, **MARGIN, "sub_centers": centers, **HEADS[head]}
    whole = F.linear_margin_lse(x, w, y, **options)
    bound = 1e-12  # 16 (5 + 23) rounded sums of at most 23 logits of 16
    parts = [
        F.linear_margin_lse(x, w[first * centers : last * centers], y - first, **options)
        for first, last in ((0, 9), (9, 10), (10, 23))
    ]
    merged = [torch.stack(results) for results in zip(*parts)]
    assert_within(merged[0].logsumexp(0), whole[0], bound)
    assert_within(merged[1].sum(0), whole[1], bound)
    if head != "masked":
        assert_within(merged[2].sum(0), whole[2], 1e-12 * 23)
    assert torch.equal(merged[3].sum(0), whole[3])
    assert_within(merged[4].amax(0), whole[4], bound)
    for got, true in zip(whole, R.linear_margin_lse(x, w, y, **options)):
        assert_within(got, true, 1e-12 * 23)


@pytest.mark.parametrize("centers", [1, 3])
@pytest.mark.parametrize("hardest", [1, 4, 30])
def test_hardest_of_shards(hardest, centers):
    """By concatenation and top-k; what has no place any more joins other_lse."""
    x, w, y = _problem(9, 5, 23, centers)
    options = {"scale": 16.0, **MARGIN, "sub_centers": centers}
    whole = F.linear_margin_lse_hardest(x, w, y, hardest=hardest, **options)
    for got, true in zip(whole, R.linear_margin_lse_hardest(x, w, y, hardest=hardest, **options)):
        assert_within(got, true, 1e-12 * 23)
    logits, classes, lse = [], [], []
    for first, last in ((0, 9), (9, 10), (10, 23)):
        part = F.linear_margin_lse_hardest(
            x, w[first * centers : last * centers], y - first, hardest=hardest, **options
        )
        logits.append(part.hardest_logit)
        classes.append(torch.where(part.hardest_class >= 0, part.hardest_class + first, 1 << 40))
        lse.append(part.other_lse)
    logits, classes = torch.cat(logits, 1), torch.cat(classes, 1)
    order = classes.sort(dim=1, stable=True).indices
    order = order.gather(1, logits.gather(1, order).sort(dim=1, stable=True, descending=True).indices)
    logits, classes = logits.gather(1, order), classes.gather(1, order)
    there = whole.hardest_class >= 0
    assert torch.equal(torch.where(there, classes[:, :hardest], -1), whole.hardest_class)
    assert_within(logits[:, :hardest], whole.hardest_logit, 1e-13)
    left = torch.cat([torch.stack(lse, 1), logits[:, hardest:]], 1).logsumexp(1)
    assert_within(left, whole.other_lse, 1e-12)
    # Every result has its gradient.
    upstream = [torch.randn_like(whole.other_lse), torch.randn_like(whole.hardest_logit)]
    upstream[1] = torch.where(there, upstream[1], 0.0)

    def run(library=R):
        found = library.linear_margin_lse_hardest(x, w, y, hardest=hardest, **options)
        lse = torch.where(found.other_lse > -math.inf, found.other_lse, 0.0)
        value = (lse * upstream[0]).sum() + (torch.where(there, found.hardest_logit, 0.0) * upstream[1]).sum()
        return gradients(value + found.logit_sum.sum(), x, w)

    for got, true in zip(run(F), run()):
        assert_within(got, true, 1e-10)


# ---- identities ----------------------------------------------------------------------------------------------------


def _step(x, w, y, **options):
    loss = F.linear_margin_cross_entropy(x, w, y, scale=32.0, **MARGIN, reduction="none", **options)
    return [loss.detach(), *gradients(loss, x, w, upstream=torch.ones_like(loss))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centers", [1, 2])
def test_bits_of_no_change(dtype, centers, workspace):
    """n(c) = c, and a threshold of 1 or more, are no change at all; nor is a second run."""
    rows, features, classes = workspace
    x = torch.randn(rows, features, dtype=dtype).requires_grad_()
    w = torch.randn(classes * centers, features, dtype=dtype).requires_grad_()
    y = torch.randint(0, classes, (rows,))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    plain = _step(x, w, y, sub_centers=centers)
    same = torch.tensor([0.0, 1.0, 0.0], dtype=acc)
    other = torch.tensor([2.0, 1.0, -3.0], dtype=acc)
    for options in (
        {"hard_coefficients": same},
        {"hard_coefficients": same.double(), "hard_threshold": torch.full((rows,), -2.0, dtype=acc)},
        {"hard_coefficients": other, "hard_threshold": torch.ones((), dtype=acc)},
        {"hard_coefficients": other.expand(rows, 3), "hard_threshold": torch.full((rows,), 1.5, dtype=acc)},
        {},
    ):
        for got, true in zip(_step(x, w, y, sub_centers=centers, **options), plain):
            assert torch.equal(got, true)


@pytest.mark.parametrize("head", HEADS)
def test_bits_of_a_second_run(head, workspace):
    x, w, y = _problem(*workspace, 3, **HEADS[head])
    first, second = (_step(x, w, y, sub_centers=3, **HEADS[head]) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_copies_of_a_center_are_one_center():
    x, w, y, _ = problem()
    copies = w.detach().repeat_interleave(3, 0).requires_grad_()
    one, several = _step(x, w, y), _step(x, copies, y, sub_centers=3)
    assert_within(several[0], one[0], 1e-12)
    assert_within(several[1], one[1], 1e-12)
    # Ties: the first of them has the whole gradient.
    assert_within(several[2].view(-1, 3, 6)[:, 0], one[2], 1e-12)
    assert (several[2].view(-1, 3, 6)[:, 1:] == 0).all()


@pytest.mark.parametrize("hardest", [1, 5, 23])
def test_the_hardest_without_a_margin_are_plain(hardest, workspace):
    x, w, y, _ = problem(*workspace)
    for got, true in zip(_step(x, w, y, hardest=hardest), _step(x, w, y)):
        assert_within(got, true, 1e-11)


def test_ties_go_to_the_lower_class():
    x = torch.randn(3, 5, dtype=torch.float64)
    w = torch.randn(4, 5, dtype=torch.float64).repeat(2, 1)  # classes 4 ... 7 are classes 0 ... 3 again
    y = torch.tensor([0, 5, -1])
    found = F.linear_margin_lse_hardest(x, w, y, hardest=6, scale=8.0)
    order = R.linear_margin_lse_hardest(x, w, y, hardest=6, scale=8.0)
    assert torch.equal(found.hardest_class, order.hardest_class)
    for row in found.hardest_class.tolist():
        for low in range(4):
            if low in row and low + 4 in row:
                assert row.index(low) < row.index(low + 4)


# ---- edges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("centers", [1, 3])
def test_rows_that_do_not_count(head, centers):
    """NaN in ignored rows, and in rows without an upstream gradient, reaches nothing."""
    x, w, y = _problem(9, 5, 23, centers, **HEADS[head])
    y[2] = -100
    options = {"scale": 16.0, **MARGIN, "sub_centers": centers, "reduction": "none", **HEADS[head]}
    upstream = torch.ones(9, dtype=torch.float64).index_fill(0, torch.tensor([5]), 0.0)
    clean = gradients(F.linear_margin_cross_entropy(x, w, y, **options), x, w, upstream=upstream)
    with torch.no_grad():
        x[2] = torch.nan
        x[5, 1] = torch.inf
    loss = F.linear_margin_cross_entropy(x, w, y, **options)
    assert loss[2] == 0 and loss[5].isnan() and loss.isnan().sum() == 1
    got = gradients(loss, x, w, upstream=upstream)
    assert torch.equal(got[0], clean[0])
    # NB: to a row of NaN another center is the nearest, and a center without rows is finished in another order.
    assert_within(got[1], clean[1], 0.0 if centers == 1 else 1e-14)


@pytest.mark.parametrize("head", ["curricular", "filter", "hardest-margin"])
@pytest.mark.parametrize("centers", [1, 3])
def test_logits_of_rows_that_do_not_count(head, centers):
    """As of the loss: a row of NaN whose logits nobody wants a gradient of reaches no weight."""
    x, w, y = _problem(9, 5, 23, centers, **HEADS[head])
    upstream = torch.randn(9, 23, dtype=torch.float64).index_fill(0, torch.tensor([5]), 0.0)
    found = []
    for spoiled in (False, True):
        with torch.no_grad():
            x[5] = torch.nan if spoiled else x[5]
        logits = F.margin_logits(x, w, y, scale=16.0, **MARGIN, sub_centers=centers, **HEADS[head])
        found.append(gradients(logits, x, w, upstream=upstream))
    for got, true in zip(found[1], found[0]):
        # NB: to a row of NaN another center is the nearest, and a center without rows is finished in another order.
        assert_within(got, true, 0.0 if centers == 1 else 1e-14)


@pytest.mark.parametrize("centers", [1, 2])
def test_nan_weights_are_neither_hard_nor_hardest(centers):
    x, w, y = _problem(9, 5, 23, centers)
    y = y.clamp(max=20)
    with torch.no_grad():
        w[-1] = torch.nan  # a center of the last class
    for options in ({"hardest": 4}, HEADS["filter"], {}):
        loss = F.linear_margin_cross_entropy(x, w, y, scale=8.0, sub_centers=centers, **options)
        assert loss.isnan()
    found = F.linear_margin_lse_hardest(x, w, y, hardest=40, scale=8.0, sub_centers=centers)
    assert (found.hardest_class != 22).all() and found.hardest_logit.isnan().sum() == 0
    assert found.other_lse.isnan().all() and found.max_other_logit.isnan().all()
    assert ((found.hardest_class >= 0).sum(1) == 21).all()


def test_a_zero_row_is_at_right_angles():
    x, w, y, _ = problem()
    with torch.no_grad():
        x[1] = 0.0
        w[4] = 0.0
    for options in ({"hard_coefficients": _coefficients(1.0, 0.3, 0.1)}, {"hardest": 3, "hardest_margin": 0.1}):
        for got, true in zip(_step(x, w, y, **options), _step(x, w, y, **options)):
            assert got.isfinite().all() and torch.equal(got, true)
        assert_within(
            F.linear_margin_cross_entropy(x, w, y, scale=8.0, **MARGIN, **options),
            R.linear_margin_cross_entropy(x, w, y, scale=8.0, **MARGIN, **options),
            1e-12,
        )


@pytest.mark.parametrize("options", [*HEADS.values()], ids=[*HEADS])
def test_small_shapes(options):
    for rows, classes in ((0, 5), (3, 1), (0, 1)):
        x, w = torch.randn(rows, 4).requires_grad_(), torch.randn(2 * classes, 4).requires_grad_()
        loss = F.linear_margin_cross_entropy(
            x, w, torch.zeros(rows, dtype=torch.long), sub_centers=2, reduction="none", **options
        )
        assert loss.shape == (rows,) and (loss == 0).all()  # there is no other class
        for gradient, leaf in zip(gradients(loss, x, w, upstream=torch.ones(rows)), (x, w)):
            assert gradient.shape == leaf.shape and gradient.isfinite().all()


def test_everything_masked_is_no_other_class():
    x, w, y, _ = problem()
    out = {"hard_threshold": _coefficients(-1.5).squeeze(), "hard_coefficients": _coefficients(0.0, 0.0, -math.inf)}
    assert (F.linear_margin_lse(x, w, y, scale=64.0, **out).other_lse == -math.inf).all()
    loss, *grads = _step(x, w, y, **out)
    assert (loss == 0).all() and all((gradient == 0).all() for gradient in grads)


def test_a_class_that_is_no_class_of_this_weight():
    x, w, y = _problem(9, 5, 23, 3)
    y[0], y[1] = -7, 23
    found = F.linear_margin_lse(x, w, y, sub_centers=3, scale=16.0)
    assert (found.target_logit[:2] == 0).all() and (found.target_angle[:2] == 0).all()
    assert (F.linear_target_angle(x, w, y, sub_centers=3)[:2] == 0).all()
    nothing = F.linear_margin_lse_hardest(x, w[:0], y, hardest=2, sub_centers=3)
    assert (nothing.other_lse == -math.inf).all() and (nothing.hardest_class == -1).all()
    assert nothing.hardest_logit.shape == (9, 2) and (nothing.hardest_logit == -math.inf).all()


def test_target_angle():
    x, w, y = _problem(9, 5, 23, 3)
    angle = F.linear_target_angle(x, w, y, sub_centers=3)
    assert not angle.requires_grad
    assert_within(angle, R.linear_target_angle(x, w, y, sub_centers=3), 1e-13)
    assert torch.equal(angle, F.linear_margin_lse(x, w, y, sub_centers=3).target_angle)
    for dtype in (torch.float32, torch.bfloat16):
        narrow = F.linear_target_angle(x.to(dtype), w.to(dtype), y, sub_centers=3)
        assert narrow.dtype == torch.float32


@pytest.mark.parametrize("head", ["plain", "curricular", "filter", "hardest-margin"])
@pytest.mark.parametrize("centers", [1, 3])
def test_logits(head, centers):
    """The loss is their cross-entropy; without a target there is no margin, and no threshold of one's own."""
    x, w, y = _problem(9, 5, 23, centers, **HEADS[head])
    options = {"scale": 16.0, **MARGIN, "sub_centers": centers, **HEADS[head]}
    logits = F.margin_logits(x, w, y, **options)
    assert logits.shape == (9, 23)
    assert_within(logits, R.margin_logits(x, w, y, **options), 1e-13 * 16)
    loss = torch.nn.functional.cross_entropy(logits, y)
    assert_within(loss, F.linear_margin_cross_entropy(x, w, y, **options), 1e-12)
    for got, true in zip(gradients(loss, x, w), gradients(F.linear_margin_cross_entropy(x, w, y, **options), x, w)):
        assert_within(got, true, 1e-11)
    if head == "curricular":
        assert_within(F.margin_logits(x, w, **options), 16 * _cosines(x, w, centers).amax(2), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("centers", [1, 3])
def test_narrow_dtypes(dtype, head, centers):
    """Products in float32: beside the float64 reference of the same numbers, whose rows are far from every seam."""
    x, w, y = _problem(9, 5, 23, centers, **HEADS[head])
    x, w = x.detach().to(dtype), w.detach().to(dtype)
    cosines = _cosines(x.double(), w.double(), centers)
    best = cosines.amax(2)
    own = best.gather(1, y[:, None]).squeeze(1).arccos()
    threshold = HEADS[head].get("hard_threshold", (own + MARGIN["m2"]).cos() - MARGIN["m3"])
    # A float32 cosine of five products is off by at most 16 roundings.
    gap = 16 * 2.0**-24
    far = ((best - threshold.reshape(-1, 1)).abs().amin(1) > gap) & (best.sort(1).values.diff(dim=1) > gap).all(1)
    x, y = x[far].requires_grad_(), y[far]
    w.requires_grad_()
    options = {"scale": 16.0, **MARGIN, "sub_centers": centers, "reduction": "none"}
    options |= {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in HEADS[head].items()}
    loss = F.linear_margin_cross_entropy(x, w, y, **options)
    assert loss.dtype == torch.float32
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected = R.linear_margin_cross_entropy(x.double(), w.double(), y, **wide)
    # The steepest n has a slope of 2.6: logits of 16 with some 16 roundings, and their sums.
    assert_within(loss, expected, 2.6 * 16 * 64 * 2.0**-24 + expected.detach().abs() * 2.0**-23)
    got = gradients(loss, x, w, upstream=torch.ones_like(loss))
    true = gradients(expected, x, w, upstream=torch.ones_like(expected))
    for ours, theirs in zip(got, true):
        assert ours.dtype == dtype
        size = theirs.abs().max()
        # Softmax weights are off by what their logits are; then a rounding to the dtype.
        assert_within(ours, theirs, size * (2.6 * 16 * 128 * 2.0**-24 + torch.finfo(dtype).eps))


# ---- autograd and what stands above it -------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["plain", "curricular", "mv", "filter", "falling", "hardest", "hardest-margin"])
@pytest.mark.parametrize("centers", [1, 2])
def test_gradcheck(head, centers):
    if head == "plain" and centers == 1:
        pytest.skip("test_autograd.py")
    options = HEADS[head]
    x, w, y = _problem(4, 5, 6, centers, **options)

    def loss(x, w):
        return F.linear_margin_cross_entropy(
            x, w, y, scale=4.0, **MARGIN, sub_centers=centers, label_smoothing=0.1, **options
        )

    assert torch.autograd.gradcheck(loss, (x, w), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (x, w), fast_mode=True)
    smoothed = torch.autograd.grad(loss(x, w), (x, w), create_graph=True)
    true = torch.autograd.grad(
        R.linear_margin_cross_entropy(
            x, w, y, scale=4.0, **MARGIN, sub_centers=centers, label_smoothing=0.1, **options
        ),
        (x, w),
        create_graph=True,
    )
    for ours, theirs in zip(
        torch.autograd.grad(smoothed[0].square().sum() + smoothed[1].sum(), (x, w)),
        torch.autograd.grad(true[0].square().sum() + true[1].sum(), (x, w)),
    ):
        assert_within(ours, theirs, 1e-10)


ARGUMENTS = {
    "sub_centers": {"sub_centers": 2},
    "hard": {"hard_coefficients": _coefficients(1.0, 0.3, 0.0), "hard_threshold": torch.zeros(9, dtype=torch.float64)},
}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize(
    "op", ["linear_margin_lse", "linear_margin_lse_hardest", "linear_margin_cross_entropy", "margin_logits"]
)
def test_opcheck(op, name):
    if op.endswith("hardest") and name == "hard":
        pytest.skip("an error: test_refusals")
    x, w, y = _problem(9, 5, 10, 2)
    options = {"scale": 4.0, "m2": 0.3, **ARGUMENTS[name]}
    options |= {"hardest": 3} if op.endswith("hardest") else {}
    torch.library.opcheck(getattr(torch.ops.torchmargin, op).default, (x, w, y), options)


def test_opcheck_of_the_angle():
    x, w, y = _problem(9, 5, 10, 2)
    torch.library.opcheck(torch.ops.torchmargin.linear_target_angle.default, (x, w, y), {"sub_centers": 2})


def test_compile_does_not_freeze_the_coefficients():
    """CurricularFace's t moves every step: no new graph, and its new value counts."""
    x, w, y = _problem(9, 5, 23, 1)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def loss(x, w, t):
        coefficients = torch.stack([torch.ones_like(t), t, torch.zeros_like(t)])
        return F.linear_margin_cross_entropy(x, w, y, scale=16.0, m2=0.3, hard_coefficients=coefficients)

    seen = []
    for value in (0.0, 0.25, 0.5):
        t = torch.tensor(value, dtype=torch.float64)
        coefficients = torch.stack([torch.ones_like(t), t, torch.zeros_like(t)])
        expected = F.linear_margin_cross_entropy(x, w, y, scale=16.0, m2=0.3, hard_coefficients=coefficients)
        assert torch.equal(loss(x, w, t), expected)
        seen.append(expected.item())
    assert len(graphs) == 1 and len(set(seen)) == 3


def test_meta_has_shapes():
    x, w, y = (t.detach().to("meta") for t in _problem(9, 5, 23, 3))
    found = F.linear_margin_lse_hardest(x, w, y, hardest=4, sub_centers=3)
    assert found.hardest_logit.shape == found.hardest_class.shape == (9, 4)
    assert found.hardest_class.dtype == torch.int64 and found.other_lse.shape == (9,)
    assert F.margin_logits(x, w, y, sub_centers=3).shape == (9, 23)
    assert F.linear_target_angle(x, w, y, sub_centers=3).shape == (9,)


def test_autocast_leaves_thresholds_alone():
    """Both are read as they are: in bfloat16 this threshold would be another."""
    x, w, y = _problem(9, 5, 23, 1)
    x, w = x.float(), w.float()
    hard = {
        "hard_threshold": torch.full((), 0.1001, dtype=torch.float64),
        "hard_coefficients": torch.tensor([1.0, 0.3001, 0.0]),
    }
    expected = F.linear_margin_cross_entropy(x, w, y, scale=16.0, **hard)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = F.linear_margin_cross_entropy(x, w, y, scale=16.0, **hard)
    assert torch.equal(got, expected)


def test_memory_is_flat_in_the_classes():
    """What a forward and backward with three centers hold beside inputs and gradients is what the limit says."""
    x, w, y = torch.randn(64, 32), torch.randn(3 * 20_000, 32), torch.randint(0, 20_000, (64,))
    x.requires_grad_(), w.requires_grad_()
    with torchmargin.workspace_limit(4 << 20):
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            F.linear_margin_cross_entropy(x, w, y, scale=32.0, sub_centers=3, hardest=5, hardest_margin=0.06).backward()
    largest = max((event.cpu_memory_usage for event in profile.events()), default=0)
    # grad_weight is 7.7 MB; the logits of all centers would be 15.4 MB.
    assert largest <= 3 * 20_000 * 32 * 4 + (4 << 20)


# ---- errors ----------------------------------------------------------------------------------------------------------

C3 = _coefficients(1.0, 0.3, 0.0)
REFUSALS = {
    "sub_centers in [1, 255], but got 0": {"sub_centers": 0},
    "sub_centers in [1, 255], but got 256": {"sub_centers": 256},
    "to hold 4 rows for each class (sub_centers), but got shape [23, 5]": {"sub_centers": 4},
    "normalize_weight with sub_centers > 1": {"sub_centers": 23, "normalize_weight": False},
    "expected hard_coefficients with hard_threshold": {"hard_threshold": torch.zeros(9, dtype=torch.float64)},
    "hard_coefficients to have shape [9, 3] or [3], but got [4]": {"hard_coefficients": torch.zeros(4).double()},
    "hard_coefficients to have shape [9, 3] or [3], but got [8, 3]": {"hard_coefficients": torch.zeros(8, 3).double()},
    "hard_threshold to have shape [9] or [], but got [8]": {
        "hard_coefficients": C3,
        "hard_threshold": torch.zeros(8, dtype=torch.float64),
    },
    "hard_coefficients to be Double, but got Float": {"hard_coefficients": C3.float()},
    "hard_coefficients to be float64, float32, bfloat16 or float16, but got Long": {"hard_coefficients": C3.long()},
    "hard_coefficients not to require grad": {"hard_coefficients": C3.clone().requires_grad_()},
    "hard_threshold not to require grad": {
        "hard_coefficients": C3,
        "hard_threshold": torch.zeros(9, dtype=torch.float64, requires_grad=True),
    },
    "hard_coefficients on the device of input": {"hard_coefficients": C3.to("meta")},
    "normalize_input and normalize_weight with hard_coefficients": {
        "hard_coefficients": C3,
        "normalize_input": False,
    },
    "hard_coefficients or hardest, but got both": {"hard_coefficients": C3, "hardest": 2},
    "hardest not to be negative, but got -1": {"hardest": -1},
    "expected no bias with hardest": {"hardest": 2, "bias": torch.zeros(23, dtype=torch.float64)},
    "hardest_margin in [0, pi] (radians), but got 20": {"hardest": 2, "hardest_margin": 20.0},
    "hardest_margin in [0, pi] (radians), but got -0.1": {"hardest": 2, "hardest_margin": -0.1},
    "hardest_margin in [0, pi] (radians), but got nan": {"hardest": 2, "hardest_margin": math.nan},
    "hardest > 0 with hardest_margin": {"hardest_margin": 0.1},
    "normalize_input and normalize_weight with hardest_margin": {
        "hardest": 2,
        "hardest_margin": 0.1,
        "normalize_weight": False,
    },
}


@pytest.mark.parametrize("text", REFUSALS)
@pytest.mark.parametrize("op", ["linear_margin_cross_entropy", "margin_logits"])
def test_refusals(op, text):
    x, w, y, _ = problem(9, 5, 23)
    with pytest.raises(RuntimeError) as error:
        getattr(F, op)(x, w, y, **REFUSALS[text])
    assert str(error.value).startswith(f"{op}: expected ") and text in str(error.value)


def test_refusals_of_values():
    x, w, y, _ = problem(9, 5, 23)
    for bad in (
        _coefficients(math.nan, 0.0, 0.0),
        _coefficients(0.0, math.inf, 0.0),
        _coefficients(0.0, 0.0, math.inf),
    ):
        with pytest.raises(RuntimeError, match="finite hard_coefficients, but for d = -infinity"):
            F.linear_margin_cross_entropy(x, w, y, hard_coefficients=bad)
        with pytest.raises(RuntimeError, match="finite hard_coefficients, but for d = -infinity"):
            F.margin_logits(x, w, hard_coefficients=bad, hard_threshold=torch.zeros((), dtype=torch.float64))
    with pytest.raises(RuntimeError, match="finite hard_coefficients with label_smoothing"):
        F.linear_margin_cross_entropy(
            x, w, y, label_smoothing=0.1, hard_coefficients=_coefficients(0.0, 0.0, -math.inf)
        )


def test_a_shard_demands_its_threshold():
    x, w, y, _ = problem(9, 5, 23)
    with pytest.raises(RuntimeError, match="^linear_margin_lse: expected hard_threshold with hard_coefficients"):
        F.linear_margin_lse(x, w, y, hard_coefficients=C3)
    with pytest.raises(RuntimeError, match="^linear_margin_lse_hardest: expected hard_coefficients or hardest"):
        F.linear_margin_lse_hardest(x, w, y, hardest=2, hard_coefficients=C3)
    with pytest.raises(RuntimeError, match="^linear_margin_lse_hardest: expected hardest to be positive, but got 0"):
        F.linear_margin_lse_hardest(x, w, y, hardest=0)
    with pytest.raises(RuntimeError, match="^linear_target_angle: expected sub_centers in"):
        F.linear_target_angle(x, w, y, sub_centers=0)


def test_a_class_past_the_last():
    x, w, y, _ = problem(9, 5, 24)
    y = y % 8
    y[3] = 8
    with pytest.raises(IndexError, match=r"target values in \[0, 8\).* but got 8 at row 3 with C = 8 classes"):
        F.linear_margin_cross_entropy(x, w, y, sub_centers=3)
