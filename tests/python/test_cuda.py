"""The ops on a GPU: what the CPU's tests show, again, and what only a GPU has. Run with `pytest -m cuda`.

Needs torch and pytest alone. TORCHMARGIN_TEST_DEVICE=cpu rehearses what can be without a GPU (scripts/gpu_check.sh).
"""

import os
import warnings

import pytest
import torch

import torchmargin
import torchmargin.functional as F
from torchmargin import reference

import oracle
from conftest import gradients, packed, problem
from rounding import CosineRounding, LinearRounding, assert_within, stored

DEVICE = os.environ.get("TORCHMARGIN_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="there is no GPU here"),
    pytest.mark.skipif(
        ON_GPU and not torchmargin.config.cuda_architectures(), reason="the library has no CUDA kernels"
    ),
]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="a rehearsal on the CPU")

ARCFACE = {"scale": 64.0, "m2": 0.5, "extension": "linear"}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Rows, features, classes: tails of every kind, several tiles and chunks under a small limit.
SIZES = [(9, 6, 23), (1, 1, 1), (33, 70, 1100), (300, 129, 5000)]


def _on_gpu(*tensors):
    return [None if t is None else t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in tensors]


# What the logits' products read (csrc/plan/operands.h): unit vectors rounded to float16, and bfloat16 rows as they are.
OPERANDS = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 0.0}
# Gradients of less than float64, by norm: the worst case of their elements would let any number pass. float32: products
# in another order than the CPU's. float16: unit vectors, softmax weights and gradients are rounded to it. bfloat16:
# weights go in as they are, softmax weights and gradients are rounded.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}


def _near(got, expected, bounds):
    """Both are the library's, each with a bound of its own, rounded once."""
    assert got.dtype == expected.dtype
    assert_within(got.cpu(), expected, sum(bounds) + 2 * stored(expected.double(), expected.dtype))


def _roundings(*tensors, operands, **options):
    """The GPU's and the CPU's."""
    return LinearRounding(*tensors, operands=operands, **options), LinearRounding(*tensors, **options)


def _gradient_near(got, expected, bounds, products):
    assert got.dtype == expected.dtype
    if got.dtype == torch.float64:
        return _near(got, expected, bounds)
    error = (got.double().cpu() - expected.double()).norm()
    assert error <= TOLERANCES[products] * (expected.double().norm() + 1e-6), (error, expected.double().norm())


@pytest.fixture(params=[None, 1 << 20], ids=["default", "1MiB"])
def limit(request):
    if request.param is None:
        yield
    else:
        with torchmargin.workspace_limit(request.param, DEVICE):
            yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_agrees_with_the_cpu(sizes, dtype, with_bias, limit):
    x, w, y, b = problem(*sizes, dtype=dtype, bias=with_bias)
    y[0] = -100
    options = {**ARCFACE, "label_smoothing": 0.1, "reduction": "sum", "normalize_weight": not with_bias}
    gx, gw, gy, gb = _on_gpu(x, w, y, b)
    loss, expected = (F.linear_margin_cross_entropy(*args, **options) for args in ((gx, gw, gy, gb), (x, w, y, b)))
    roundings = _roundings(x, w, y, b, operands=OPERANDS[dtype], **options)
    _near(loss, expected, [r.loss(0.1, 1) for r in roundings])
    bounds = zip(*(r.loss_gradients(1.0, 0.1) for r in roundings))
    for got, true, bound in zip(gradients(loss, gx, gw, gb), gradients(expected, x, w, b), bounds):
        assert got.dtype == dtype
        _gradient_near(got, true, bound, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_ops_agree_with_the_cpu(dtype):
    x, w, y, b = problem(33, 70, 1100, dtype=dtype, bias=True)
    cosine = (2 * torch.rand(33, 1100) - 1).to(dtype).requires_grad_()
    y[0] = -1
    margin = {"scale": 8.0, "m2": 0.3, "m3": 0.1}
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = [torch.rand(33, dtype=acc) for _ in range(3)]  # of one sign: by norm nothing cancels
    of_logits, of_psi = torch.rand(33, 1100, dtype=acc), torch.rand(33, 1100).to(dtype)

    def run(x, w, y, b, cosine):
        lse = F.linear_margin_lse(x, w, y, b, **margin)
        logits = F.margin_logits(x, w, y, b, **margin)
        loss = F.margin_cross_entropy(cosine, y.clamp(min=0), label_smoothing=0.1, **margin)
        psi = F.margin_transform(cosine, m2=0.3, m3=0.1)
        grads = [
            *torch.autograd.grad(lse[:3], (x, w, b), [g.to(x.device) for g in upstream]),
            *gradients(logits, x, w, b, upstream=of_logits.to(x.device)),
            *gradients(loss, cosine),
            *gradients(psi, cosine, upstream=of_psi.to(x.device)),
        ]
        return [*lse, logits, loss, psi], grads

    roundings = _roundings(x, w, y, b, operands=OPERANDS[dtype], **margin)
    of_cosine = CosineRounding(cosine, y.clamp(min=0), **margin)
    own = torch.zeros(33, 1100, dtype=torch.float64).index_put((torch.arange(33), y.clamp(min=0)), roundings[0].target)
    results_of = lambda r: [  # noqa: E731
        *r.results(), r.logit[:, None] + own, of_cosine.loss(0.1).sum() / 33, of_cosine.psi,
    ]  # fmt: skip
    gradients_of = lambda r: [  # noqa: E731
        *r.gradients(*upstream), *r.logits_gradients(of_logits), of_cosine.loss_gradient(1 / 33, 0.1),
        of_cosine.slope * of_psi.double().abs(),
    ]  # fmt: skip
    (results, grads), (true_results, true_grads) = run(*_on_gpu(x, w, y, b, cosine)), run(x, w, y, b, cosine)
    for got, true, bounds in zip(results, true_results, zip(*map(results_of, roundings))):
        _near(got, true, bounds)
    for got, true, bounds in zip(grads, true_grads, zip(*map(gradients_of, roundings))):
        assert got.dtype == dtype
        _gradient_near(got, true, bounds, dtype)


@pytest.mark.parametrize("compute_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("normalize", [True, False])
def test_16_bit_products_of_float32_parameters(sizes, compute_dtype, normalize, limit):
    """Against the CPU, which computes in float32: float16 unit vectors whichever type is allowed."""
    x, w, y, b = problem(*sizes, dtype=torch.float32, bias=not normalize)
    options = {"normalize_input": normalize, "normalize_weight": normalize, "label_smoothing": 0.1}
    options |= ARCFACE if normalize else {"scale": 0.3}
    gx, gw, gy, gb = _on_gpu(x, w, y, b)
    loss = F.linear_margin_cross_entropy(gx, gw, gy, gb, compute_dtype=compute_dtype, **options)
    expected = F.linear_margin_cross_entropy(x, w, y, b, **options)
    _near(loss, expected, [r.loss(0.1, len(y)) for r in _roundings(x, w, y, b, operands=2.0**-11, **options)])
    for got, true in zip(gradients(loss, gx, gw, gb), gradients(expected, x, w, b)):
        assert got.dtype == torch.float32
        _gradient_near(got, true, None, torch.float16)


def test_logit_errors_of_16_bit_products():
    """The figures of docs/numerics.md, at scale 64 and D = 512."""
    x, w, _, _ = problem(64, 512, 20_000, dtype=torch.float32)
    # The mean square of a rounding to float16 is at most a third of its largest, of two factors of each of 512 terms,
    # whose squares' sum is 1 / 512 for random directions. bfloat16 is read as it is: float32's worst case.
    of_half = 64 * 2.0**-11 * (2 / 3 / 512) ** 0.5
    for dtype, compute_dtype, most in (
        (torch.float32, torch.bfloat16, of_half),
        (torch.float16, None, of_half),
        (torch.bfloat16, None, 64 * 2.0**-24 * (512 + 8)),
    ):
        gx, gw = (t.detach().to(DEVICE, dtype) for t in (x, w))
        got = F.margin_logits(gx, gw, scale=64.0, compute_dtype=compute_dtype).double()
        true = 64 * torch.nn.functional.normalize(gx.double()) @ torch.nn.functional.normalize(gw.double()).T
        assert (got - true).square().mean().sqrt() <= most


@pytest.mark.parametrize("exponent", [-24, 24])
@pytest.mark.parametrize("compute_dtype", [None, torch.float16])
def test_loss_scaling_is_exact(exponent, compute_dtype):
    x, w, y, _ = _on_gpu(*problem(33, 70, 1100, dtype=torch.float32))
    loss = F.linear_margin_cross_entropy(x, w, y, compute_dtype=compute_dtype, **ARCFACE)
    scaled = gradients(loss * 2.0**exponent, x, w)
    loss = F.linear_margin_cross_entropy(x, w, y, compute_dtype=compute_dtype, **ARCFACE)
    for got, one in zip(scaled, gradients(loss, x, w)):
        assert torch.equal(got, one * 2.0**exponent)


@needs_gpu
def test_float32_products_follow_the_tf32_setting():
    x, w, y, _ = _on_gpu(*problem(256, 512, 3000, dtype=torch.float32))
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        errors = {}
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            true = F.margin_logits(x.double(), w.double(), scale=64.0)
            errors[allowed] = (F.margin_logits(x, w, scale=64.0) - true).square().mean().sqrt().item()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    # As for float16 (test_logit_errors_of_16_bit_products); what cuts digits off is twice as far off. float32: 512
    # roundings of partial sums within six deviations of a cosine, 6 / sqrt(512), independent.
    of_tf32, of_float32 = 2 * 64 * 2.0**-11 * (2 / 3 / 512) ** 0.5, 64 * 2.0**-24 * 6 / 3**0.5
    assert errors[False] < of_float32 < errors[True] < of_tf32


@pytest.mark.parametrize("loss", list(oracle.founding_losses()))
def test_founding_losses(loss):
    reference_loss, parameters = oracle.founding_losses()[loss]
    x, w, y, b = problem(bias=loss == "softmax")
    expected = reference_loss(x, w, y, *([b] if b is not None else [])).mean()
    gx, gw, gy, gb = _on_gpu(x, w, y, b)
    got = F.linear_margin_cross_entropy(gx, gw, gy, gb, **parameters)
    # The papers' forms have the angle from its cosine: 1 / sin(theta) as far off.
    rounding = LinearRounding(x, w, y, b, **parameters)
    assert_within(got.cpu(), expected, rounding.loss(0.0, len(y)) / rounding.sine.min())


@pytest.mark.parametrize("extension", ["none", "linear", "continuous", "easy", "clip", "monotonic"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck_and_gradgradcheck(extension, normalize):
    x, w, y, b = problem(5, 4, 7, bias=True)
    y[0] = -1
    m2, m3 = ((0.1 * torch.rand(5, dtype=torch.float64)).requires_grad_() for _ in range(2))
    x, w, y, b, m2, m3 = _on_gpu(x, w, y, b, m2, m3)
    options = {"scale": 2.0, "m2": 0.2, "extension": extension}

    def lse(x, w, b, m2, m3):
        return F.linear_margin_lse(
            x, w, y, b, sample_m2=m2, sample_m3=m3, normalize_input=normalize, normalize_weight=normalize, **options
        )[:3]

    cosine = (1.8 * torch.rand(5, 7, dtype=torch.float64, device=DEVICE) - 0.9).requires_grad_()
    of_cosine = lambda c: F.margin_cross_entropy(c, y.clamp(min=0), label_smoothing=0.1, **options)  # noqa: E731
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lse, (x, w, b, m2, m3))
        assert check(of_cosine, (cosine,))


@pytest.mark.parametrize("op", ["linear_margin_cross_entropy", "margin_logits", "_linear_margin_forward"])
def test_opcheck(op):
    x, w, y, b = _on_gpu(*problem(bias=True))
    arguments, options = (x, w, y, b), {"scale": 4.0, "m2": 0.3}
    if op == "_linear_margin_forward":
        arguments, options = (*packed(x, w, y, b, **options), None, True, 0, None), {}
    torch.library.opcheck(getattr(torch.ops.torchmargin, op).default, arguments, options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x, w, y, _ = _on_gpu(*problem(64, 128, 3000, dtype=torch.float32))
    with torch.autocast(DEVICE, dtype=dtype):
        loss = F.linear_margin_cross_entropy(x.to(dtype), w, y, scale=64.0, m2=0.3)
    assert loss.dtype == torch.float32
    expected = reference.linear_margin_cross_entropy(x.to(dtype).double(), w.double(), y, scale=64.0, m2=0.3)
    rounding = LinearRounding(x.cpu().to(dtype), w.cpu(), y.cpu(), scale=64.0, m2=0.3, operands=2.0**-11)
    assert_within(loss.cpu(), expected.cpu(), rounding.loss(0.0, len(y)) + stored(expected.cpu(), torch.float32))


@pytest.mark.parametrize("compute_dtype", [None, torch.float16])
def test_same_bits_every_run(limit, compute_dtype):
    x, w, y, b = _on_gpu(*problem(300, 129, 5000, dtype=torch.float32, bias=True))

    def run():
        loss = F.linear_margin_cross_entropy(x, w, y, b, label_smoothing=0.1, compute_dtype=compute_dtype, **ARCFACE)
        return [loss, *gradients(loss, x, w, b)]

    first = run()
    for _ in range(5):
        for one, other in zip(first, run()):
            assert torch.equal(one, other)


def _capture(step):
    """A graph of the step, and what it writes to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


# What a graph captured keeps its nodes, on the stream of the capture.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
@needs_gpu
@pytest.mark.parametrize("compute_dtype", [None, torch.float16])
def test_cuda_graph(compute_dtype):
    """Captured, replayed with other inputs: no synchronisation, and the margin's weight is a tensor."""
    x, w, y, _ = _on_gpu(*problem(64, 128, 3000, dtype=torch.float32))
    weight = torch.ones((), device=DEVICE)

    def step():
        loss = F.linear_margin_cross_entropy(
            x, w, y, sample_margin_weight=weight, compute_dtype=compute_dtype, **ARCFACE
        )
        return [loss, *gradients(loss, x, w)]

    graph, captured = _capture(step)
    for value in (0.3, 0.9):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            weight.fill_(value)
        graph.replay()
        for got, true in zip(captured, step()):
            assert torch.equal(got, true)


@needs_gpu
@pytest.mark.parametrize("compute_dtype", [None, torch.float16])
def test_no_synchronisation(compute_dtype):
    x, w, y, b = _on_gpu(*problem(64, 128, 3000, dtype=torch.float32, bias=True))
    try:
        with warnings.catch_warnings():  # it says once that it is a prototype; the mode is set by then
            warnings.simplefilter("ignore", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        for normalize in (True, False):
            loss = F.linear_margin_cross_entropy(
                x, w, y, b, label_smoothing=0.1, normalize_weight=normalize, compute_dtype=compute_dtype, **ARCFACE
            )
            gradients(loss, x, w, b)
    finally:
        torch.cuda.set_sync_debug_mode("default")


HEADS = {
    "curricular": {"hard_coefficients": (1.0, 0.3, 0.0)},
    "mv": {"hard_coefficients": (0.0, 1.2, 0.2)},
    "filter": {"hard_coefficients": (0.0, 0.0, 0.0), "hard_threshold": 0.2},
    "hardest": {"hardest": 5, "hardest_margin": 0.06},
    "sub-centers": {},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("centers", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_agree_with_the_cpu(head, centers, dtype, limit):
    """float64: with the CPU's. Narrower, a class at a threshold may flip: most rows are as near as a logit is off, and
    gradients show no wrong factor (DeviceSweep holds them to their roundings, on rows where nothing flips)."""
    x, w, y, _ = problem(33, 70, 1100 * centers, dtype=dtype)
    y = y % 1100
    numbers = {
        name: torch.tensor(value, dtype=torch.float64) if name.startswith("hard_") else value
        for name, value in HEADS[head].items()
    }
    options = {"scale": 16.0, "m2": 0.3, "sub_centers": centers, "reduction": "none"}
    moved = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in numbers.items()}
    gx, gw, gy = _on_gpu(x, w, y)
    got = F.linear_margin_cross_entropy(gx, gw, gy, **options, **moved)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    expected = F.linear_margin_cross_entropy(*wide, y, **options, **numbers)
    of_rows = (got.double().cpu() - expected).abs().detach()
    # A unit vector's and a product's rounding, in a logit with a slope of at most 2.3.
    of_logit = 16 * 2.3 * 8 * (torch.finfo(dtype).eps / 2 if dtype != torch.bfloat16 else 2.0**-11)
    assert (of_rows <= of_logit).double().mean() >= (1.0 if dtype == torch.float64 else 0.8)
    grads, true = gradients(got.sum(), gx, gw), gradients(expected.sum(), *wide)
    for one, other in zip(grads, true):
        assert one.dtype == dtype
        error = (one.double().cpu() - other).norm() / other.norm()
        assert error <= (1e-10 if dtype == torch.float64 else 0.2), error


@pytest.mark.parametrize("kind", ["c", "a", "m"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_against_all_agrees_with_the_cpu(kind, dtype, limit):
    x, w, y, _ = problem(33, 70, 1100, dtype=dtype)
    bias = torch.tensor(-1.0, dtype=dtype, requires_grad=True)
    options = {"scale": 16.0, "margin": 0.2, "kind": kind, "power": 3.0, "positive_weight": 0.7, "reduction": "sum"}
    gx, gw, gy, gb = _on_gpu(x, w, y, bias)
    got = F.linear_margin_binary_cross_entropy(gx, gw, gy, gb, **options)
    wide = [t.detach().double().requires_grad_() for t in (x, w, bias)]
    expected = F.linear_margin_binary_cross_entropy(wide[0], wide[1], y, wide[2], **options)
    # As far as logits are, which have a slope of at most 3.
    of_logit = 16 * 3 * 8 * (torch.finfo(dtype).eps / 2 if dtype != torch.bfloat16 else 2.0**-11)
    assert (got.double().cpu() - expected).abs() <= of_logit * expected
    for one, other in zip(gradients(got, gx, gw, gb), gradients(expected, *wide)):
        assert (one.double().cpu() - other).norm() <= 2 * (of_logit + torch.finfo(dtype).eps) * other.norm()


@needs_gpu
def test_a_threshold_changes_inside_a_graph():
    """CurricularFace's t is a tensor: a captured step follows it."""
    x, w, y, _ = _on_gpu(*problem(64, 128, 3000, dtype=torch.float32))
    coefficients = torch.tensor([1.0, 0.0, 0.0], device=DEVICE)

    def step():
        loss = F.linear_margin_cross_entropy(x, w, y, scale=32.0, m2=0.3, hard_coefficients=coefficients)
        return [loss, *gradients(loss, x, w)]

    graph, captured = _capture(step)
    for t in (0.2, 0.6):
        coefficients[1] = t
        graph.replay()
        for got, true in zip(captured, step()):
            assert torch.equal(got, true)


def _same_twice(step):
    for one, other in zip(step(), step()):
        assert torch.equal(one, other)


@pytest.mark.parametrize("compute_dtype", [None, torch.float16])
def test_second_derivatives_have_the_same_bits_every_run(compute_dtype):
    """Many rows of few classes: their rows of the weight are summed in one order."""
    x, w, _, b = _on_gpu(*problem(256, 32, 5, dtype=torch.float32, bias=True))
    y = torch.arange(256, device=DEVICE) % 5

    def step():
        loss = F.linear_margin_cross_entropy(x, w, y, b, compute_dtype=compute_dtype, **ARCFACE)
        first = torch.autograd.grad(loss, (x, w, b), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, w, b))

    _same_twice(step)


@needs_gpu
def test_deterministic_algorithms_are_enough():
    x, w, y, b = _on_gpu(*problem(33, 70, 1100, dtype=torch.float32, bias=True))
    torch.use_deterministic_algorithms(True)
    try:
        loss = F.linear_margin_cross_entropy(x, w, y, b, compute_dtype=torch.float16, **ARCFACE)
        gradients(loss, x, w, b)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_gpu
@pytest.mark.parametrize("compute_dtype", [None, torch.float16])
def test_narrow_sums_that_are_allowed_are_not_used(compute_dtype):
    """torch.backends.cuda.matmul.allow_fp16_accumulation: ATen has no such product of 16 bits in float32."""
    x, w, y, _ = _on_gpu(*problem(64, 128, 3000, dtype=torch.float32))

    def step():
        loss = F.linear_margin_cross_entropy(x, w, y, compute_dtype=compute_dtype, **ARCFACE)
        return [loss, *gradients(loss, x, w)]

    expected = step()
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        got = step()
        assert torch.backends.cuda.matmul.allow_fp16_accumulation
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    for one, other in zip(got, expected):
        assert torch.equal(one, other)


def test_backward_inside_autocast():
    x, w, y, _ = _on_gpu(*problem(64, 128, 3000, dtype=torch.float32))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = F.linear_margin_cross_entropy(x, w, y, **ARCFACE)
        inside = gradients(loss, x, w)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = F.linear_margin_cross_entropy(x, w, y, **ARCFACE)
    for one, other in zip(inside, gradients(loss, x, w)):
        assert torch.equal(one, other)


def test_weights_whose_rows_are_not_contiguous():
    x, w, y, _ = _on_gpu(*problem(33, 70, 1100, dtype=torch.float32))
    wide = torch.empty(70, 1100, device=DEVICE).t().copy_(w.detach()).requires_grad_()
    assert not wide.is_contiguous()
    losses = [F.linear_margin_cross_entropy(x, each, y, **ARCFACE) for each in (w, wide)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients(losses[1], wide)[0], gradients(losses[0], w)[0], rtol=1e-3, atol=1e-6)


@needs_gpu
def test_two_streams_at_once():
    x, w, y, _ = _on_gpu(*problem(256, 512, 20000, dtype=torch.float32))
    expected = F.linear_margin_cross_entropy(x, w, y, compute_dtype=torch.float16, **ARCFACE)
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = [[], []]
    torch.cuda.synchronize()
    for _ in range(4):
        for stream, losses in zip(streams, found):
            with torch.cuda.stream(stream):
                losses.append(F.linear_margin_cross_entropy(x, w, y, compute_dtype=torch.float16, **ARCFACE))
    torch.cuda.synchronize()
    assert all(torch.equal(loss, expected) for losses in found for loss in losses)


@needs_gpu
def test_side_stream():
    x, w, y, _ = _on_gpu(*problem(256, 512, 20000, dtype=torch.float32))
    expected = F.linear_margin_cross_entropy(x, w, y, **ARCFACE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)  # the other stream has not waited for this one
        late = x * 1.0
        loss = F.linear_margin_cross_entropy(late, w, y, **ARCFACE)
    stream.synchronize()
    assert torch.equal(loss, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU here")
def test_second_device():
    x, w, y, _ = problem(dtype=torch.float32)
    expected = F.linear_margin_cross_entropy(*_on_gpu(x, w, y), **ARCFACE)
    loss = F.linear_margin_cross_entropy(*(t.detach().to("cuda:1") for t in (x, w, y)), **ARCFACE)
    assert loss.device.index == 1 and torch.equal(loss.cpu(), expected.cpu())


@needs_gpu
@pytest.mark.parametrize("compute_dtype", [None, torch.float16])
def test_memory_at_a_million_classes(compute_dtype):
    rows, features, classes = 512, 512, 1_000_000
    x = torch.randn(rows, features, device=DEVICE, requires_grad=True)
    w = torch.randn(classes, features, device=DEVICE, requires_grad=True)
    y = torch.randint(0, classes, (rows,), device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = F.linear_margin_cross_entropy(x, w, y, compute_dtype=compute_dtype, **ARCFACE)
    grads = gradients(loss, x, w)
    peak = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads)
    # The limit, 16 bytes a class, and what cuBLAS takes for itself once.
    assert peak <= torchmargin.get_workspace_limit(DEVICE) + 16 * classes + (64 << 20)


@needs_gpu
def test_more_than_2_31_logits_and_weights():
    rows, features, classes = 4200, 520, 4_200_000  # 1.8e10 logits, 2.2e9 weights
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("needs 48 GiB")
    w = torch.empty(classes, features, device=DEVICE).normal_().requires_grad_()
    x = w.detach()[:: classes // rows][:rows].clone().requires_grad_()
    y = torch.arange(rows, device=DEVICE) * (classes // rows)
    y[-1] = classes - 1
    loss = F.linear_margin_cross_entropy(x, w, y, reduction="none", **ARCFACE)
    assert loss.isfinite().all()
    last = torch.nn.functional.normalize(x[-1:]).double() @ torch.nn.functional.normalize(w.detach()).double().T
    psi = F.margin_transform(last[:, -1], m2=0.5, extension="linear")
    others = 64 * last[:, :-1]
    expected = torch.nn.functional.softplus(others.logsumexp(1) - 64 * psi)
    # Two unit vectors, here normalised in float32 too, and their products, for the logits and for the target; and a sum
    # of as many terms as LinearRounding.lse has.
    bound = 2.0**-24 * (2 * 64 * (4 * (features + 8) + features) + 1024 + 8 * 65)
    assert_within(loss[-1:].cpu(), expected.cpu(), bound)
    (grad,) = torch.autograd.grad(loss[-1], w)
    assert grad[-1].abs().sum() > 0


def test_empty_batches():
    x = torch.empty(0, 6, device=DEVICE, requires_grad=True)
    w = torch.randn(23, 6, device=DEVICE, requires_grad=True)
    y = torch.empty(0, dtype=torch.long, device=DEVICE)
    loss = F.linear_margin_cross_entropy(x, w, y, **ARCFACE)
    assert loss.isnan() and not gradients(loss, x, w)[1].any()
    assert F.margin_logits(x, w).shape == (0, 23)


@needs_gpu
def test_a_target_out_of_range_is_a_device_assertion():
    """In a process of its own: an assertion ends the CUDA context."""
    import subprocess
    import sys

    code = (
        "import torch, torchmargin.functional as F\n"
        "x, w, y = torch.randn(2, 3).cuda(), torch.randn(4, 3).cuda(), torch.tensor([0, 9]).cuda()\n"
        "F.linear_margin_cross_entropy(x, w, y)\n"
        "torch.cuda.synchronize()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode != 0 and "assert" in ran.stderr


def test_the_modules_train():
    for make in (torchmargin.ArcFaceLoss, torchmargin.SphereFaceLoss, torchmargin.AdaFaceLoss, torchmargin.SoftmaxLoss):
        loss = make(16, 40, device=DEVICE)
        x = torch.randn(32, 16, device=DEVICE, requires_grad=True)
        value, statistics = loss(x, torch.randint(0, 40, (32,), device=DEVICE), return_statistics=True)
        value.backward()
        assert x.grad.isfinite().all() and all(s.isfinite() for s in statistics)
        assert loss.logits(x).shape == (32, 40)


def test_numbers_that_others_write_to_buffers_count():
    """In training from the first call, or the first after train(), on; in inference at once."""
    x, y = torch.randn(32, 16, device=DEVICE), torch.randint(0, 40, (32,), device=DEVICE)
    loss, expected = (torchmargin.ArcFaceLoss(16, 40, device=DEVICE, scale=scale) for scale in (64.0, 10.0))
    expected.load_state_dict({"weight": loss.weight}, strict=False)
    loss.number("scale").fill_(10.0)
    assert torch.equal(loss(x, y), expected(x, y))
    for mode in (True, False):
        loss.number("scale").fill_(20.0)
        assert not torch.equal(loss.train(mode)(x, y), expected(x, y))
        loss.number("scale").fill_(10.0)
        assert torch.equal((loss.train() if mode else loss)(x, y), expected(x, y))


@needs_gpu
def test_training_with_a_module_does_not_synchronise():
    """Nor where others write to its buffers in every step."""
    x, y = torch.randn(32, 16, device=DEVICE, requires_grad=True), torch.randint(0, 40, (32,), device=DEVICE)
    losses = [make(16, 40, device=DEVICE) for make in (torchmargin.ArcFaceLoss, torchmargin.CosFaceLoss)]
    for loss in losses:
        loss(x, y).backward()  # the first call reads what rank 0 may have given
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        for loss in losses:
            for buffer in loss.buffers():
                buffer.copy_(buffer.clone())
            loss(x, y).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
