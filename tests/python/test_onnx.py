"""loss.logits and margin_logits through torch.onnx.export, run by onnxruntime: the caller passes no table."""

import pytest
import torch
from torch import nn

import torchmargin
import torchmargin.functional as F
from torchmargin.exporting import margin_logits_formula

from rounding import LinearRounding, assert_within

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
# torch's exporter and onnxscript deprecate parts of each other.
pytestmark = pytest.mark.filterwarnings("ignore")

D, C, ROWS = 8, 5, 3
LOSSES = [name for name in torchmargin.losses.__all__ if name.endswith("Loss") and name != "AnnealedMarginLoss"]


class Logits(nn.Module):
    """A network and its head, as it is deployed."""

    def __init__(self, loss):
        super().__init__()
        self.network, self.loss = nn.Linear(6, D), loss

    def forward(self, images):
        return self.loss.logits(self.network(images))


def _run(module, arguments, folder, dynamic):
    """What onnxruntime finds for the arguments; for twice as many rows with a dynamic batch."""
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.onnx.export(
        module, arguments, dynamo=True, dynamic_shapes=(batch,) * len(arguments) if dynamic else None, verbose=False
    )
    program.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    given = tuple(torch.cat([each, each.flip(0)]) for each in arguments) if dynamic else arguments
    feeds = {value.name: each.numpy() for value, each in zip(session.get_inputs(), given)}
    domains = {node.domain for node in program.model.graph}
    assert domains <= {""}, f"operators that no runtime knows: {domains}"
    return torch.from_numpy(session.run(None, feeds)[0]), given


def _bound(x, weight, bias=None, scale=1.0, **options):
    """Both round products, norms and the network's own layer: three times what one of them does."""
    return 3 * LinearRounding(x.float(), weight, None, bias, scale=scale, **options).logit[:, None]


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [*((name, True) for name in LOSSES), ("ArcFaceLoss", False), ("SphereFace2Loss", False), ("SoftmaxLoss", False)],
)
def test_logits_of_every_loss(name, dynamic, tmp_path):
    module = Logits(getattr(torchmargin, name)(D, C)).eval()
    if module.loss.bias is not None:
        nn.init.uniform_(module.loss.bias)
    found, (images,) = _run(module, (torch.randn(ROWS, 6),), tmp_path, dynamic)
    with torch.no_grad():
        x, expected = module.network(images), module(images)
    loss = module.loss
    lengths = {"normalize_input": loss.normalize_input, "normalize_weight": loss.normalize_weight}
    bias = None if loss.bias is None else loss.bias.expand(C)
    slope = loss.t if name == "SphereFace2Loss" else 1.0  # of its curve, at most
    assert found.shape == expected.shape
    assert_within(found, expected, slope * _bound(x, loss.weight, bias, loss.scale, **lengths))


class WithTarget(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.weight, self.options = nn.Parameter(torch.randn(C * options.get("sub_centers", 1), D)), options

    def forward(self, x, y):
        return F.margin_logits(x, self.weight, y, scale=8.0, **self.options)


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize(
    "options",
    [
        {"m2": 0.5, "extension": "linear"},
        {"m3": 0.35},
        {"m1": 2.0, "extension": "monotonic", "normalize_input": False},
        {"m2": 0.2, "sub_centers": 2},
    ],
    ids=["arcface", "cosface", "sphereface", "centers"],
)
def test_the_margin_of_a_given_target(options, dynamic, tmp_path):
    module = WithTarget(**options)
    found, (x, y) = _run(module, (torch.randn(ROWS, D), torch.tensor([1, -1, C - 1])), tmp_path, dynamic)
    margin = {key: value for key, value in options.items() if key not in ("sub_centers", "extension")}
    # The exported formula makes the angle in float32, the op in float64.
    rounding = LinearRounding(x, module.weight, None, scale=8.0, **margin)
    psi = 2 + 2 * margin.get("m1", 1.0) + 2 * margin.get("m2", 0.0) + margin.get("m3", 0.0)
    assert_within(found, module(x, y).detach(), 3 * (1 + 2 * psi) * rounding.logit[:, None])


def test_the_graph_holds_unit_weights(tmp_path):
    """What depends on weights alone is made once, at the export."""
    module = Logits(torchmargin.ArcFaceLoss(D, C)).eval()
    program = torch.onnx.export(module, (torch.randn(ROWS, 6),), dynamo=True, verbose=False)
    assert [node.op_type for node in program.model.graph].count("ReduceL2") == 1  # of the embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"normalize_input": False}, {"normalize_weight": False}, {"sub_centers": 2}])
def test_the_formula_is_the_op(dtype, options):
    x, w = torch.randn(ROWS, D).to(dtype), torch.randn(2 * C, D).to(dtype)
    b = torch.randn(2 * C // options.get("sub_centers", 1)).to(dtype)
    for bias in (None, b):
        ours = F.margin_logits(x, w, None, bias, scale=8.0, **options)
        formula = margin_logits_formula(x, w, None, bias, scale=8.0, **options)
        assert formula.dtype == ours.dtype
        lengths = {key: value for key, value in options.items() if key != "sub_centers"}
        each = None if bias is None else bias.repeat_interleave(options.get("sub_centers", 1))
        bound = LinearRounding(x.to(ours.dtype), w.to(ours.dtype), None, each, scale=8.0, **lengths).logit
        assert_within(formula, ours, 2 * bound[:, None] if bound.dim() else 2 * bound)


def test_other_tracers_meet_the_private_op():
    """torch.export and what is built on it keep the kernels."""
    module = Logits(torchmargin.ArcFaceLoss(D, C)).eval()
    program = torch.export.export(module, (torch.randn(ROWS, 6),))
    targets = [str(node.target) for node in program.run_decompositions().graph.nodes]
    assert "torchmargin._margin_logits_forward.default" in targets
