"""The modules: the numbers of their papers, and good nn.Modules."""

import copy
import inspect
import io
import math
import pickle

import pytest
import torch

import torchmargin
from torchmargin.losses import LargeMarginSoftmaxLoss

import oracle
from conftest import gradients
from rounding import LinearRounding, assert_within, monte_carlo, unit_roundoff

# Every module, with the same loss from its paper (weights and bias are the module's).
LOSSES = {
    "softmax": (
        lambda **k: torchmargin.SoftmaxLoss(8, 17, **k),
        lambda loss, x, y: oracle.softmax(x, loss.weight, y, loss.bias),
    ),
    "softmax without bias": (
        lambda **k: torchmargin.SoftmaxLoss(8, 17, bias=False, **k),
        lambda loss, x, y: oracle.softmax(x, loss.weight, y, 0.0),
    ),
    "modified softmax": (
        lambda **k: torchmargin.ModifiedSoftmaxLoss(8, 17, **k),
        lambda loss, x, y: oracle.modified_softmax(x, loss.weight, y),
    ),
    "normalised softmax": (
        lambda **k: torchmargin.NormalizedSoftmaxLoss(8, 17, **k),
        lambda loss, x, y: oracle.normalized_softmax(x, loss.weight, y, 64.0),
    ),
    "L-Softmax": (
        lambda **k: LargeMarginSoftmaxLoss(8, 17, **k),
        lambda loss, x, y: oracle.l_softmax(x, loss.weight, y, 4),
    ),
    "SphereFace": (
        lambda **k: torchmargin.SphereFaceLoss(8, 17, lambda_base=0.0, lambda_min=0.0, **k),
        lambda loss, x, y: oracle.a_softmax(x, loss.weight, y, 4),
    ),
    "SphereFace m=2": (
        lambda **k: torchmargin.SphereFaceLoss(8, 17, margin=2.0, lambda_base=0.0, lambda_min=0.0, **k),
        lambda loss, x, y: oracle.a_softmax(x, loss.weight, y, 2),
    ),
    "CosFace": (
        lambda **k: torchmargin.CosFaceLoss(8, 17, **k),
        lambda loss, x, y: oracle.cosface(x, loss.weight, y, 64.0, 0.35),
    ),
    "ArcFace": (
        lambda **k: torchmargin.ArcFaceLoss(8, 17, **k),
        lambda loss, x, y: oracle.arcface(x, loss.weight, y, 64.0, 0.5),
    ),
    "combined": (
        lambda **k: torchmargin.CombinedMarginLoss(8, 17, **k),
        lambda loss, x, y: oracle.combined(x, loss.weight, y, 64.0, 1.0, 0.3, 0.2),
    ),
}


@pytest.fixture(params=LOSSES)
def make_and_oracle(request):
    return LOSSES[request.param]


@pytest.fixture
def make(make_and_oracle):
    return make_and_oracle[0]


def _embeddings(dtype=torch.float64):
    return torch.randn(12, 8, dtype=dtype, requires_grad=True), torch.randint(0, 17, (12,))


def _assert_close(value, expect, leaves):
    """The value and its gradients are the expected ones, but for the roundings of both sides, which are as many."""
    with_gradients = lambda value: [value, *gradients(value, *leaves)]  # noqa: E731
    expected, bounds = monte_carlo(lambda: with_gradients(expect()))
    for got, true, bound in zip(with_gradients(value), expected, bounds):
        assert_within(got, true, 2 * bound)


def test_matches_its_paper(make_and_oracle):
    """With the defaults, values and gradients to embeddings, weights and bias."""
    make, expect = make_and_oracle
    loss = make(dtype=torch.float64)
    if loss.bias is not None:
        torch.nn.init.normal_(loss.bias)
    x, y = _embeddings()
    leaves = [x, *loss.parameters()]
    _assert_close(loss(x, y), lambda: expect(loss, x, y).mean(), leaves)


def test_is_a_good_module(make):
    loss = make(label_smoothing=0.1, ignore_index=3, reduction="sum")
    x, y = _embeddings(torch.float32)
    loss.eval()
    expected = loss(x, y)
    buffer = io.BytesIO()
    torch.save(loss.state_dict(), buffer)
    buffer.seek(0)
    loaded = make(label_smoothing=0.1, ignore_index=3, reduction="sum")
    loaded.load_state_dict(torch.load(buffer))
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loaded.eval()):
        assert torch.equal(other(x, y), expected)
    assert loss.double()(x.double(), y).dtype == torch.float64
    assert loss.to("meta").weight.device.type == "meta"
    text = repr(loss)
    for part in ("in_features=8, num_classes=17, scale=", "label_smoothing=0.1", "ignore_index=3", "reduction='sum'"):
        assert part in text
    numbers = {name for name, buffer in loss.named_buffers() if buffer.dtype == torch.float64}
    assert set(loss.state_dict()) - {"bias", "step"} - numbers == {"weight"}


def test_device_and_dtype_are_those_asked_for(make):
    loss = make(device="meta", dtype=torch.bfloat16)
    assert {(t.device.type, t.dtype) for t in loss.parameters()} == {("meta", torch.bfloat16)}
    assert all(buffer.device.type == "meta" for buffer in loss.buffers())


def test_resets_its_parameters(make):
    loss = make()
    before = loss.weight.detach().clone()
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.fill_(7.0)
    loss.reset_parameters()
    assert not (loss.weight == 7.0).any()
    # The deviations of two sets of n draws are 1 / sqrt(n) apart: six times that.
    assert loss.weight.std().item() == pytest.approx(before.std().item(), rel=6 * before.numel() ** -0.5)
    assert loss.bias is None or not loss.bias.any()


def test_logits_are_those_of_the_loss_without_a_margin(make):
    loss = make(dtype=torch.float64)
    x, y = _embeddings()
    lse = torchmargin.functional.linear_margin_lse(
        x, loss.weight, torch.full_like(y, -1), loss.bias, scale=loss.scale,
        normalize_input=loss.normalize_input, normalize_weight=loss.normalize_weight,
    ).other_lse  # fmt: skip
    rounding = LinearRounding(
        x, loss.weight, None, loss.bias, scale=loss.scale,
        normalize_input=loss.normalize_input, normalize_weight=loss.normalize_weight,
    )  # fmt: skip
    assert_within(loss.logits(x).logsumexp(1), lse, rounding.lse)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics(make, reduction):
    """Against the logits of all classes; ignored rows, one of them NaN, are left out."""
    loss = make(dtype=torch.float64, reduction=reduction, ignore_index=-1).eval()
    if loss.bias is not None:
        torch.nn.init.normal_(loss.bias)
    x, y = _embeddings()
    with torch.no_grad():
        x[4:] += 3 * loss.weight[y[4:]]  # some rows right, some wrong
        x[0] = math.nan
    y[:2] = -1
    value, statistics = loss(x, y, return_statistics=True)
    assert torch.equal(value, loss(x, y))
    assert value.requires_grad and not any(s.requires_grad for s in statistics)
    assert all(s.shape == () for s in statistics)

    rows, own = x.detach()[2:], y[2:]
    logits = loss.logits(rows).detach()
    unit = torch.nn.functional.normalize
    angle = lambda: (unit(rows) * unit(loss.weight.detach()[own])).sum(1).arccos().mean()  # noqa: E731
    others = logits.scatter(1, own[:, None], -math.inf).amax(1)
    right = (logits.argmax(1) == own).double()
    assert 0 < right.mean() < 1
    (expected,), (bound,) = monte_carlo(angle)
    assert_within(statistics.target_angle, expected, 2 * bound)
    assert torch.equal(statistics.accuracy, right.mean())  # a count over another
    rounding = LinearRounding(
        rows, loss.weight, own, loss.bias, scale=loss.scale,
        normalize_input=loss.normalize_input, normalize_weight=loss.normalize_weight,
    )  # fmt: skip
    mean_of_rows = unit_roundoff(torch.float64) * len(rows) * others.abs().mean()
    assert_within(statistics.hardest_negative_logit, others.mean(), rounding.logit.mean() + mean_of_rows)


def test_annealing_follows_its_formula_and_resumes():
    loss = torchmargin.SphereFaceLoss(8, 17, dtype=torch.float64)
    x, y = _embeddings()
    for step in (1, 2, 3):
        value = loss(x, y)
        lam = max(5.0, 1000.0 / (1 + 0.12 * step))
        assert loss.step.item() == step and loss.annealing_lambda().item() == lam

        def expect():
            length = x.norm(dim=1)
            cosine = (x * torch.nn.functional.normalize(loss.weight)[y]).sum(1) / length
            psi = (lam * cosine + oracle._large_margin_psi(cosine, 4)) / (1 + lam)  # noqa: B023
            others = x @ torch.nn.functional.normalize(loss.weight).T
            return oracle.loss_of(others, y, length * psi).mean()

        _assert_close(value, expect, [x, loss.weight])
    loss.eval()
    assert torch.equal(loss(x, y), value) and loss.step.item() == 3
    resumed = torchmargin.SphereFaceLoss(8, 17, dtype=torch.float64)
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(resumed.eval()(x, y), value)
    with torch.no_grad():
        loss.step.fill_(10**6)
    assert loss.annealing_lambda().item() == 5.0


def test_annealing_does_not_recompile():
    loss = torchmargin.SphereFaceLoss(8, 17)
    plain = copy.deepcopy(loss)
    x, y = _embeddings(torch.float32)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    compiled(x, y)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(4):
            value = compiled(x, y)
    for _ in range(5):
        expected = plain(x, y)
    assert torch.equal(value, expected)  # the same calls
    assert loss.step.item() == 5


def test_sphereface_r():
    """OpenSphere: psi is a constant added to the cosine, both vectors of unit length, scale 30."""
    loss = torchmargin.SphereFaceLoss.normalized(8, 17, dtype=torch.float64)
    assert loss.scale == 30.0 and loss.m1 == 1.5
    x, y = _embeddings()

    def expect():
        cosine = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(loss.weight).T
        with torch.no_grad():
            own = cosine[torch.arange(12), y]
            theta = 1.5 * own.arccos()
            k = (theta / math.pi).floor()
            added = torch.zeros_like(cosine)
            added[torch.arange(12), y] = (1 - 2 * torch.remainder(k, 2)) * theta.cos() - 2 * k - own
        return torch.nn.functional.cross_entropy(30 * (cosine + added), y)

    _assert_close(loss(x, y), expect, [x, loss.weight])


def test_trains():
    torch.manual_seed(3)
    loss = torchmargin.ArcFaceLoss(8, 5, scale=16.0, margin=0.2)
    x = torch.nn.Parameter(torch.randn(40, 8))
    y = torch.arange(40) % 5
    optimiser = torch.optim.SGD([x, *loss.parameters()], lr=1.0, momentum=0.9)
    values = []
    for _ in range(60):
        value = loss(x, y)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[-1] < 0.2 * values[0]
    assert (loss.logits(x).argmax(1) == y).float().mean() > 0.95


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: torchmargin.ArcFaceLoss(8, 17, margin=28.6),
            ValueError,
            "expected margin in radians, not degrees: at most pi in size, but got 28.6",
        ),
        (lambda: torchmargin.CombinedMarginLoss(8, 17, m2=-30.0), ValueError, "expected m2 in radians, not degrees"),
        (lambda: torchmargin.CosFaceLoss(8, 17, margin=20.0), ValueError, "radians, not degrees.*but got 20.0"),
        (
            lambda: torchmargin.ArcFaceLoss(8, 0),
            ValueError,
            "expected in_features and num_classes to be positive, but got 8 and 0",
        ),
        (
            lambda: torchmargin.SphereFaceLoss(8, 17, lambda_min=-1.0),
            ValueError,
            "expected lambda_min to be finite and not negative, but got -1.0",
        ),
        (lambda: torchmargin.SphereFaceLoss(8, 17, margin=0.0), RuntimeError, "expected m1 > 0, but got 0"),
        (lambda: torchmargin.ArcFaceLoss(8, 17, scale=-1.0), RuntimeError, "expected scale > 0, but got -1"),
        (lambda: torchmargin.ArcFaceLoss(8, 17, extension="soft"), RuntimeError, "but got 'soft'"),
        (lambda: torchmargin.SoftmaxLoss(8, 17, reduction="max"), RuntimeError, "but got 'max'"),
        (
            lambda: torchmargin.SoftmaxLoss(8, 17, label_smoothing=2.0),
            RuntimeError,
            r"expected label_smoothing in \[0, 1\], but got 2",
        ),
        (
            lambda: torchmargin.ArcFaceLoss(8, 17, margins=0.5),
            TypeError,
            "ArcFaceLoss: unexpected keyword argument 'margins'",
        ),
    ],
)
def test_bad_parameters_raise_when_the_module_is_made(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_signatures_spell_what_all_losses_take(make):
    """For help() and editors: what **common stands for, with the defaults of this loss."""
    loss = make()
    signature = inspect.signature(type(loss))
    assert all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    for name in ("label_smoothing", "ignore_index", "reduction", "class_weight", "interclass_filter", "sub_centers"):
        default = signature.parameters[name].default
        assert default == getattr(type(loss)(8, 17), name), name
    assert {"device", "dtype"} <= set(signature.parameters)
    assert type(loss).__doc__ != torchmargin.MarginLoss.__doc__


def test_the_signature_of_a_loss_of_ones_own_is_its_own():
    class Plain(torchmargin.ArcFaceLoss):
        pass

    class Fixed(torchmargin.ArcFaceLoss):
        def __init__(self, classes, **options):
            super().__init__(8, classes, **options)

    assert inspect.signature(Plain) == inspect.signature(torchmargin.ArcFaceLoss)
    assert list(inspect.signature(Fixed).parameters) == ["classes", "options"]


def test_a_loss_that_reads_the_angle_overrides_what_it_likes():
    """The base's own hooks are not given an angle that they do not take."""

    class Reads(torchmargin.MarginLoss):
        reads_angle = True

        def sample_margins(self, embeddings, labels, angle):
            return {"sample_m2": 0.25 * angle.double()}

    x, w, y = torch.randn(9, 6, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64), torch.arange(9) % 7
    loss = Reads(w.shape[1], w.shape[0], scale=8.0).double()
    loss.weight.data.copy_(w)
    angle = torchmargin.functional.linear_target_angle(x, w, y)
    expected = torchmargin.functional.linear_margin_cross_entropy(x, w, y, scale=8.0, sample_m2=0.25 * angle)
    assert torch.equal(loss(x, y), expected)
