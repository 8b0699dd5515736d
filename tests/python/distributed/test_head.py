"""ClassParallel: on each rank what the loss of one process finds for all rows and classes."""

import copy
import functools

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import torchmargin
from torchmargin.distributed import ClassParallel

from ranks import on, share
from rounding import LinearRounding, assert_within

C, D = 13, 8
BATCHES = {1: [7], 2: [5, 2], 3: [5, 0, 2], 4: [1, 3, 0, 3]}
MERGED = 2  # test_class_parallel.py
CLASS_MARGINS = torch.linspace(0.1, 0.4, C, dtype=torch.float64)
CLASS_WEIGHTS = torch.linspace(0.0, 2.0, C)


def _linear(name, **options):
    return functools.partial(getattr(torchmargin, name), D, **options)


LOSSES = {
    "ArcFace": _linear("ArcFaceLoss", label_smoothing=0.1),
    "CosFace of classes": lambda classes, **common: torchmargin.CosFaceLoss(
        D, classes, margin=CLASS_MARGINS[:classes], **common
    ),
    "Softmax": _linear("SoftmaxLoss", bias=True, label_smoothing=0.2),
    "SphereFace": _linear("SphereFaceLoss", reduction="sum"),
    "AdaFace": _linear("AdaFaceLoss", momentum=0.3, reduction="none"),
    "MagFace": _linear("MagFaceLoss", a_max=40.0),
    "MagFace weighted": lambda classes, **common: torchmargin.MagFaceLoss(
        D, classes, a_max=40.0, class_weight=CLASS_WEIGHTS[:classes], **common
    ),
    "CosFace weighted": lambda classes, **common: torchmargin.CosFaceLoss(
        D, classes, reduction="sum", class_weight=CLASS_WEIGHTS[:classes], **common
    ),
    "own": lambda classes, **common: Own(D, classes, scale=16.0, **common),
}


class Own(torchmargin.MarginLoss):
    """All three hooks, with gradients through two of them."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.register_buffer("steps", torch.tensor(0.0, dtype=torch.float64, device=self.weight.device))

    def advance(self, embeddings, labels):
        self.steps.add_(1.0)

    def sample_margins(self, embeddings, labels):
        of_row = 0.01 * embeddings.norm(dim=1) * (1 + self.steps.clone())
        return {"sample_m3": of_row, "sample_margin_weight": (0.5 + 0.1 * labels.remainder(5)).to(self.acc_dtype)}

    def row_penalty(self, embeddings, labels):
        return 0.01 * embeddings.square().sum(1) * (1 + self.steps.clone())


def make(name, classes=C, dtype=torch.float64):
    torch.manual_seed(1)
    loss = LOSSES[name](classes, dtype=dtype)
    if loss.bias is not None:
        torch.nn.init.uniform_(loss.bias)
    return loss


def batch(classes=C, rows=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    x = 8 * torch.randn(rows, D, dtype=torch.float64, generator=generator)
    y = torch.randint(0, classes, (rows,), generator=generator)
    y[1:2] = -100
    return x.to(dtype), y


def steps(rank, world, name, x, y, counts, classes=C, statistics=False, upstream=None, calls=2, **options):
    """Of each of two calls value, statistics, gradients of x and of the weights and biases, and the loss's state."""
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(rank)
    loss = make(name, classes)
    if rank > 0:
        torch.nn.init.zeros_(loss.weight)  # rank 0's weights count
    head = ClassParallel(loss, mesh, **{"input_grad_scale": 1.0, **options})
    found = []
    for _ in range(calls):
        leaf = share(rank, counts, x).clone().requires_grad_()
        result = head(leaf, share(rank, counts, y), return_statistics=statistics)
        value, means = result if statistics else (result, ())
        head.zero_grad()
        value.backward(None if upstream is None else share(rank, counts, upstream))
        of_lists = [blocks for blocks in (head.weight, head.bias) if blocks is not None]
        whole = [torch.cat([block.grad.full_tensor() for block in blocks]) for blocks in of_lists]
        state = {key: number.clone() for key, number in loss.state_dict().items()}
        found.append((value.detach(), [mean.clone() for mean in means], leaf.grad, whole, state))
    return found


def of_one(name, x, y, classes=C, statistics=False, upstream=None, calls=2):
    loss, found = make(name, classes), []
    for _ in range(calls):
        leaf = x.clone().requires_grad_()
        result = loss(leaf, y, return_statistics=statistics)
        value, means = result if statistics else (result, ())
        loss.zero_grad()
        value.backward(upstream)
        state = {key: number.clone() for key, number in loss.state_dict().items() if key not in ("weight", "bias")}
        whole = [parameter.grad for parameter in loss.parameters()]
        found.append((value.detach(), list(means), leaf.grad, whole, state))
    return found


def rounding(name, x, y, classes=C):
    """Bounds of value and gradients. Margins by row stand for the largest; what a hook adds to a row's gradient is of
    the same order, and its few roundings are counted as another margin."""
    loss = make(name, classes)
    psi = {"m1": 4.0} if name == "SphereFace" else {"m2": 0.8, "m3": 2.0}
    lengths = {"normalize_input": loss.normalize_input, "normalize_weight": loss.normalize_weight}
    r = LinearRounding(x, loss.weight, y, loss.bias, scale=loss.scale, **psi, **lengths)
    valid = (y != -100).double()
    counts = valid if loss.class_weight is None else loss._row_weights(y)
    rows = counts / counts.sum() if loss.reduction == "mean" else counts
    # A sum of weighted rows is at most the largest weight times the sum of all.
    divisor = {"mean": counts.sum(), "sum": 1.0, "none": None}[loss.reduction]
    divisor = divisor if divisor is None else divisor / counts.max()
    x_bound, w_bound, b_bound = r.loss_gradients(rows, loss.label_smoothing)
    penalised = name in ("MagFace", "MagFace weighted", "own")
    margins = r.sample_gradients(rows)[:, None] if penalised else 0.0
    penalty = 64 * torch.finfo(x.dtype).eps * x.norm(dim=1).max() if penalised else 0.0
    return [
        MERGED * each for each in (r.loss(loss.label_smoothing, divisor) + penalty, x_bound + margins + penalty)
    ] + [[MERGED * w_bound, MERGED * b_bound]]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("world, blocks, max_rows", [(1, 3, None), (2, 1, None), (3, 3, 6), (4, 2, None)])
def test_every_loss_is_that_of_one_process(name, world, blocks, max_rows):
    """Twice, for the state that moves."""
    x, y = batch()
    upstream = torch.linspace(0.5, 1, 7, dtype=torch.float64) if name == "AdaFace" else None
    expected = of_one(name, x, y, upstream=upstream)
    ranks = on(
        world, _steps, (name, x, y, BATCHES[world]), {"blocks": blocks, "max_rows": max_rows, "upstream": upstream}
    )
    for k, (value, _, grad, whole, state) in enumerate(expected):
        of_value, of_x, of_whole = rounding(name, x, y)
        if value.dim() == 0:
            assert all(torch.equal(rank[k][0], ranks[0][k][0]) for rank in ranks)
            assert_within(ranks[0][k][0], value, of_value, "value")
        else:
            assert_within(torch.cat([rank[k][0] for rank in ranks]), value, of_value, "value")
        assert_within(torch.cat([rank[k][2] for rank in ranks]), grad, of_x.expand_as(grad), "x")
        for rank in ranks:
            for found, gradient, bound in zip(rank[k][3], whole, of_whole):
                assert_within(found, gradient, bound.expand_as(gradient), "weights")
            assert rank[k][4].keys() == state.keys()
            for key, number in state.items():
                torch.testing.assert_close(rank[k][4][key], number, rtol=1e-6, atol=0)  # float32 buffers of sums


def _steps(rank, world, arguments, options):
    return steps(rank, world, *arguments, **options)


@pytest.mark.parametrize("name", ["ArcFace", "Softmax", "AdaFace"])
def test_statistics_are_means_over_the_rows_of_all_ranks(name):
    x, y = batch()
    upstream = torch.ones(7, dtype=torch.float64) if name == "AdaFace" else None
    (_, expected, *_), _ = of_one(name, x, y, statistics=True, upstream=upstream)
    for blocks in (1, 3):
        options = {"blocks": blocks, "statistics": True, "upstream": upstream}
        for (_, means, *_), _ in on(3, _steps, (name, x, y, BATCHES[3]), options):
            # An angle and a logit round as in one process, and a mean of seven once more.
            torch.testing.assert_close(means, expected, rtol=1e-13, atol=0)


def test_fewer_classes_than_ranks():
    for classes in (1, 2):
        x, y = batch(classes)
        expected = of_one("ArcFace", x, y, classes)
        for blocks in range(1, classes + 1):
            ranks = on(3, _steps, ("ArcFace", x, y, BATCHES[3]), {"classes": classes, "blocks": blocks})
            of_value, of_x, (of_weight, _) = rounding("ArcFace", x, y, classes)
            for k, (value, _, grad, whole, _) in enumerate(expected):
                assert_within(ranks[0][k][0], value, of_value)
                assert_within(torch.cat([rank[k][2] for rank in ranks]), grad, of_x.expand_as(grad))
                assert_within(ranks[2][k][3][0], whole[0], of_weight.expand_as(whole[0]))


@pytest.mark.parametrize("name", ["ArcFace", "MagFace", "own"])
def test_all_gradients_of_embeddings_are_scaled(name):
    """Those of margins and of penalties too: what averages over the ranks afterwards averages them all. By default by
    the number of ranks."""
    x, y = batch()
    one, three, usual = (
        on(3, _steps, (name, x, y, BATCHES[3]), {"input_grad_scale": scale}) for scale in (1.0, 3.0, None)
    )
    for plain, scaled, default in zip(one, three, usual):
        for k in range(2):
            assert torch.equal(plain[k][0], scaled[k][0]) and torch.equal(plain[k][3][0], scaled[k][3][0])
            torch.testing.assert_close(scaled[k][2], 3 * plain[k][2], rtol=1e-14, atol=1e-17)
            assert torch.equal(scaled[k][2], default[k][2])


def inference(rank, world, x, counts, dtype=None, tied=False, blocks=3):
    loss = make("Softmax", dtype=torch.float64 if dtype is None else dtype)
    if tied:
        with torch.no_grad():
            loss.weight[7:] = loss.weight[0]
            loss.bias[7:] = loss.bias[0]
    expected = copy.deepcopy(loss).logits(x)
    head = ClassParallel(loss, init_device_mesh("cpu", (world,)), blocks=blocks)
    own = share(rank, counts, x)
    return head.logits(own), head.top1(own), share(rank, counts, expected.detach())


@pytest.mark.parametrize("counts", [[7], [5, 2], [5, 0, 2], [0, 0, 0]])
def test_logits_and_top1(counts):
    """logits are those of one process; top1 is their largest, of equal ones the first."""
    x, _ = batch(rows=sum(counts))
    for dtype in (torch.float64, torch.float32):
        for tied in (False, True):
            for own, (largest, classes), expected in on(len(counts), inference, x.to(dtype), counts, dtype, tied):
                assert own.dtype == expected.dtype == largest.dtype and classes.dtype == torch.int64
                torch.testing.assert_close(own, expected, rtol=0, atol=100 * torch.finfo(dtype).eps)
                assert torch.equal(largest, own.amax(1) if len(own) else own.sum(1))
                first = (own == largest[:, None]).int().argmax(1) if len(own) else classes
                assert torch.equal(classes, first)


def test_top1_of_a_row_that_is_not_finite():
    """As torch.max: NaN is the largest."""
    x, _ = batch()
    x[2] = torch.nan
    for _rank, (own, (largest, classes), _) in enumerate(on(3, inference, x, BATCHES[3])):
        value, place = own.max(1) if len(own) else (largest, classes)
        assert torch.equal(classes, place)
        torch.testing.assert_close(largest, value, rtol=0, atol=0, equal_nan=True)


def narrow(rank, world, way):
    """float32 weights: 16-bit rows, autocast, and both; head and loss of one process in the same precision."""
    loss = make("MagFace", dtype=torch.float32)
    one, head = copy.deepcopy(loss), ClassParallel(loss, init_device_mesh("cpu", (world,)), input_grad_scale=1.0)
    x, y = batch(dtype=torch.float32 if way == "autocast" else torch.bfloat16)
    counts = BATCHES[world]
    found = []
    for module, rows, labels in ((head, share(rank, counts, x), share(rank, counts, y)), (one, x, y)):
        leaf = rows.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way != "rows"):
            value = module(leaf, labels)
        value.backward()
        found.append((value.detach(), leaf.grad))
    weight = torch.cat([block.grad.full_tensor() for block in head.weight])
    return *found[0], weight, found[1][0], share(rank, counts, found[1][1]), one.weight.grad


@pytest.mark.parametrize("way", ["rows", "autocast", "both"])
def test_sixteen_bits(way):
    """The products are bfloat16 as in one process; what differs is the order in which float32 products are added."""
    for value, grad, weight, expected, grad_expected, weight_expected in on(3, narrow, way):
        assert value.dtype == torch.float32 and grad.dtype == grad_expected.dtype and weight.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
        # Of a 16-bit leaf both are rounded once more; softmax weights are bfloat16 factors of products.
        torch.testing.assert_close(
            grad, grad_expected, rtol=2**-6, atol=2**-7 * grad_expected.abs().max().item() if len(grad) else 0
        )
        torch.testing.assert_close(weight, weight_expected, rtol=2**-6, atol=2**-7 * weight_expected.abs().max().item())


def moved(rank, world):
    """A head that is cast after it was made is a head in that dtype."""
    head = ClassParallel(make("Softmax"), init_device_mesh("cpu", (world,)), blocks=2).float()
    x, y = batch(dtype=torch.float32)
    value = head(share(rank, BATCHES[world], x), share(rank, BATCHES[world], y))
    value.backward()
    (added,) = head.append_classes(2)[:1]
    dtypes = {block.dtype for block in [*head.weight, *head.bias, added, head.weight[0].grad]}
    head.double()
    return value.detach(), dtypes, head.logits(share(rank, BATCHES[world], x.double())).dtype


def test_a_head_is_cast_as_any_module():
    x, y = batch(dtype=torch.float32)
    expected = make("Softmax").float()(x, y)
    for value, dtypes, of_logits in on(3, moved):
        assert dtypes == {torch.float32} and of_logits == torch.float64
        torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=0)


def modes(rank, world):
    """No gradients, and a second backward of a graph that was kept."""
    head = ClassParallel(make("ArcFace"), init_device_mesh("cpu", (world,)), blocks=2)
    x, y = (share(rank, BATCHES[world], each) for each in batch())
    with torch.no_grad():
        plain = head(x.requires_grad_(), y)
    value = head(x, y)
    first = torch.autograd.grad(value, [x, *head.parameters()], retain_graph=True)
    second = torch.autograd.grad(value, [x, *head.parameters()])
    frozen = head(x.detach(), y)
    frozen.backward()
    equal = [
        torch.equal(a, b)
        for a, b in zip(
            [first[0], *(g.to_local() for g in first[1:])], [second[0], *(g.to_local() for g in second[1:])]
        )
    ]
    grads = [torch.equal(block.grad.to_local(), g.to_local()) for block, g in zip(head.parameters(), first[1:])]
    return plain.requires_grad, torch.equal(plain, value), torch.equal(plain, frozen), equal, grads


def test_no_grad_and_graphs_that_are_kept():
    for needs, same, _frozen, equal, _grads in on(3, modes):
        assert not needs and same and all(equal)


def submesh(rank, world, x, y):
    """Two groups of two ranks, each of which holds all classes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "classes"))
    loss = make("ArcFace")
    with pytest.raises(ValueError, match="expected a mesh of one dimension"):
        ClassParallel(copy.deepcopy(loss), mesh)
    head = ClassParallel(loss, mesh["classes"], input_grad_scale=1.0)
    replica, place = divmod(rank, 2)
    x, y = (share(place, [4, 3], each.roll(replica, 0)) for each in (x, y))
    leaf = x.clone().requires_grad_()
    value = head(leaf, y)
    value.backward()
    return value.detach(), leaf.grad


def test_one_dimension_of_a_larger_mesh():
    x, y = batch()
    ranks = on(4, submesh, x, y)
    for replica in (0, 1):
        ((value, _, grad, *_),) = of_one("ArcFace", x.roll(replica, 0), y.roll(replica, 0), calls=1)
        of_value, of_x, _ = rounding("ArcFace", x.roll(replica, 0), y.roll(replica, 0))
        assert_within(ranks[2 * replica][0], value, of_value)
        assert_within(torch.cat([ranks[2 * replica + k][1] for k in (0, 1)]), grad, of_x.expand_as(grad))
