"""The ops that read margins from lengths, each against its paper's formula in float64, and at the edges of a batch."""

import math

import pytest
import torch

import torchmargin

from rounding import assert_within, unit_roundoff

ops = torch.ops.torchmargin
IGNORED = -100
NUMBERS = [torch.tensor(number, dtype=torch.float64) for number in (10.0, 110.0, 0.45, 0.8)]  # MagFace's
MEAN, STD, MARGIN, H = (torch.tensor(number, dtype=torch.float64) for number in (20.0, 100.0, 0.4, 0.333))
MOMENTUM = torch.tensor(0.3, dtype=torch.float64)
ALL = ["_embedding_lengths", "_adaface_statistics", "_adaface_margins", "_magface_margins", "_magface_penalty"]


def _rows(rows=7, dtype=torch.float64):
    """Embeddings of lengths from 2 to 140: on both sides of what MagFace and AdaFace hold them within."""
    directions = torch.nn.functional.normalize(torch.randn(rows, 5, dtype=torch.float64))
    return (directions * torch.linspace(2, 140, rows, dtype=torch.float64)[:, None]).to(dtype)


def _arguments(op, x, y):
    lengths = x.norm(dim=1)
    return {
        "_embedding_lengths": (x, y, IGNORED, torch.float64),
        "_adaface_statistics": (lengths, y != IGNORED, MEAN, STD, MOMENTUM),
        "_adaface_margins": (lengths, MEAN, STD, MARGIN, H),
        "_magface_margins": (lengths, *NUMBERS),
        "_magface_penalty": (lengths, *NUMBERS[:2]),
    }[op]


def _tuple(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(
    ("dtype", "acc"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_lengths(dtype, acc):
    x, y = _rows(8, dtype), torch.arange(8)
    x[1, 2], x[3, 0], x[5, 4] = math.nan, math.inf, -math.inf
    y[4] = y[5] = IGNORED
    lengths, counted = ops._embedding_lengths(x, y, IGNORED, acc)
    assert counted.tolist() == [True, False, True, False, False, False, True, True] and lengths.dtype == acc
    assert lengths.isnan().tolist() == [False, True, False, True, False, False, False, False]
    assert lengths.isfinite()[y == IGNORED].all()
    for row in (0, 2, 6, 7):  # a square and four sums round, half as much in the root, and the root: 3.5 u; hypot: 1
        true = math.hypot(*x[row].tolist())
        assert lengths[row].item() == pytest.approx(true, rel=4.5 * torch.finfo(acc).eps / 2, abs=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_only_rows_that_count_have_a_gradient(value):
    x, y = _rows(), torch.arange(7)
    x[2, 1] = value
    y[4], x[4, 0] = IGNORED, value
    x.requires_grad_()
    lengths, _ = ops._embedding_lengths(x, y, IGNORED, torch.float64)
    upstream = torch.ones(7, dtype=torch.float64)
    upstream[[2, 4]] = 0.0
    (grad,) = torch.autograd.grad(lengths, x, upstream)
    assert grad[[2, 4]].abs().max() == 0
    rows = [0, 1, 3, 5, 6]
    true = torch.nn.functional.normalize(x.detach()[rows])
    assert_within(grad[rows], true, 2 * (3.5 + 1) * 2.0**-53 * true.abs())  # a length and a quotient, on both sides


def test_a_length_beyond_the_dtype_is_infinite():
    lengths, counted = ops._embedding_lengths(torch.full((2, 5), 3e38), torch.arange(2), IGNORED, torch.float32)
    assert counted.all() and lengths.isinf().all()  # finite rows
    wide, _ = ops._embedding_lengths(torch.full((2, 5), 3e38), torch.arange(2), IGNORED, torch.float64)
    assert wide.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adaface_statistics(dtype):
    """Written with Python's floats."""
    lengths = torch.tensor([2.0, math.nan, 30.0, 140.0, math.inf, 7.5, 1e-5], dtype=dtype)
    counted = torch.tensor([True, False, True, True, True, False, True])
    held = [2.0, 30.0, 100.0, 0.001]  # the rows that count and are of finite length, within [0.001, 100]
    mean = sum(held) / 4
    std = math.sqrt(sum((length - mean) ** 2 for length in held) / 3)
    got = ops._adaface_statistics(lengths, counted, MEAN.to(dtype), STD.to(dtype), MOMENTUM)
    for new, old, of_batch in zip(got, (20.0, 100.0), (mean, std)):
        assert new.dtype == dtype and new.dim() == 0
        # Numbers of at most 100. A mean of four has 5 u of that (a hold, 3 sums, a quotient), a difference to it 6 u,
        # their root mean square (over three) 7 u and 4 of its own. Of that 0.3, and a cast and four of lerp's.
        bound = (0.3 * (7 + 4) + 5) * 100 * unit_roundoff(dtype)
        assert new.item() == pytest.approx(0.7 * old + 0.3 * of_batch, abs=bound)
    assert MEAN == 20.0 and STD == 100.0  # nothing is written in place


@pytest.mark.parametrize("rows", [0, 1, 4])
@pytest.mark.parametrize("valid", [0, 1])
def test_statistics_of_fewer_than_two_rows_stay(rows, valid):
    counted = torch.arange(rows) < valid
    lengths = torch.full((rows,), math.nan, dtype=torch.float64)
    lengths[:valid] = 5.0
    mean, std = ops._adaface_statistics(lengths, counted, MEAN, STD, MOMENTUM)
    assert mean == 20.0 and std == 100.0


def test_adaface_margins():
    lengths = torch.tensor([0.0, 2.0, 20.0, 140.0, math.nan, 60.0], dtype=torch.float64, requires_grad=True)
    mean, std = torch.tensor(20.0), torch.tensor(10.0)  # float32, as the buffers are
    m2, m3 = ops._adaface_margins(lengths, mean, std, MARGIN, H)
    for length, angle, cosine in zip(lengths.tolist(), m2.tolist(), m3.tolist()):
        if math.isnan(length):
            assert math.isnan(angle) and math.isnan(cosine)
            continue
        held = min(max(length, 0.001), 100.0)
        quality = min(max((held - 20.0) / (std + 1e-3).item() * 0.333, -1.0), 1.0)  # added in float32
        # A difference, a quotient and two products, and a sum, of numbers of at most 0.8; both sides.
        assert (angle, cosine) == pytest.approx((-0.4 * quality, 0.4 + 0.4 * quality), abs=2 * 5 * 0.8 * 2**-53)
    assert not m2.requires_grad and not m3.requires_grad


def test_adaface_has_no_tangent_through_the_length():
    """no_grad would let one through: forward-mode AD does not ask it."""
    lengths = _rows().norm(dim=1)
    margins = lambda lengths: ops._adaface_margins(lengths, MEAN, STD, MARGIN, H)
    _, tangents = torch.func.jvp(margins, (lengths,), (torch.ones_like(lengths),))
    assert all(tangent.abs().max() == 0 for tangent in tangents)


def _magface(length):
    held = min(max(length, 10.0), 110.0)
    return 0.45 + (0.8 - 0.45) / 100.0 * (held - 10.0), 1 / held + held / 110.0**2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_magface(dtype):
    lengths = torch.tensor([0.0, 2.0, 10.0, 33.3, 110.0, 140.0, math.inf, math.nan], dtype=dtype)
    margins, penalty = ops._magface_margins(lengths, *NUMBERS), ops._magface_penalty(lengths, *NUMBERS[:2])
    assert margins.dtype == penalty.dtype == dtype
    for length, margin, row in zip(lengths.tolist()[:-1], margins.tolist(), penalty.tolist()):
        # Sums of positive terms, each cast once (in float32) and rounded three times with the sum.
        assert (margin, row) == pytest.approx(_magface(length), rel=4 * unit_roundoff(dtype), abs=0)
    assert margins[-1].isnan() and penalty[-1].isnan()


def test_magfaces_gradients():
    """By finite differences, to any order, with lengths outside [10, 110] among them; and through the embeddings."""
    y = torch.arange(7)
    y[3] = IGNORED
    x = _rows().requires_grad_()
    lengths = x.detach().norm(dim=1).requires_grad_()

    def of_rows(x):
        lengths = ops._embedding_lengths(x, y, IGNORED, torch.float64)[0]
        return ops._magface_margins(lengths, *NUMBERS), ops._magface_penalty(lengths, *NUMBERS[:2])

    for function, leaf in (
        (lambda lengths: ops._magface_margins(lengths, *NUMBERS), lengths),
        (lambda lengths: ops._magface_penalty(lengths, *NUMBERS[:2]), lengths),
        (of_rows, x),
    ):
        assert torch.autograd.gradcheck(function, leaf, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, leaf)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("op", ALL)
def test_a_batch_of_none_and_of_one(op, rows):
    x, y = _rows(rows), torch.arange(rows)
    results = _tuple(getattr(ops, op)(*_arguments(op, x, y)))
    assert all(result.shape in ((rows,), ()) for result in results)
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("op", ALL)
def test_opcheck(op):
    x, y = _rows(), torch.arange(7)
    y[2] = IGNORED
    arguments = _arguments(op, x, y)
    torch.library.opcheck(getattr(ops, op).default, arguments)
    leaves = [
        a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) and a.dim() and a.is_floating_point() else a
        for a in arguments
    ]
    torch.library.opcheck(getattr(ops, op).default, tuple(leaves))


@pytest.mark.parametrize("op", ALL)
def test_meta_vmap_and_export(op):
    x, y = _rows(), torch.arange(7)
    arguments = _arguments(op, x, y)
    expected = _tuple(getattr(ops, op)(*arguments))
    of_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    for got, true in zip(_tuple(getattr(ops, op)(*of_meta)), expected):
        assert got.is_meta and got.shape == true.shape and got.dtype == true.dtype
    batches = [torch.stack([a, a]) if isinstance(a, torch.Tensor) and a.dim() else a for a in arguments]
    in_dims = tuple(0 if isinstance(a, torch.Tensor) and a.dim() else None for a in arguments)
    for got, true in zip(_tuple(torch.vmap(getattr(ops, op), in_dims)(*batches)), expected):
        assert torch.equal(got, torch.stack([true, true]))

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            given = iter(tensors)
            return getattr(ops, op)(*[next(given) if isinstance(a, torch.Tensor) else a for a in arguments])

    tensors = tuple(a for a in arguments if isinstance(a, torch.Tensor))
    rows = torch.export.Dim("rows", min=2)
    shapes = (tuple({0: rows} if a.dim() else {} for a in tensors),)
    exported = torch.export.export(Module(), tensors, dynamic_shapes=shapes).module()
    x, y = _rows(5), torch.arange(5)
    others = _arguments(op, x, y)
    given = [a for a in others if isinstance(a, torch.Tensor)]
    for got, true in zip(_tuple(exported(*given)), _tuple(getattr(ops, op)(*others))):
        assert torch.equal(got, true)


@pytest.mark.parametrize("op", ALL)
def test_compiled_for_any_number_of_rows(op):
    torch.compiler.reset()
    compiled = torch.compile(getattr(ops, op), backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (7, 4):
        x, y = _rows(rows), torch.arange(rows)
        arguments = _arguments(op, x, y)
        for got, true in zip(_tuple(compiled(*arguments)), _tuple(getattr(ops, op)(*arguments))):
            assert torch.equal(got, true)


def test_under_autocast_lengths_are_as_wide_as_asked():
    x, y = _rows(dtype=torch.bfloat16), torch.arange(7)
    expected = ops._embedding_lengths(x, y, IGNORED, torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        lengths = ops._embedding_lengths(x, y, IGNORED, torch.float32)[0]
        results = [*ops._adaface_margins(lengths, MEAN, STD, MARGIN, H), ops._magface_margins(lengths, *NUMBERS)]
    assert torch.equal(lengths, expected) and all(result.dtype == torch.float32 for result in results)


@pytest.mark.parametrize(("x", "y"), [((3,), (3,)), ((3, 5), (1,)), ((3, 5), (3, 1))])
def test_bad_shapes_are_named(x, y):
    with pytest.raises(RuntimeError, match=r"_embedding_lengths: expected embeddings to have shape \[B, D\] and"):
        ops._embedding_lengths(torch.zeros(x), torch.zeros(y, dtype=torch.int64), IGNORED, torch.float32)


class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    """How often lengths are taken."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.linalg_vector_norm.default
        return function(*args, **(kwargs or {}))


def _counted(call):
    with Counter() as counter, torch.no_grad():
        call()
    return counter.count


class Again(torchmargin.AdaFaceLoss):
    """Hooks that run a forward of another batch inside."""

    other = None

    def sample_margins(self, embeddings, labels):
        if self.other is not None:
            other, self.other = self.other, None
            self(*other)
            self.other = other
        return super().sample_margins(embeddings, labels)


def test_adaface_takes_the_lengths_of_a_training_forward_once():
    loss, x, y = torchmargin.AdaFaceLoss(5, 9), _rows(dtype=torch.float32), torch.arange(7)
    assert _counted(lambda: loss(x, y)) == 1
    assert _counted(lambda: loss.eval()(x, y)) == 1
    loss.train()
    # The hooks by themselves share nothing: the batch may have changed between them.
    assert _counted(lambda: (loss.advance(x, y), loss.sample_margins(x, y))) == 2
    y[3] = 9
    with pytest.raises(IndexError):
        loss(x, y)
    assert loss._batch is None
    y[3] = 0
    assert _counted(lambda: loss.sample_margins(x, y)) == 1


def test_a_forward_inside_a_forward():
    """The inner one has its own lengths, and the outer one does not take them for its own."""
    torch.manual_seed(1)
    loss, plain = Again(5, 9, momentum=0.5), torchmargin.AdaFaceLoss(5, 9, momentum=0.5)
    plain.load_state_dict(loss.state_dict())
    x, y = _rows(dtype=torch.float32), torch.arange(7)
    expected = plain.eval()(x, y)
    loss.eval()
    loss.other = (3 * x, y)
    assert torch.equal(loss(x, y), expected) and loss._batch is None
