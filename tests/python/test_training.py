"""What training scripts do: frozen parts, accumulation, determinism, torch.compile, torch.export."""

import copy
import weakref

import pytest
import torch
from torch.profiler import profile

import torchmargin
import torchmargin.functional as F

from conftest import gradients, problem
from rounding import LinearRounding, assert_within, monte_carlo

ARCFACE = {"scale": 16.0, "m2": 0.3, "extension": "linear"}


def _products(run):
    """How many matrix products a call makes."""
    with profile(acc_events=True) as seen:
        run()
    return sum(event.count for event in seen.key_averages() if event.key in ("aten::mm", "aten::addmm"))


@pytest.mark.parametrize(
    ("wanted", "expected"), [("xw", 3), ("x", 2), ("w", 2), ("", 1)], ids=["both", "input", "weight", "none"]
)
def test_no_product_for_a_gradient_that_nobody_asked_for(wanted, expected):
    """One chunk and one tile: the logits, and one product for each gradient."""
    x, w, y, _ = problem()
    x.requires_grad_("x" in wanted)
    w.requires_grad_("w" in wanted)

    def step():
        loss = F.linear_margin_cross_entropy(x, w, y, **ARCFACE)
        if wanted:
            loss.backward()

    assert _products(step) == expected


def test_frozen_embeddings_and_weights():
    x, w, y, b = problem(bias=True)
    full = gradients(F.linear_margin_cross_entropy(x, w, y, b, **ARCFACE), x, w, b)
    for index in range(3):
        leaves = [t.detach().requires_grad_(i == index) for i, t in enumerate((x, w, b))]
        loss = F.linear_margin_cross_entropy(leaves[0], leaves[1], y, leaves[2], **ARCFACE)
        assert torch.equal(gradients(loss, leaves[index])[0], full[index])


@pytest.mark.parametrize("order", [1, 2])
def test_a_graph_goes_with_its_loss(order):
    """A node that saved a result of its own as a plain tensor would hold itself, and the batch, for ever."""
    x, w, y, _ = problem()
    value = F.linear_margin_cross_entropy(x, w, y, **ARCFACE)
    for _ in range(order - 1):
        value = torch.autograd.grad(value, x, create_graph=True)[0].square().sum()
    batch = weakref.ref(x)
    del x, value
    assert batch() is None


def test_non_leaf_weights_and_accumulation():
    x, w, y, _ = problem()
    loss = lambda: F.linear_margin_cross_entropy(x, (2 * w).tanh(), y, **ARCFACE)  # noqa: E731
    loss().backward()
    once = w.grad.clone()
    loss().backward()
    assert torch.equal(w.grad, 2 * once)
    halves = [F.linear_margin_cross_entropy(x[r], w, y[r], reduction="sum", **ARCFACE) for r in (slice(4), slice(4, 9))]
    whole = F.linear_margin_cross_entropy(x, w, y, reduction="sum", **ARCFACE)
    bounds = LinearRounding(x, w, y, **ARCFACE).loss_gradients()
    for got, true, bound in zip(gradients(sum(halves), x, w), gradients(whole, x, w), bounds):
        assert_within(got, true, bound)


def test_deterministic_algorithms_change_nothing():
    """In this mode torch also fills fresh memory with NaN: nothing is read before it is written."""
    x, w, y, b = problem(300, 16, 3000, dtype=torch.float32, bias=True)
    cosine = (2 * torch.rand(9, 23) - 1).requires_grad_()

    def run():
        loss = F.linear_margin_cross_entropy(x, w, y, b, label_smoothing=0.1, **ARCFACE)
        logits = F.margin_logits(x, w, y, b, **ARCFACE)
        of_cosine = F.margin_cross_entropy(cosine, y[:9] % 23, **ARCFACE)
        psi = F.margin_transform(cosine, m2=0.3)
        total = loss + logits.square().mean() + of_cosine + psi.sum()
        return [loss, logits, of_cosine, psi, *gradients(total, x, w, b, cosine)]

    plain = run()
    torch.use_deterministic_algorithms(True)
    try:
        deterministic = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(plain, deterministic):
        assert torch.equal(one, other)


class Model(torch.nn.Module):
    def __init__(self, make=torchmargin.ArcFaceLoss, dtype=torch.float32):
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.PReLU(), torch.nn.Linear(12, 8)).to(dtype)
        self.loss = make(8, 17, scale=4.0, dtype=dtype)  # at 64 float32's roundings count for more

    def forward(self, x, y):
        return self.loss(self.network(x), y)


def _bounds(model, run, dtype):
    """How far roundings to `dtype` may move what `run` makes of a model; an op of the library counts as a product."""
    made = copy.deepcopy(model).double()
    return monte_carlo(lambda: run(copy.deepcopy(made)), dtype)[1]


def test_a_compiled_loss_that_was_cast_moves_its_statistics():
    """torch 2.11's graphs lose what is written to a 0-dim float64 buffer: no cast makes one of a statistic."""
    torch._dynamo.reset()
    plain, cast = torchmargin.AdaFaceLoss(8, 17).double(), torchmargin.AdaFaceLoss(8, 17).double()
    cast.load_state_dict(plain.state_dict())
    compiled = torch.compile(cast, backend="aot_eager")
    x, y = 5 * torch.randn(12, 8, dtype=torch.float64), torch.randint(0, 17, (12,))
    for _ in range(2):
        assert torch.equal(compiled(x, y), plain(x, y))
    assert cast.length_mean == plain.length_mean != 20.0 and cast.length_mean.dtype == torch.float32


@pytest.mark.parametrize("make", [torchmargin.ArcFaceLoss, torchmargin.SphereFaceLoss, torchmargin.AdaFaceLoss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compile_a_training_step(make, dtype):
    """fullgraph, with inductor: the same loss and gradients, and the same for another batch size."""
    torch._dynamo.reset()
    plain = Model(make, dtype)
    compiled = torch.compile(Model(make, dtype), fullgraph=True, dynamic=True)
    compiled.load_state_dict({f"_orig_mod.{key}": value for key, value in plain.state_dict().items()})
    for rows in (12, 7):
        x, y = torch.randn(rows, 6), torch.randint(0, 17, (rows,))

        def step(model):
            value = model(x.to(model.loss.weight.dtype), y)  # noqa: B023
            return [value, *gradients(value, *model.parameters())]

        # inductor fuses the network's own arithmetic, rounding as often at most.
        bounds = _bounds(plain, step, dtype)
        for got, expected, bound in zip(step(compiled), step(plain), bounds):
            assert_within(got, expected, 2 * bound)


def test_compiled_autograd():
    """The node tells compiled autograd what it saved: other numbers are another graph."""
    x, w, y, _ = problem(dtype=torch.float32)
    for margin in (0.3, 0.1):
        loss = lambda: F.linear_margin_cross_entropy(x, w, y, scale=8.0, m2=margin, label_smoothing=0.1)  # noqa: B023, E731
        expected = gradients(loss(), x, w)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss().backward()
        assert torch.equal(x.grad, expected[0]) and torch.equal(w.grad, expected[1])
        x.grad = w.grad = None


OPS = {
    "loss": lambda x, w, y: F.linear_margin_cross_entropy(x, w, y, **ARCFACE),
    "lse": lambda x, w, y: F.linear_margin_lse(x, w, y, **ARCFACE)[0].sum(),
    "logits": lambda x, w, y: F.margin_logits(x, w, y, **ARCFACE).square().sum(),
    "cosine": lambda x, w, y: F.margin_cross_entropy((x @ w.T).tanh(), y, **ARCFACE),
    "transform": lambda x, w, y: F.margin_transform((x @ w.T).tanh(), m2=0.3).sum(),
}


@pytest.mark.parametrize("op", OPS)
def test_compile_with_dynamic_shapes(op):
    torch._dynamo.reset()
    compiled = torch.compile(OPS[op], fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.compiler.set_stance("default"):
        for rows, classes in ((9, 23), (5, 40), (31, 2)):
            x, w, y, _ = problem(rows, 6, classes)
            got, expected = compiled(x, w, y), OPS[op](x, w, y)
            assert torch.equal(got, expected)  # the same calls, and products made again are those that were kept
            for ours, true in zip(gradients(got, x, w), gradients(expected, x, w)):
                assert torch.equal(ours, true)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable", "ignore:.*treespec:FutureWarning")  # torch's own
@pytest.mark.parametrize("aoti", [False, True])
def test_export_save_and_load(aoti, tmp_path):
    """torch.export's program, and AOTInductor's package, load and run with the library loaded."""
    model = Model().eval()
    x, y = torch.randn(12, 6), torch.randint(0, 17, (12,))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x, y), dynamic_shapes=({0: batch}, {0: batch}))
    path = tmp_path / "model.pt2"
    if aoti:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        loaded = torch._inductor.aoti_load_package(str(path))
    else:
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
    for rows in (12, 5):
        with torch.no_grad():
            got, expected = loaded(x[:rows], y[:rows]), model(x[:rows], y[:rows])
            (bound,) = _bounds(model, lambda wide: wide(x[:rows].double(), y[:rows]), torch.float32)  # noqa: B023
        if aoti:
            assert_within(got, expected, 2 * bound)
        else:
            assert torch.equal(got, expected)  # the same calls
