"""Autocast and 16-bit inputs: what is cast, what is not, and what comes back."""

import pytest
import torch

import torchmargin
import torchmargin.functional as F

from conftest import SCALAR_TYPES, problem

MARGIN = {"scale": 64.0, "m2": 0.3}
LINEAR = {
    "lse": lambda x, w, y, b, **k: F.linear_margin_lse(x, w, y, b, **MARGIN, **k),
    "loss": lambda x, w, y, b, **k: F.linear_margin_cross_entropy(x, w, y, b, **MARGIN, **k),
    "logits": lambda x, w, y, b, **k: F.margin_logits(x, w, y, b, **MARGIN, **k),
}


def _results(value):
    return list(value) if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", LINEAR)
def test_linear_ops_keep_a_float32_weight(op, dtype):
    """A 16-bit input is widened, nothing is rounded, and each gradient has its tensor's dtype."""
    x, w, y, b = problem(dtype=torch.float32, bias=True)
    narrow = x.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        got = _results(LINEAR[op](narrow, w, y, b))
    expected = _results(LINEAR[op](narrow.float(), w, y, b))
    for ours, true in zip(got, expected):
        assert ours.dtype == torch.float32
        # On the CPU the products are float32 whatever compute_dtype allows: the same bits.
        assert torch.equal(ours, true)
    gradients = torch.autograd.grad(got[0].sum(), (narrow, w, b))
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]


def test_narrow_weights_take_their_inputs_along():
    x, w, y, b = problem(dtype=torch.float32, bias=True)
    weight, bias = w.detach().bfloat16(), b.detach().bfloat16()
    margins = 0.1 * torch.rand(9)
    with torch.autocast("cpu"):
        got = F.linear_margin_cross_entropy(x, weight, y, b, sample_m2=margins, **MARGIN)
    expected = F.linear_margin_cross_entropy(x.bfloat16(), weight, y, bias, sample_m2=margins, **MARGIN)
    assert got.dtype == torch.float32 and torch.equal(got, expected)


def test_float64_is_untouched():
    x, w, y, b = problem(bias=True)
    cosine = torch.rand(9, 23, dtype=torch.float64)
    with torch.autocast("cpu"):
        for op in LINEAR.values():
            assert _results(op(x, w, y, b))[0].dtype == torch.float64
        assert F.margin_cross_entropy(cosine, y).dtype == torch.float64
        assert F.margin_transform(cosine).dtype == torch.float64
        with pytest.raises(RuntimeError, match="expected weight to have the dtype of input, Float, but got Double"):
            F.linear_margin_cross_entropy(x.float(), w, y)


def test_float64_margins_of_rows_stay_float64():
    """The modules hold margins in float64 buffers: 0.35 must not become float32's 0.35."""
    x, w, y, _ = problem(dtype=torch.float32)
    margin = torch.tensor(0.35, dtype=torch.float64).expand(9)
    cosine = torch.nn.functional.normalize(x.detach()) @ torch.nn.functional.normalize(w.detach()).T
    for weight in (w.detach(), w.detach().bfloat16()):
        with torch.autocast("cpu"):
            got = F.linear_margin_cross_entropy(x, weight, y, scale=64.0, sample_m2=margin, sample_m3=margin)
            expected = F.linear_margin_cross_entropy(x, weight, y, scale=64.0, m2=0.35, m3=0.35)
        assert torch.equal(got, expected)
    with torch.autocast("cpu"):
        got = F.margin_cross_entropy(cosine.bfloat16(), y, sample_m2=margin, sample_m3=margin)
        assert torch.equal(got, F.margin_cross_entropy(cosine.bfloat16(), y, m2=0.35, m3=0.35))


def test_the_others_run_in_float32():
    cosine = (2 * torch.rand(9, 23) - 1).bfloat16().requires_grad_()
    y = torch.randint(0, 23, (9,))
    with torch.autocast("cpu"):
        loss, psi = F.margin_cross_entropy(cosine, y, **MARGIN), F.margin_transform(cosine, m2=0.3)
    assert loss.dtype == psi.dtype == torch.float32
    assert torch.equal(loss, F.margin_cross_entropy(cosine.float(), y, **MARGIN))
    assert torch.equal(psi, F.margin_transform(cosine.float(), m2=0.3))
    assert torch.autograd.grad(loss, cosine)[0].dtype == torch.bfloat16


def test_compute_dtype_is_set_and_may_be_given():
    """The private op is told the autocast dtype; what the caller says goes before."""
    x, w, y, _ = problem(dtype=torch.float32)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_linear_margin_forward" in str(function):
                seen.append(args[9][9])
            return function(*args, **(kwargs or {}))

    with Watch(), torch.autocast("cpu", dtype=torch.float16):
        F.linear_margin_cross_entropy(x, w, y)
        F.linear_margin_cross_entropy(x, w, y, compute_dtype=torch.bfloat16)
    with Watch():
        F.linear_margin_cross_entropy(x, w, y)
    assert seen == [SCALAR_TYPES[dtype] for dtype in (torch.float16, torch.bfloat16, None)]


@pytest.mark.parametrize("make", [torchmargin.ArcFaceLoss, torchmargin.SphereFaceLoss, torchmargin.AdaFaceLoss])
def test_modules_train_under_autocast(make):
    network, loss = torch.nn.Linear(6, 8), make(8, 17)
    x, y = torch.randn(12, 6), torch.randint(0, 17, (12,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = network(x)
        value, statistics = loss(embeddings, y, return_statistics=True)
        logits = loss.logits(embeddings)
    assert embeddings.dtype == torch.bfloat16
    assert value.dtype == logits.dtype == torch.float32 and all(s.dtype == torch.float32 for s in statistics)
    value.backward()
    assert loss.weight.grad.dtype == network.weight.grad.dtype == torch.float32


def test_grad_scaler():
    loss = torchmargin.CosFaceLoss(6, 17)
    x, y = torch.randn(12, 6), torch.randint(0, 17, (12,))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimiser = torch.optim.SGD(loss.parameters(), lr=0.1)
    scaler.scale(loss(x, y)).backward()
    scaler.unscale_(optimiser)
    scaled = loss.weight.grad.clone()
    loss.zero_grad()
    loss(x, y).backward()
    assert torch.equal(scaled, loss.weight.grad)
