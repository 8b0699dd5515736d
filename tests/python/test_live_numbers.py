"""The constructor's names as attributes: they count when they are set, are checked, saved, and survive casts."""

import copy
import io
import math

import pytest
import torch
from torch.nn import functional as tf

import torchmargin

C, D = 17, 8

# A loss and other values for every number of it.
NUMBERS = {
    "SoftmaxLoss": {"scale": 2.0},
    "ModifiedSoftmaxLoss": {"scale": 2.0},
    "NormalizedSoftmaxLoss": {"scale": 20.0},
    "SphereFaceLoss": {"scale": 2.0, "margin": 3.0, "lambda_base": 20.0, "lambda_gamma": 0.5, "lambda_min": 2000.0},
    "LargeMarginSoftmaxLoss": {
        "scale": 2.0,
        "margin": 2.0,
        "lambda_base": 9.0,
        "lambda_gamma": 0.2,
        "lambda_min": 90.0,
    },
    "CosFaceLoss": {"scale": 30.0, "margin": 0.1},
    "ArcFaceLoss": {"scale": 30.0, "margin": 0.1},
    "CombinedMarginLoss": {"scale": 30.0, "m1": 1.25, "m2": 0.1, "m3": 0.05},
    "AdaFaceLoss": {"scale": 30.0, "margin": 0.1, "h": 0.5, "momentum": 0.5},
    "MagFaceLoss": {"scale": 30.0, "a_min": 5.0, "a_max": 40.0, "m_min": 0.1, "m_max": 0.3, "regularizer": 3.0},
    "ElasticFaceLoss": {"scale": 30.0, "margin": 0.1, "deviation": 0.2},
    "SubCenterArcFaceLoss": {"scale": 30.0, "margin": 0.1},
    "CurricularFaceLoss": {"scale": 30.0, "margin": 0.1, "momentum": 0.5},
    "MVSoftmaxLoss": {"scale": 30.0, "margin": 0.1, "t": 0.5},
    "InterTopKArcFaceLoss": {"scale": 30.0, "margin": 0.1, "hardest_margin": 0.2},
    "SphereFace2Loss": {"scale": 30.0, "margin": 0.1, "t": 2.0, "positive_weight": 0.5},
    "UniFaceLoss": {"scale": 30.0, "margin": 0.1},
}
# Beside scale and m1: the numbers that are numbers of the op, for which a compiled graph is compiled again.
OF_THE_OP = {
    "SphereFaceLoss": {"margin"},
    "LargeMarginSoftmaxLoss": {"margin"},
    "InterTopKArcFaceLoss": {"hardest_margin"},
    "SphereFace2Loss": {"margin", "t", "positive_weight"},
    "UniFaceLoss": {"margin"},
}
BESIDE = {"LargeMarginSoftmaxLoss": {"lambda_base": 50.0}}  # else it is not annealed at all
EACH = [(name, number) for name, values in NUMBERS.items() for number in values]


def _make(name, **options):
    torch.manual_seed(1)
    return getattr(torchmargin, name)(D, C, dtype=torch.float64, **{**BESIDE.get(name, {}), **options})


def _batch(dtype=torch.float64):
    torch.manual_seed(2)
    x = (20 * torch.randn(12, D, dtype=dtype)).requires_grad_()
    return x, torch.arange(12) % C


def _results(loss, x, y):
    torch.manual_seed(3)  # ElasticFace draws
    value = loss(x, y)
    return [value.detach(), *torch.autograd.grad(value, (x, loss.weight)), loss.logits(x).detach()]


def _equal(a, b):
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


@pytest.mark.parametrize(("name", "number"), EACH)
def test_a_number_that_others_write_to_its_buffer_counts_in_inference(name, number):
    """An average of modules (ModelEma, AveragedModel) copies buffers: what it shows is what it computes with."""
    x, y = _batch()
    loss, expected = _make(name).eval(), _make(name, **{number: NUMBERS[name][number]}).eval()
    before = _results(loss, x, y)
    if number not in dict(loss.named_buffers()):
        return  # it makes no logits
    loss.number(number).copy_(expected.number(number))
    assert getattr(loss, number) == getattr(expected, number)
    logits = loss.logits(x).detach()  # first: it follows by itself
    assert torch.equal(logits, expected.logits(x).detach())
    assert _equal(_results(loss, x, y), _results(expected, x, y))
    loss.number(number).copy_(_make(name).number(number))
    assert _equal(_results(loss, x, y), before)
    setattr(loss, number, NUMBERS[name][number])  # and what is set afterwards counts
    assert _equal(_results(loss, x, y), _results(expected, x, y))


def test_an_average_of_modules_has_the_scale_that_it_shows():
    from torch.optim.swa_utils import AveragedModel

    loss = torchmargin.ArcFaceLoss(D, C, scale=16.0, dtype=torch.float64)
    average = AveragedModel(loss, use_buffers=True)
    average.update_parameters(loss)
    loss.scale = 32.0
    average.update_parameters(loss)
    x, _ = _batch()
    assert average.module.scale == 24.0
    expected = torchmargin.ArcFaceLoss(D, C, scale=24.0, dtype=torch.float64)
    expected.load_state_dict(average.module.state_dict())
    assert torch.equal(average.module.logits(x), expected.logits(x))


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_set_before_the_backward_pass_count_for_the_next_forward(name):
    """Autograd keeps no buffer: a schedule may step, and DistributedDataParallel write buffers, between the passes."""
    x, y = _batch()
    expected = _results(_make(name), x, y)[1:3]
    loss = _make(name)
    torch.manual_seed(3)
    value = loss(x, y)
    for number, new in NUMBERS[name].items():
        setattr(loss, number, new)
    for buffer in loss.buffers():
        buffer.copy_(buffer.clone())
    assert _equal(torch.autograd.grad(value, (x, loss.weight)), expected)


@pytest.mark.parametrize(("name", "number"), EACH)
def test_a_number_set_later_is_one_set_in_the_constructor(name, number):
    value = NUMBERS[name][number]
    loss, expected, plain = _make(name), _make(name, **{number: value}), _make(name)
    assert getattr(loss, number) != value
    setattr(loss, number, value)
    assert getattr(loss, number) == value and repr(loss) == repr(expected)
    x, y = _batch()
    got = _results(loss, x, y)
    assert _equal(got, _results(expected, x, y))
    assert not _equal(got, _results(plain, x, y))


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_saved_and_restored(name):
    loss, other = _make(name), _make(name)
    for number, value in NUMBERS[name].items():
        setattr(loss, number, value)
    state = loss.state_dict()
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    assert all(
        state[number].dtype == torch.float64 and state[number] == value for number, value in NUMBERS[name].items()
    )
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    for assign in (False, True):
        assert str(other.load_state_dict(torch.load(buffer), assign=assign)) == "<All keys matched successfully>"
        buffer.seek(0)
        assert {number: getattr(other, number) for number in NUMBERS[name]} == NUMBERS[name]
        x, y = _batch()
        assert _equal(_results(copy.deepcopy(other), x, y), _results(copy.deepcopy(loss), x, y))


@pytest.mark.parametrize("name", NUMBERS)
def test_a_state_without_numbers_keeps_the_constructors(name):
    loss = _make(name, **NUMBERS[name])
    state = {key: tensor for key, tensor in _make(name).state_dict().items() if key not in NUMBERS[name]}
    assert str(loss.load_state_dict(state)) == "<All keys matched successfully>"
    assert {number: getattr(loss, number) for number in NUMBERS[name]} == NUMBERS[name]
    model = torch.nn.Sequential(loss)  # with a prefix
    assert str(model.load_state_dict({f"0.{key}": value for key, value in state.items()})) == (
        "<All keys matched successfully>"
    )


def test_a_bad_number_in_a_state_is_refused_and_changes_none():
    loss = _make("ArcFaceLoss")
    state = {**loss.state_dict(), "scale": torch.tensor(32.0), "margin": torch.tensor(28.6)}
    with pytest.raises(RuntimeError, match="expected margin in radians, not degrees: at most pi in size, but got 28.6"):
        loss.load_state_dict(state)
    assert loss.margin == 0.5 and loss.scale == 64.0
    with pytest.raises(RuntimeError, match=r"ArcFaceLoss: expected margin to be a number or a tensor of shape \[17\]"):
        loss.load_state_dict({**loss.state_dict(), "margin": torch.zeros(16)})


BAD = [
    ("ArcFaceLoss", "margin", 28.6, ValueError, "expected margin in radians, not degrees: at most pi in size, but got"),
    ("ArcFaceLoss", "m2", 28.6, ValueError, "expected margin in radians, not degrees"),
    ("MarginLoss", "m2", 28.6, ValueError, "expected m2 in radians, not degrees"),
    ("CosFaceLoss", "margin", 20.0, ValueError, "expected margin to be a difference of cosines"),
    ("CosFaceLoss", "m3", 20.0, ValueError, "expected margin to be a difference of cosines"),
    ("ElasticFaceLoss", "margin", 20.0, ValueError, "expected margin in radians"),
    ("ElasticFaceLoss", "deviation", -1.0, ValueError, "expected deviation not to be negative, but got -1"),
    ("ElasticFaceLoss", "deviation", math.inf, ValueError, "expected deviation to be finite, but got inf"),
    ("ElasticFaceLoss", "kind", "ark", ValueError, "expected kind to be 'arc' or 'cos', but got 'ark'"),
    ("SphereFaceLoss", "margin", 0.0, RuntimeError, "expected m1 > 0, but got 0"),
    ("SphereFaceLoss", "lambda_min", -1.0, ValueError, "expected lambda_min to be finite and not negative"),
    ("AdaFaceLoss", "margin", 20.0, ValueError, "expected margin in radians"),
    ("AdaFaceLoss", "h", math.nan, ValueError, "expected h to be finite, but got nan"),
    ("AdaFaceLoss", "momentum", 1.5, ValueError, r"expected momentum in \[0, 1\], but got 1.5"),
    ("MagFaceLoss", "a_min", 200.0, ValueError, "expected 0 < a_min < a_max, but got 200.0 and 110.0"),
    ("MagFaceLoss", "m_max", 30.0, ValueError, "expected m_max in radians"),
    ("MagFaceLoss", "regularizer", math.inf, ValueError, "expected regularizer to be finite, but got inf"),
    ("ArcFaceLoss", "scale", -1.0, RuntimeError, "expected scale > 0, but got -1"),
    ("ArcFaceLoss", "scale", math.nan, ValueError, "expected scale to be finite, but got nan"),
    ("ArcFaceLoss", "m1", 2.0, RuntimeError, "expected m1 = 1 with extension 'linear'"),
    ("ArcFaceLoss", "extension", "soft", RuntimeError, "but got 'soft'"),
    ("ArcFaceLoss", "margin_gradient", "approximate", RuntimeError, "but got 'approximate'"),
    ("ArcFaceLoss", "reduction", "max", RuntimeError, "but got 'max'"),
    ("ArcFaceLoss", "label_smoothing", 2.0, RuntimeError, r"expected label_smoothing in \[0, 1\], but got 2"),
    ("ArcFaceLoss", "ignore_index", 1.0, TypeError, "ArcFaceLoss: expected ignore_index to be int, but got 1.0"),
    ("ArcFaceLoss", "ignore_index", True, TypeError, "ArcFaceLoss: expected ignore_index to be int, but got True"),
    ("ArcFaceLoss", "normalize_input", 1, TypeError, "ArcFaceLoss: expected normalize_input to be bool, but got 1"),
    ("ArcFaceLoss", "reduction", None, TypeError, "ArcFaceLoss: expected reduction to be str, but got None"),
]


@pytest.mark.parametrize(("name", "attribute", "value", "error", "text"), BAD)
def test_a_bad_value_is_refused_and_changes_nothing(name, attribute, value, error, text):
    loss = _make(name)
    before, state = repr(loss), copy.deepcopy(loss.state_dict())
    with pytest.raises(error, match=text):
        setattr(loss, attribute, value)
    assert repr(loss) == before
    assert all(torch.equal(tensor, state[key]) for key, tensor in loss.state_dict().items())


NOT_NUMBERS = [torch.tensor(0.3), torch.nn.Parameter(torch.tensor(0.3)), [0.3], "0.3", None, True, torch.zeros(C, 1)]


@pytest.mark.parametrize(("name", "number"), [*EACH, ("ArcFaceLoss", "label_smoothing"), ("MarginLoss", "m2")])
def test_what_is_no_number_is_a_type_error(name, number):
    """Tensors too: a Parameter would stand in parameters() and never get a gradient."""
    loss = _make(name)
    for value in NOT_NUMBERS:
        with pytest.raises(TypeError, match=f"{name}: expected {number} to be a number"):
            setattr(loss, number, value)
        with pytest.raises(TypeError, match=f"expected {number} to be a number"):
            _make(name, **{number: value})
    assert set(dict(loss.named_parameters())) <= {"weight", "bias"}


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("label_smoothing", 0.1), ("ignore_index", 3), ("reduction", "sum"), ("extension", "none"),
     ("margin_gradient", "straight_through")],
)  # fmt: skip
def test_options_are_live(attribute, value):
    loss, plain = (_make("ArcFaceLoss", extension="easy") for _ in range(2))
    expected = _make("ArcFaceLoss", **{"extension": "easy", attribute: value})
    setattr(loss, attribute, value)
    x, y = _batch()
    got = _results(loss, x, y)
    assert _equal(got, _results(expected, x, y))
    assert not _equal(got, _results(plain, x, y))


def test_a_kind_set_later():
    loss, expected = _make("ElasticFaceLoss"), _make("ElasticFaceLoss", kind="cos")
    loss.kind = "cos"
    x, y = _batch()
    assert _equal(_results(loss, x, y), _results(expected, x, y))


def test_a_margin_may_change_before_the_backward_pass():
    loss, (x, y) = _make("ArcFaceLoss"), _batch()
    expected = torch.autograd.grad(loss(x, y), loss.weight)
    value = loss(x, y)
    loss.margin = 0.1
    assert _equal(torch.autograd.grad(value, loss.weight), expected)


# ---- a margin for each class -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ArcFaceLoss", "CosFaceLoss"])
def test_a_margin_for_each_class(name):
    margins = torch.linspace(0.0, 0.6, C)
    loss = _make(name, margin=margins, reduction="none", ignore_index=-1)
    x, y = _batch()
    y[3] = -1
    values = loss(x, y)
    for row, label in enumerate(y.tolist()):
        one = _make(name, margin=margins[label].item() if label >= 0 else 0.0, reduction="none", ignore_index=-1)
        assert torch.equal(values[row], one(x, y)[row])  # 0 and a row's margin are summed: exact
    assert values[3] == 0
    margins.fill_(9.0)  # the loss has its own
    assert loss.margin.dtype == torch.float64 and loss.margin.max() < 0.7 and "margin=[17]" in repr(loss)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(loss, {"weight": w}, (x, y)), (x, loss.weight)
    )
    for bad in (C, -2):
        y[5] = bad
        with pytest.raises(IndexError, match=rf"expected target values in \[0, 17\) .*but got {bad} at row 5"):
            loss(x, y)
    state, single = loss.state_dict(), _make(name)
    single.load_state_dict(state)
    assert torch.equal(single.margin, loss.margin)
    single.margin = 0.25
    assert single.margin == 0.25 and single.state_dict()["margin"].shape == ()
    assert loss.half().margin.dtype == torch.float64


def test_a_margin_of_classes_is_added_to_one_of_rows():
    class Own(torchmargin.ArcFaceLoss):
        def sample_margins(self, embeddings, labels):
            return {"sample_m2": embeddings[:, 0].float() * 0 + 0.125}

    margins = torch.arange(C) / 32  # a sum of two is exact
    (x, y), y_margins = _batch(), torch.arange(C) / 32 + 0.125
    torch.manual_seed(1)
    own = Own(D, C, margin=margins, dtype=torch.float64)
    assert torch.equal(own(x, y), _make("ArcFaceLoss", margin=y_margins)(x, y))


@pytest.mark.parametrize(
    ("margin", "error", "text"),
    [
        (torch.zeros(C, requires_grad=True), TypeError, "expected margin not to require grad"),
        (torch.zeros(C + 1), TypeError, r"a number or a tensor of shape \[17\], but got torch.float32 of shape \[18\]"),
        (torch.zeros(C, dtype=torch.int64), TypeError, "but got torch.int64"),
        (torch.full((C,), 28.6), ValueError, "expected margin in radians"),
        (torch.full((C,), -28.6), ValueError, "expected margin in radians"),
        (torch.full((C,), math.nan), ValueError, "expected margin in radians"),
    ],
)
def test_a_bad_margin_of_classes(margin, error, text):
    with pytest.raises(error, match=text):
        torchmargin.ArcFaceLoss(D, C, margin=margin)


# ---- torch.compile, casts, other devices, scripting ------------------------------------------------------------


@pytest.mark.parametrize("name", NUMBERS)
def test_a_schedule_neither_recompiles_nor_freezes(name):
    """All numbers but those that are numbers of the op: scale and m1."""
    torch.compiler.reset()
    loss, (x, y) = _make(name), _batch()
    fixed = {"scale", "m1"} | OF_THE_OP.get(name, set())
    scheduled = {number: (getattr(loss, number), last) for number, last in NUMBERS[name].items() if number not in fixed}
    plain = copy.deepcopy(loss)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for step in range(4):
        for number, (first, last) in scheduled.items():
            for module in (loss, plain):
                setattr(module, number, first + (last - first) * step / 3)
        torch.manual_seed(step)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            value = compiled(x, y)
        torch.manual_seed(step)
        assert torch.equal(value, plain(x, y))  # the same calls
    assert all(torch.equal(buffer, dict(plain.named_buffers())[key]) for key, buffer in loss.named_buffers())


@pytest.mark.parametrize("name", NUMBERS)
def test_no_cast_changes_a_buffer(name):
    loss = getattr(torchmargin, name)(D, C, **NUMBERS[name])
    before = {key: (buffer.dtype, buffer.clone()) for key, buffer in loss.named_buffers()}
    module = torch.nn.Module
    for cast in (module.half, module.bfloat16, module.float, module.double, lambda m: m.to(torch.float16)):
        cast(torch.nn.Sequential(loss))
        assert {key: buffer.dtype for key, buffer in loss.named_buffers()} == {k: d for k, (d, _) in before.items()}
        assert all(torch.equal(buffer, before[key][1]) for key, buffer in loss.named_buffers())


def test_statistics_move_in_a_bfloat16_module():
    """In bfloat16 steps of a hundredth are rounded away: 20.0 stays 20.0."""
    losses = [torchmargin.AdaFaceLoss(D, C), torchmargin.AdaFaceLoss(D, C).bfloat16()]
    x = torch.ones(4, D, dtype=torch.bfloat16) * torch.tensor([[5.0], [7.0], [8.0], [9.0]], dtype=torch.bfloat16)
    for _ in range(100):
        for loss in losses:
            loss(x.to(loss.weight.dtype), torch.arange(4))
    assert losses[1].length_mean == losses[0].length_mean and losses[0].length_mean > 20.2


@pytest.mark.parametrize("name", NUMBERS)
def test_leaving_the_meta_device(name):
    loss = getattr(torchmargin, name)(D, C, device="meta", **NUMBERS[name])
    assert all(buffer.is_meta for buffer in loss.buffers())
    assert {number: getattr(loss, number) for number in NUMBERS[name]} == NUMBERS[name]
    expected = getattr(torchmargin, name)(D, C, **NUMBERS[name])
    loss.to_empty(device="cpu")
    for key, buffer in expected.named_buffers():
        assert torch.equal(dict(loss.named_buffers())[key], buffer), key
    loss.load_state_dict(expected.state_dict())
    x, y = _batch(torch.float32)
    assert _equal(_results(loss, x, y), _results(expected, x, y))


@pytest.mark.parametrize("name", NUMBERS)
def test_resetting_starts_the_state_again(name):
    loss = getattr(torchmargin, name)(D, C)
    start = {key: buffer.clone() for key, buffer in loss.named_buffers()}
    loss(*_batch(torch.float32))
    loss.reset_parameters()
    assert all(torch.equal(buffer, start[key]) for key, buffer in loss.named_buffers())


class Holder(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.body = torch.nn.Linear(D, D)
        self.loss = getattr(torchmargin, name)(D, C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_model_that_holds_a_loss_can_be_scripted(name):
    model = Holder(name)
    scripted = torch.jit.script(model)
    x = torch.randn(3, D)
    assert torch.equal(scripted(x), model.body(x))
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    assert torch.equal(torch.jit.load(buffer)(x), model.body(x))
    assert type(model.loss) is getattr(torchmargin, name)


# ---- 16-bit networks before float32 weights --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_16_bit_body_before_a_float32_head(name, dtype):
    """Autocast's rule without autocast: widened, and the gradient comes back in 16 bits."""
    loss = getattr(torchmargin, name)(D, C)
    y = torch.arange(12) % C
    narrow = (8 * tf.normalize(torch.randn(12, D))).to(dtype).requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    other = copy.deepcopy(loss)
    assert torch.equal(loss.logits(narrow), other.logits(wide))
    torch.manual_seed(3)
    got = loss(narrow, y)
    torch.manual_seed(3)
    expected = other(wide, y)
    assert torch.equal(got, expected) and got.dtype == torch.float32
    for a, b in zip(
        torch.autograd.grad(got, (narrow, loss.weight)), torch.autograd.grad(expected, (wide, other.weight))
    ):
        assert torch.equal(a, b.to(a.dtype))
    with pytest.raises(RuntimeError, match="to have the dtype of input"):
        loss.double()(narrow, y)


@pytest.mark.parametrize("name", NUMBERS)
def test_what_the_hooks_cannot_read_is_refused_by_the_op(name):
    loss, (x, y) = _make(name), _batch()
    op = f"linear_margin_{'binary_' if name in ('SphereFace2Loss', 'UniFaceLoss') else ''}cross_entropy"
    state = {key: buffer.clone() for key, buffer in loss.named_buffers()}
    for embeddings, labels, text in (
        (x.to("meta"), y, "expected weight on the device of input, meta, but got cpu"),
        (x, y.to("meta"), "expected target on the device of input, cpu, but got meta"),
        (x, y.int(), "expected target to be int64, but got int32"),
        (x[0], y, r"expected input to have shape \[B, D\], but got \[8\]"),
        (x, y[1:], r"expected target to have shape \[12\], but got \[11\]"),
        (x[:, 1:], y, rf"expected weight to have shape \[C, 7\], but got \[{len(loss.weight)}, 8\]"),
    ):
        with pytest.raises(RuntimeError, match=f"^{op}: {text}"):
            loss(embeddings, labels)
    assert len(loss.weight) == C * loss.sub_centers
    assert all(torch.equal(buffer, state[key]) for key, buffer in loss.named_buffers())


# ---- numbers that others put into the buffers ------------------------------------------------------------------------


def _expected(name, **options):
    """The results of a loss made with these numbers: what any other way of giving them must come to."""
    return _results(_make(name, **options), *_batch())


# Every number that the op takes as a float, beside those that it reads from buffers.
FLOATS = [("ArcFaceLoss", "scale"), ("ArcFaceLoss", "margin"), ("CombinedMarginLoss", "m1")]
FLOATS += [(name, number) for name, numbers in OF_THE_OP.items() for number in sorted(numbers)]


@pytest.mark.parametrize(("name", "number"), FLOATS)
@pytest.mark.parametrize("write", ["copy_", "data", "state_dict", "fill_"])
def test_a_number_that_others_write_to_its_buffer_counts_in_training(name, number, write):
    """DistributedDataParallel's constructor and its steps give every rank the buffers of rank 0."""
    value = NUMBERS[name][number]
    loss, expected = _make(name), _expected(name, **{number: value})
    x, y = _batch()
    before = _results(loss, x, y)
    new = torch.tensor(value, dtype=torch.float64)
    if write == "copy_":
        loss.number(number).copy_(new)
    elif write == "data":  # autograd's counter does not see it
        loss.number(number).data.copy_(new)
    elif write == "state_dict":
        loss.state_dict()[number].copy_(new)
    else:
        loss.number(number).fill_(value)
    loss.reset_state()
    after = _results(loss, x, y)
    assert getattr(loss, number) == value and _equal(after, expected) and not _equal(after, before)


def test_where_reading_is_waiting_training_reads_once(monkeypatch):
    """As on a GPU, where each read waits and DistributedDataParallel writes the buffers in every step."""
    monkeypatch.setattr("torchmargin.losses.base._is_at_hand", lambda buffer: False)
    x, y = _batch()
    values = {scale: _make("ArcFaceLoss", scale=scale)(x, y) for scale in (8.0, 10.0, 12.0, 14.0, 16.0)}
    loss = _make("ArcFaceLoss", scale=8.0)
    loss.number("scale").fill_(10.0)
    assert torch.equal(loss(x, y), values[10.0])  # the first call
    loss.number("scale").fill_(12.0)
    assert torch.equal(loss(x, y), values[10.0])
    loss.scale = 14.0
    assert torch.equal(loss(x, y), values[14.0])  # what is set counts at once
    loss.number("scale").fill_(12.0)
    assert torch.equal(loss.train()(x, y), values[12.0])
    lent = {"scale": torch.tensor(16.0, dtype=torch.float64)}
    assert torch.equal(torch.func.functional_call(loss, lent, (x, y)), values[16.0])
    assert torch.equal(loss(x, y), values[12.0])
    stacked = {"scale": lent["scale"].expand(2)}
    torch.vmap(lambda buffers: torch.func.functional_call(loss, buffers, (x, y)))(stacked)
    assert torch.equal(loss(x, y), values[12.0])
    loss.number("scale").fill_(8.0)
    assert torch.equal(loss.double()(x, y), values[8.0])  # a cast
    loss.load_state_dict(_make("ArcFaceLoss", scale=10.0).state_dict())
    assert torch.equal(loss(x, y), values[10.0])
    loss.eval()
    for scale in (12.0, 14.0):  # inference sees every write that autograd's counter sees
        loss.number("scale").fill_(scale)
        assert torch.equal(loss(x, y), values[scale])
        loss.number("scale").data.fill_(8.0)
        assert torch.equal(loss(x, y), values[scale]) and torch.equal(loss.eval()(x, y), values[8.0])
    for writes in range(1, 8):  # a copy's tensors count anew
        other = copy.deepcopy(loss)
        for _ in range(writes):
            other.number("scale").fill_(16.0)
        assert torch.equal(other(x, y), values[16.0]) and torch.equal(loss(x, y), values[8.0])


def test_two_ranks_under_ddp_have_the_numbers_that_rank_0_has_loaded(tmp_path):
    """A checkpoint that rank 0 alone loads before the wrapping: torch's tutorials do it so."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_ddp_rank, args=(rank, str(tmp_path), queue)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    values = dict(queue.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join(timeout=60)
        assert rank.exitcode == 0
    expected = [
        _expected("SphereFace2Loss", scale=10.0, t=2.0)[0].item(),
        _expected("ArcFaceLoss", scale=9.0)[0].item(),
    ]
    assert values == {0: expected, 1: expected}


def _ddp_rank(rank, folder, queue):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, y = _batch()
    values = []
    for name, numbers in (("SphereFace2Loss", {"scale": 10.0, "t": 2.0}), ("ArcFaceLoss", {"scale": 9.0})):
        loss = _make(name, **(numbers if rank == 0 else {}))
        wrapped = torch.nn.parallel.DistributedDataParallel(loss)
        value = wrapped(x, y)
        value.backward()
        values.append(value.item())
    queue.put((rank, values))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("training", [True, False])
def test_functional_call_lends_numbers_and_keeps_its_hands_off(training):
    lent = {"scale": torch.tensor(40.0, dtype=torch.float64), "margin": torch.tensor(0.1, dtype=torch.float64)}
    loss, expected = _make("ArcFaceLoss").train(training), _make("ArcFaceLoss", scale=40.0, margin=0.1)
    x, y = _batch()
    before = loss(x, y)
    assert torch.equal(torch.func.functional_call(loss, lent, (x, y)), expected(x, y))
    assert torch.equal(loss(x, y), before) and torch.equal(loss.logits(x), _make("ArcFaceLoss").logits(x))


def test_a_number_of_the_op_is_one_for_all_and_has_no_gradient():
    x, y = _batch()
    losses = [_make("ArcFaceLoss", scale=scale) for scale in (10.0, 20.0)]
    parameters, buffers = torch.func.stack_module_state(losses)
    call = lambda p, b: torch.func.functional_call(losses[0], (p, b), (x, y))  # noqa: E731
    message = "ArcFaceLoss: expected scale to be one number for all, without a gradient"
    with pytest.raises(RuntimeError, match=message):
        torch.vmap(call)(parameters, buffers)
    same = torch.full((2,), 10.0, dtype=torch.float64)
    found = torch.vmap(call)(parameters, {**buffers, "scale": same})
    torch.testing.assert_close(found, losses[0](x, y).expand(2), rtol=1e-12, atol=0)
    buffers["scale"] = losses[0].number("scale")  # the margins of both are in their buffers
    buffers["margin"] = torch.tensor([0.5, 0.1], dtype=torch.float64)
    found = torch.vmap(call, in_dims=(0, {"scale": None, "margin": 0}))(parameters, buffers)
    expected = [_make("ArcFaceLoss", scale=10.0, margin=margin)(x, y) for margin in (0.5, 0.1)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match=message):
        learned = torch.tensor(40.0, dtype=torch.float64, requires_grad=True)
        torch.func.functional_call(losses[0], {"scale": learned}, (x, y))
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda scale: torch.func.functional_call(losses[0], {"scale": scale}, (x, y)))(learned.detach())


def test_what_is_compiled_or_exported_has_the_numbers_of_the_last_eval():
    from torch.optim.swa_utils import AveragedModel

    torch._dynamo.reset()
    loss = _make("ArcFaceLoss", scale=10.0)
    average = AveragedModel(loss, use_buffers=True)
    for number in (20.0, 40.0):
        loss.scale = number
        average.update_parameters(loss)
    average.eval()
    x, y = _batch()
    expected = _make("ArcFaceLoss", scale=average.module.scale)
    assert average.module.scale > 20
    compiled = torch.compile(average, backend="aot_eager")
    assert torch.equal(compiled(x, y), expected(x, y))
    program = torch.export.export(_Logits(average.module), (x.detach(),))
    assert torch.equal(program.module()(x.detach()), expected.logits(x))


class _Logits(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, x):
        return self.loss.logits(x)


def test_a_replica_of_data_parallel_computes_with_its_copies():
    """What torch.nn.parallel.replicate does with a module for each GPU, on the CPU."""
    for name in ("ArcFaceLoss", "AdaFaceLoss", "SphereFace2Loss"):
        loss, (x, y) = _make(name), _batch()
        expected = _results(copy.deepcopy(loss), x, y)
        replica = loss._replicate_for_data_parallel()
        for key, parameter in loss._parameters.items():
            setattr(replica, key, None if parameter is None else parameter.clone())
        for key, buffer in loss._buffers.items():
            setattr(replica, key, None if buffer is None else buffer.clone())
        value = replica(x, y)
        got = [value.detach(), *torch.autograd.grad(value, (x, loss.weight)), replica.logits(x).detach()]
        assert _equal(got, expected)
        assert not any(each is mine for each in replica.buffers() for mine in loss.buffers())


def test_a_number_set_in_inference_mode_can_be_set_afterwards():
    loss = _make("ArcFaceLoss")
    with torch.inference_mode():
        loss.margin = torch.full((C,), 0.2)
    loss.margin = torch.full((C,), 0.3)
    with torch.inference_mode():
        loss.margin = 0.1
    loss.margin = 0.2
    x, y = _batch()
    assert torch.equal(loss(x, y), _make("ArcFaceLoss", margin=0.2)(x, y))


def test_margins_of_other_classes_than_the_weights_are_refused():
    loss = _make("ArcFaceLoss", margin=torch.full((C,), 0.2))
    loss.weight.data = torch.randn(C + 2, D, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"expected weight to have the rows of 17 classes, which margin has numbers"):
        loss(*_batch())


def test_a_class_attribute_does_not_hide_a_number():
    message = "Hidden: margin is a number of ArcFaceLoss, which a class attribute would hide; give it to super"
    with pytest.raises(TypeError, match=message):

        class Hidden(torchmargin.ArcFaceLoss):
            margin = 0.3


def test_a_number_before_the_constructor_is_refused():
    class Early(torchmargin.ArcFaceLoss):
        def __init__(self):
            self.margin = 0.3
            super().__init__(D, C)

    with pytest.raises(AttributeError, match=r"Early: cannot set margin before super\(\).__init__\(\) is called"):
        Early()


class _Value(_Logits):
    def forward(self, x, y):
        return self.loss(x, y)


def test_a_symbolic_tracer_is_refused():
    """It would call the op with what stands for the embeddings, and without the margin."""
    with pytest.raises(TypeError, match="ArcFaceLoss: expected tensors, but got Proxy and Proxy; a symbolic tracer"):
        torch.fx.symbolic_trace(_Value(_make("ArcFaceLoss")))


@pytest.mark.parametrize("how", ["old weight_norm", "weight_norm", "spectral_norm", "prune"])
@pytest.mark.parametrize("name", ["ArcFaceLoss", "AdaFaceLoss"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_is_computed(name, how):
    from torch.nn.utils import parametrizations, prune, weight_norm

    loss, (x, y) = _make(name), _batch()
    if how == "old weight_norm":
        loss = weight_norm(loss)
    elif how == "prune":
        prune.l1_unstructured(loss, "weight", amount=0.3)
    else:
        getattr(parametrizations, how)(loss)
    loss.eval()
    loss(x, y)  # a hook computes the weight before a call
    expected = _make(name).eval()
    expected.weight = torch.nn.Parameter(loss.weight.detach().clone())
    assert torch.equal(loss(x, y), expected(x, y)) and torch.equal(loss.logits(x), expected.logits(x))
    loss.train()(x, y).backward()
    computed = [parameter for key, parameter in loss.named_parameters() if key != "weight"]
    assert computed and all(parameter.grad is not None for parameter in computed)
    with pytest.raises(RuntimeError, match="expected weight to be a parameter to resize, but it is computed"):
        loss.resize_classes(C + 1)


def test_averages_go_on_when_a_class_weight_is_taken_away_and_given_back():
    from torch.optim.swa_utils import AveragedModel

    loss = _make("CurricularFaceLoss", class_weight=torch.ones(C))
    average = AveragedModel(loss, use_buffers=True)
    average.update_parameters(loss)
    order = [name for name, _ in loss.named_buffers()]
    loss.class_weight = None
    assert "class_weight" not in dict(loss.named_buffers())
    loss.class_weight = torch.full((C,), 2.0)
    assert [name for name, _ in loss.named_buffers()] == order
    average.update_parameters(loss)
    assert average.module.class_weight[0] == 1.5
