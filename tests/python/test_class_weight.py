"""class_weight: torch's cross_entropy(weight=) of the logits is the oracle; and resize_classes."""

import copy
import io
import math

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import torchmargin
import torchmargin.functional as F
from torchmargin import reference

from conftest import gradients, problem
from rounding import CosineRounding, LinearRounding, assert_within

ROWS, D, C = 9, 6, 7
MARGIN = {"scale": 8.0, "m2": 0.4}
REDUCTIONS = ["none", "mean", "sum"]


def _weights(dtype=torch.float64):
    weights = torch.linspace(0.25, 2.0, C).to(dtype)
    weights[3] = 0.0  # a class that counts for nothing
    return weights


def _problem(bias=False, dtype=torch.float64):
    x, w, y, b = problem(ROWS, D, C, dtype=dtype, bias=bias)
    y[1], y[4], y[5] = 6, -100, 3
    return x, w, y, b


def _counts(y, weights):
    """Of each row: the weight of its class, 0 where it is ignored."""
    return torch.where(y == -100, 0.0, weights.double()[y.clamp(min=0)])


def _factors(y, weights, reduction):
    """What a row's loss is multiplied with."""
    counts = _counts(y, weights)
    return counts / counts.sum() if reduction == "mean" else counts


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_linear_loss_is_weighted_as_cross_entropy(reduction, dtype):
    x, w, y, b = _problem(bias=True)
    weights = _weights(dtype)
    ours = F.linear_margin_cross_entropy(x, w, y, b, **MARGIN, reduction=reduction, class_weight=weights)
    theirs = reference.linear_margin_cross_entropy(x, w, y, b, **MARGIN, reduction=reduction, class_weight=weights)
    rounding, factors = LinearRounding(x, w, y, b, **MARGIN), _factors(y, weights, reduction)
    of_rows = factors * rounding.loss(divisor=None)
    # A sum of nine rows' losses rounds nine times more, and so does the divisor.
    rounds = (
        2
        * ROWS
        * torch.finfo(torch.float64).eps
        * (factors * reference.linear_margin_cross_entropy(x, w, y, b, **MARGIN, reduction="none")).sum().detach()
    )
    assert_within(ours, theirs, of_rows if reduction == "none" else of_rows.sum() + rounds)
    upstream = torch.randn_like(ours)
    bounds = rounding.loss_gradients(upstream * factors)
    for got, expected, bound in zip(*(gradients(of, x, w, b, upstream=upstream) for of in (ours, theirs)), bounds):
        assert_within(got, expected, 2 * bound)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_loss_of_cosines(reduction):
    _, _, y, _ = _problem()
    cosine = (2 * torch.rand(ROWS, C, dtype=torch.float64) - 1).requires_grad_()
    options = {**MARGIN, "reduction": reduction, "class_weight": _weights()}
    ours, theirs = F.margin_cross_entropy(cosine, y, **options), reference.margin_cross_entropy(cosine, y, **options)
    rounding, factors = CosineRounding(cosine, y, **MARGIN), _factors(y, _weights(), reduction)
    of_rows = factors * (rounding.loss() + 2 * ROWS * torch.finfo(torch.float64).eps * 4 * MARGIN["scale"])
    assert_within(ours, theirs, of_rows if reduction == "none" else of_rows.sum())
    upstream = torch.randn_like(ours)
    (got,), (expected,) = (gradients(of, cosine, upstream=upstream) for of in (ours, theirs))
    assert_within(got, expected, 2 * rounding.loss_gradient(upstream * factors))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_against_all(reduction):
    x, w, y, _ = _problem()
    options = {"scale": 8.0, "margin": 0.3, "power": 3.0, "reduction": reduction, "class_weight": _weights()}
    ours = F.linear_margin_binary_cross_entropy(x, w, y, **options, require_target=True)
    theirs = reference.linear_margin_binary_cross_entropy(x, w, y, **options)
    # C terms of at most 2 scale, made of products of D numbers; the curve's slope is at most its power.
    size = 2 * 8.0 * 3.0 * C * (D + C + 2 * ROWS + 64) * torch.finfo(torch.float64).eps
    assert_within(ours, theirs, torch.full_like(ours, size))
    upstream = torch.randn_like(ours)
    for got, expected in zip(*(gradients(of, x, w, upstream=upstream) for of in (ours, theirs))):
        assert_within(got, expected, 8.0 * 3.0 * size / x.detach().norm(dim=1).min() / w.detach().norm(dim=1).min())


def test_weights_of_one_change_nothing_and_scale_drops_out_of_the_mean():
    x, w, y, _ = _problem()
    plain = F.linear_margin_cross_entropy(x, w, y, **MARGIN)
    for factor in (1.0, 1024.0):
        weighted = F.linear_margin_cross_entropy(x, w, y, **MARGIN, class_weight=torch.full((C,), factor))
        assert_within(weighted, plain, 4 * ROWS * torch.finfo(torch.float64).eps * plain.detach())


def test_a_batch_of_classes_without_weight_is_nan_in_the_mean_as_in_torch():
    x, w, y, _ = _problem()
    y.fill_(3)
    options = {**MARGIN, "class_weight": _weights()}
    assert F.linear_margin_cross_entropy(x, w, y, **options).isnan()
    assert reference.linear_margin_cross_entropy(x, w, y, **options).isnan()
    assert F.linear_margin_cross_entropy(x, w, y, **options, reduction="sum") == 0


def test_rows_that_are_ignored_or_weigh_nothing_reach_no_gradient():
    x, w, y, _ = _problem()
    with torch.no_grad():
        x[4] = math.nan  # an ignored row
    loss = F.linear_margin_cross_entropy(x, w, y, **MARGIN, class_weight=_weights())
    of_x, of_w = gradients(loss, x, w)
    assert loss.isfinite() and of_w.isfinite().all()
    assert not of_x[y == -100].any() and not of_x[y == 3].any()


@pytest.mark.parametrize("form", ["linear", "cosine", "binary"])
def test_gradients_to_second_order(form):
    x, w, y, _ = _problem()
    weights = _weights()

    def loss(x, w):
        if form == "binary":
            return F.linear_margin_binary_cross_entropy(x, w, y, scale=2.0, class_weight=weights, require_target=True)
        if form == "cosine":
            return F.margin_cross_entropy((x @ w.T).tanh(), y, scale=2.0, m2=0.2, class_weight=weights)
        return F.linear_margin_cross_entropy(x, w, y, scale=2.0, m2=0.2, class_weight=weights)

    assert torch.autograd.gradcheck(loss, (x, w), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, (x, w))


BAD = [
    (torch.ones(C, dtype=torch.int64), "expected class_weight to hold floating-point numbers, but got Long"),
    (torch.ones(C + 1), r"expected class_weight to have shape \[7\], but got \[8\]"),
    (torch.ones(C, 1), r"expected class_weight to have shape \[7\], but got \[7, 1\]"),
    (torch.ones(C, device="meta"), "expected class_weight on cpu, but got meta"),
    (torch.ones(C, requires_grad=True), "expected class_weight not to require grad, there is no gradient to it"),
]
OPS = {
    "linear_margin_cross_entropy": lambda x, w, y, **o: F.linear_margin_cross_entropy(x, w, y, **o),
    "margin_cross_entropy": lambda x, w, y, **o: F.margin_cross_entropy(x @ w.T, y, **o),
    "linear_margin_binary_cross_entropy": lambda x, w, y, **o: F.linear_margin_binary_cross_entropy(
        x, w, y, require_target=True, **o
    ),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("weights", "message"), BAD, ids=range(len(BAD)))
def test_bad_weights_are_refused(op, weights, message):
    x, w, y, _ = _problem()
    with pytest.raises(RuntimeError, match=f"^{op}: {message}"):
        OPS[op](x, w, y, class_weight=weights)


def test_what_weights_cannot_be_combined_with():
    x, w, y, _ = _problem()
    for op in ("linear_margin_cross_entropy", "margin_cross_entropy"):
        with pytest.raises(RuntimeError, match=f"^{op}: expected no label_smoothing with class_weight"):
            OPS[op](x, w, y, class_weight=_weights(), label_smoothing=0.1)
    with pytest.raises(RuntimeError, match="expected require_target with class_weight: a row without a class has no"):
        F.linear_margin_binary_cross_entropy(x, w, y, class_weight=_weights())


# ---- modules --------------------------------------------------------------------------------------------------------

LOSSES = [name for name in torchmargin.losses.__all__ if name.endswith("Loss")]
LOSSES.remove("AnnealedMarginLoss")  # a base


def _loss(name, **options):
    torch.manual_seed(1)
    return getattr(torchmargin.losses, name)(D, C, dtype=torch.float64, **options)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_loss_weighs_its_rows(name, reduction):
    """Penalties and all: what reduction "none" gives without weights, weighted here."""
    x, _, y, _ = _problem()
    x = (20 * x).detach()
    torch.manual_seed(2)  # ElasticFace draws
    rows = _loss(name, reduction="none")(x, y)
    torch.manual_seed(2)
    ours = _loss(name, reduction=reduction, class_weight=_weights(torch.float32))(x, y)
    expected = _factors(y, _weights(torch.float32), reduction) * rows
    expected = expected if reduction == "none" else expected.sum()
    assert_within(ours, expected, 4 * ROWS * torch.finfo(torch.float64).eps * expected.detach().abs())


def test_it_is_live_and_moves_with_the_module_and_is_not_saved():
    x, _, y, _ = _problem()
    plain, loss = _loss("ArcFaceLoss"), _loss("ArcFaceLoss", class_weight=_weights())
    assert "class_weight=[7]" in repr(loss) and "class_weight" not in repr(plain)
    assert set(loss.state_dict()) == set(plain.state_dict())
    plain.load_state_dict(loss.state_dict())
    loss.load_state_dict(plain.state_dict())
    assert torch.equal(loss.class_weight, _weights())
    before = loss(x, y)
    loss.class_weight = None
    assert loss.class_weight is None and torch.equal(loss(x, y), plain(x, y))
    loss.class_weight = _weights()
    for other in (copy.deepcopy(loss), torch.load(_saved(loss), weights_only=False)):
        assert torch.equal(other(x, y), before)
    assert loss.to(torch.float16).class_weight.dtype == torch.float64
    assert loss.to("meta").class_weight.is_meta


def _saved(loss):
    buffer = io.BytesIO()
    torch.save(loss, buffer)
    buffer.seek(0)
    return buffer


def test_a_loss_made_on_meta_has_its_weights_when_it_is_given_memory():
    loss = _loss("CosFaceLoss", class_weight=_weights(), device="meta")
    assert torch.equal(loss.to_empty(device="cpu").class_weight, _weights())


@pytest.mark.parametrize("name", ["AdaFaceLoss", "CurricularFaceLoss", "SphereFaceLoss", "SphereFace2Loss"])
def test_a_loss_made_on_meta_takes_the_tensors_of_a_state_dict(name):
    """load_state_dict(assign=True): buffers that no state_dict has, or that this one lacks, are given memory too."""
    x, _, y, _ = _problem()
    plain = _loss(name, class_weight=_weights())
    plain(x, y)  # moves its state
    plain.scale = 5.0
    state = copy.deepcopy(plain.state_dict())  # what is assigned is shared, and moves
    x = x.detach().flip(0)  # another step
    loss = _loss(name, class_weight=_weights(), device="meta")
    loss.load_state_dict(state, assign=True)
    assert loss.weight.data_ptr() == state["weight"].data_ptr() and not any(each.is_meta for each in loss.buffers())
    assert loss.scale == 5.0 and {key: value.tolist() for key, value in loss.state_dict().items()} == {
        key: value.tolist() for key, value in state.items()
    }
    assert torch.equal(loss(x, y), plain(x, y))
    for some in ({"weight", "bias"}, state.keys() - {"length_std", "step", "scale"}):
        loss, new = _loss(name, class_weight=_weights(), device="meta"), _loss(name, class_weight=_weights())
        part = {key: value.clone() for key, value in plain.state_dict().items() if key in some}
        missing = loss.load_state_dict(part, assign=True, strict=False).missing_keys
        new.load_state_dict(copy.deepcopy(part), strict=False)
        assert not set(missing) & some and not any(each.is_meta for each in loss.buffers())
        assert torch.equal(loss(x, y), new(x, y))
    loss = _loss(name, device="meta")  # weights that stay on meta
    loss.load_state_dict({}, assign=True, strict=False)
    assert all(each.is_meta for each in loss.state_dict().values())


@pytest.mark.parametrize("number", ["margin", "class_weight"])
def test_numbers_of_classes_are_not_on_meta(number):
    with pytest.raises(ValueError, match=f"expected {number} to hold numbers, but it is on the meta device"):
        _loss("ArcFaceLoss", device="meta", **{number: torch.ones(C, device="meta")})


def test_the_statistics_do_not_weigh():
    x, _, y, _ = _problem()
    (plain, expected), (weighted, got) = (
        _loss("ArcFaceLoss", class_weight=weights)(x, y, return_statistics=True) for weights in (None, _weights())
    )
    assert got == expected and not torch.equal(plain, weighted)
    assert torch.equal(weighted, _loss("ArcFaceLoss", class_weight=_weights())(x, y))


def test_it_compiles_and_a_new_weight_does_not_compile_again():
    x, _, y, _ = _problem()
    loss = _loss("ArcFaceLoss", class_weight=_weights())
    torch._dynamo.reset()  # what other tests compiled of this forward is not what is counted
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    seen, graphs = [], []
    for weights in (_weights(), 2 - _weights() / 2):
        loss.class_weight = weights
        seen.append(compiled(x, y))
        graphs.append(counter.frame_count)  # 1, or 2 where dynamo starts over
        assert torch.equal(seen[-1], loss(x, y))
    assert not torch.equal(*seen)  # the second weight is read, not the one that was compiled
    assert 0 < graphs[0] == graphs[1]


@pytest.mark.parametrize("name", ["ArcFaceLoss", "SphereFace2Loss"])
@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.ones(C + 1), TypeError, r"a floating-point tensor of shape \[7\], but got torch.float32 of shape \[8\]"),
        (torch.ones(C, dtype=torch.int64), TypeError, r"a floating-point tensor of shape \[7\], but got torch.int64"),
        (2.0, TypeError, r"a tensor of shape \[7\] or None, but got 2.0"),
        (torch.ones(C, requires_grad=True), TypeError, "without requires_grad, there is no gradient to it; detach it"),
        (-torch.eye(C)[2], ValueError, r"finite and not negative, but class_weight\[2\] is -1.0"),
        (torch.full((C,), math.nan), ValueError, r"finite and not negative, but class_weight\[0\] is nan"),
    ],
)
def test_bad_weights_of_a_loss_are_refused_and_change_nothing(name, weights, error, message):
    with pytest.raises(error, match=message):
        _loss(name, class_weight=weights)
    loss = _loss(name, class_weight=_weights())
    with pytest.raises(error, match=message):
        loss.class_weight = weights
    assert torch.equal(loss.class_weight, _weights())


def test_smoothing_and_weights_refuse_each_other_whichever_comes_first():
    message = "ArcFaceLoss: expected no label_smoothing with class_weight"
    with pytest.raises(ValueError, match=message):
        _loss("ArcFaceLoss", class_weight=_weights(), label_smoothing=0.1)
    loss = _loss("ArcFaceLoss", class_weight=_weights())
    with pytest.raises(ValueError, match=message):
        loss.label_smoothing = 0.1
    assert loss.label_smoothing == 0
    loss = _loss("ArcFaceLoss", label_smoothing=0.1)
    with pytest.raises(ValueError, match=message):
        loss.class_weight = _weights()
    assert loss.class_weight is None


def test_focal_loss_is_a_line_on_reduction_none():
    """docs/choosing.md: (1 - p)^gamma (-log p), Lin et al., ICCV 2017, p the own class's share of the softmax."""
    x, w, y, _ = _problem()
    y = y.clamp(min=0)
    loss = _loss("ArcFaceLoss", reduction="none", margin=0.4, scale=8.0)
    rows = loss(x, y)
    focal = ((1 - torch.exp(-rows)) ** 2 * rows).mean()
    p = reference.margin_logits(x, loss.weight, y, **MARGIN).softmax(1).gather(1, y[:, None])[:, 0]
    expected = (-((1 - p) ** 2) * p.log()).mean()
    torch.testing.assert_close(focal, expected)
    for got, wanted in zip(*(torch.autograd.grad(of, (x, loss.weight)) for of in (focal, expected))):
        torch.testing.assert_close(got, wanted)


# ---- other classes behind the same network --------------------------------------------------------------------------


def _everything(name, **options):
    loss = _loss(name, **options)
    if loss.bias is not None:
        torch.nn.init.uniform_(loss.bias)
    return loss


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("classes", "keep"), [(9, None), (4, None), (5, [6, 0, 2]), (3, []), (7, [6, 5, 4, 3, 2, 1, 0])]
)
def test_kept_classes_keep_their_weights(name, classes, keep):
    loss = _everything(name)
    x, _, y, _ = _problem()
    if name in ("AdaFaceLoss", "CurricularFaceLoss", "SphereFaceLoss"):
        loss(x, y)  # moves its state
    before, old = copy.deepcopy(loss.state_dict()), loss.logits(x)
    loss.resize_classes(classes, keep=None if keep is None else torch.tensor(keep, dtype=torch.int64))
    kept = list(range(min(classes, C))) if keep is None else keep
    k = loss.sub_centers
    assert loss.num_classes == classes and loss.weight.shape == (classes * k, D)
    assert loss.weight.requires_grad and loss.weight.grad is None and loss.weight.dtype == torch.float64
    logits = loss.logits(x)
    assert logits.shape == (ROWS, classes)
    # Products of other shapes may add in another order.
    bound = 64 * torch.finfo(torch.float64).eps * (1 + old.detach().abs().max())
    assert_within(logits[:, : len(kept)], old[:, kept], torch.full((ROWS, len(kept)), bound.item()))
    after = loss.state_dict()
    for key in before.keys() - {"weight", "bias"}:
        assert torch.equal(after[key], before[key]), key
    if loss.bias is not None and loss.bias.dim() == 0:
        assert torch.equal(after["bias"], before["bias"])
    assert loss.weight.isfinite().all() and loss.weight.norm(dim=1).min() > 0
    loss(x, y.clamp(max=classes - 1)).mean().backward()
    assert loss.weight.grad.shape == loss.weight.shape


def test_a_frozen_weight_stays_frozen_and_meta_stays_meta():
    loss = _loss("ArcFaceLoss")
    loss.weight.requires_grad_(False)
    loss.resize_classes(9)
    assert not loss.weight.requires_grad
    loss = _loss("ArcFaceLoss", device="meta")
    loss.resize_classes(9)
    assert loss.weight.is_meta and loss.weight.shape == (9, D)


@pytest.mark.parametrize(
    ("classes", "keep", "error", "message"),
    [
        (0, None, ValueError, "num_classes to be a positive int, but got 0"),
        (True, None, ValueError, "num_classes to be a positive int, but got True"),
        (5, [1, 2], ValueError, r"keep to be int64 of shape \[k\], k at most 5, but got \[1, 2\]"),
        (5, torch.ones(2), ValueError, r"k at most 5, but got torch.float32 of shape \[2\]"),
        (2, torch.arange(3), ValueError, r"k at most 2, but got torch.int64 of shape \[3\]"),
        (5, torch.tensor([1, 7]), IndexError, r"classes in \[0, 7\), but got \[1, 7\]"),
        (5, torch.tensor([-1]), IndexError, r"classes in \[0, 7\), but got \[-1\]"),
    ],
)
def test_bad_resizes_are_refused_and_change_nothing(classes, keep, error, message):
    loss = _loss("ArcFaceLoss")
    weight = loss.weight
    with pytest.raises(error, match=message):
        loss.resize_classes(classes, keep=keep)
    assert loss.weight is weight and loss.num_classes == C


def test_numbers_of_the_old_classes_are_in_the_way():
    loss = _loss("ArcFaceLoss", margin=_weights(), class_weight=_weights())
    with pytest.raises(
        RuntimeError, match="ArcFaceLoss: margin has a number for each of the 7 old classes; set it to o"
    ):
        loss.resize_classes(9)
    loss.margin = 0.5
    with pytest.raises(
        RuntimeError, match="class_weight has a number for each of the 7 old classes; set it to None be"
    ):
        loss.resize_classes(9)
    loss.class_weight = None
    loss.resize_classes(9)
    loss.margin, loss.class_weight = torch.full((9,), 0.2), torch.ones(9)
    x, _, y, _ = _problem()
    assert loss(x, y).isfinite()


def test_buffers_that_it_does_not_know_and_parts_of_weights_are_in_the_way(tmp_path):
    loss = _loss("ArcFaceLoss")
    loss.register_buffer("mean_of_each", torch.zeros(C))
    with pytest.raises(RuntimeError, match="resize_classes knows nothing of the buffer mean_of_each"):
        loss.resize_classes(9)
    assert loss.num_classes == C
    loss = _loss("ArcFaceLoss")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parts = distribute_tensor(loss.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        loss.weight = torch.nn.Parameter(parts)
        with pytest.raises(RuntimeError, match="expected whole weights to resize, but they are a DTensor"):
            loss.resize_classes(9)
    finally:
        dist.destroy_process_group()
    assert loss.num_classes == C


@pytest.mark.parametrize("name", ["AdaFaceLoss", "SphereFace2Loss"])
def test_a_resize_that_fails_half_way_changes_nothing(name):
    class Particular(getattr(torchmargin, name)):
        def reset_state(self):
            super().reset_state()
            if self.num_classes == 9:
                raise ArithmeticError("nine")

    x, _, y, _ = _problem()
    loss = Particular(D, C).double()
    loss(x, y)
    before, weight, tensors = copy.deepcopy(loss.state_dict()), loss.weight, list(loss.buffers())
    with pytest.raises(ArithmeticError, match="nine"):
        loss.resize_classes(9)
    assert loss.num_classes == C and loss.weight is weight and all(a is b for a, b in zip(loss.buffers(), tensors))
    after = loss.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_one_center_of_each_class_keeps_the_weights_of_classes():
    loss = _loss("SubCenterArcFaceLoss", class_weight=_weights())
    assert torch.equal(loss.with_centers(torch.zeros(C, dtype=torch.int64)).class_weight, _weights())
