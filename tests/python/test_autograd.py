"""The ops under autograd, torch.func, opcheck and torch.compile."""

import pytest
import torch

import torchmargin.functional as F

from conftest import problem


@pytest.mark.parametrize("extension", ["none", "linear", "easy", "clip", "monotonic"])
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


def test_second_derivatives_are_not_implemented():
    x, w, y, _ = problem()
    loss = F.linear_margin_cross_entropy(x, w, y, scale=4.0)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    assert grad.requires_grad
    with pytest.raises(NotImplementedError, match="_linear_margin_backward: second derivatives are not implemented"):
        grad.sum().backward()


def test_forward_mode_is_not_implemented():
    x, w, y, _ = problem()
    with pytest.raises(NotImplementedError, match="forward-mode AD is not implemented"):
        torch.func.jvp(lambda x: F.linear_margin_cross_entropy(x, w.detach(), y), (x.detach(),), (x.detach(),))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap loops over the op
def test_func_grad_and_jacrev():
    x, w, y, _ = problem()
    loss = lambda x, w: F.linear_margin_cross_entropy(x, w, y, scale=4.0, m2=0.3)  # noqa: E731
    expected = torch.autograd.grad(loss(x, w), (x, w))
    for transform in (torch.func.grad, torch.func.jacrev):
        for got, true in zip(transform(loss, argnums=(0, 1))(x.detach(), w.detach()), expected):
            torch.testing.assert_close(got, true)


@pytest.mark.parametrize("op", ["linear_margin_lse", "linear_margin_cross_entropy", "_linear_margin_forward"])
def test_opcheck(op):
    x, w, y, b = problem(bias=True)
    torch.library.opcheck(getattr(torch.ops.torchmargin, op).default, (x, w, y, b), {"scale": 4.0, "m2": 0.3})


def test_compile_fullgraph_gives_the_same():
    x, w, y, _ = problem(dtype=torch.float32)

    def step(x, w, y):
        return F.linear_margin_cross_entropy(x, w, y, scale=16.0, m2=0.3) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss, expected = compiled(x, w, y), step(x, w, y)
    assert torch.equal(loss, expected)
    for got, true in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w))):
        torch.testing.assert_close(got, true)


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
