"""Losses that change the logits of other classes, have several centers, or are one against all, over ranks: what one
process finds with all classes and all rows. How far two runs in float64 may lie apart is measured on the one process
(rounding.monte_carlo); a merge of shards adds another log-sum-exp of no more terms."""

import copy
import functools
import math
import pickle

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import torchmargin
from torchmargin import functional as F
from torchmargin.distributed import (
    ClassParallel,
    ClassSampler,
    attach_row_optimizer,
    class_parallel_binary_cross_entropy,
    class_parallel_cross_entropy,
    export_weight,
    import_weight,
    step_in_backward,
)

from ranks import alone, on, outcomes, share
from rounding import assert_within, monte_carlo

C, D = 13, 8
BATCHES = {1: [7], 2: [5, 2], 3: [5, 0, 2], 4: [1, 3, 0, 3]}
MERGED = 2
FLUSHED = math.exp(-50)  # softmax weights below it are 0: of one process those of its rows, of a shard those of its own


class Own(torchmargin.MarginLoss):
    """A loss of somebody's own: coefficients by row, thresholds left to the op, and no reading of angles."""

    def sample_margins(self, embeddings, labels):
        return {"sample_m3": 0.02 * labels.remainder(5).to(self.acc_dtype)}

    def negatives(self, embeddings, labels):
        a = 0.1 * labels.remainder(3).double()
        return {"hard_coefficients": torch.stack([a, 1 + a, 0.1 + a], 1)}


LOSSES = {
    "SubCenterArcFace": (torchmargin.SubCenterArcFaceLoss, {"label_smoothing": 0.1}),
    "CurricularFace": (torchmargin.CurricularFaceLoss, {"momentum": 0.3, "label_smoothing": 0.1}),
    "CurricularFace with centers": (torchmargin.CurricularFaceLoss, {"momentum": 0.3, "sub_centers": 2}),
    "MVSoftmax am": (torchmargin.MVSoftmaxLoss, {"reduction": "sum"}),
    "MVSoftmax arc": (torchmargin.MVSoftmaxLoss, {"kind": "arc", "margin": 0.5, "sub_centers": 3}),
    "InterTopK": (torchmargin.InterTopKArcFaceLoss, {"label_smoothing": 0.1}),
    "InterTopK of more than there are": (torchmargin.InterTopKArcFaceLoss, {"hardest": 20, "reduction": "none"}),
    "InterTopK without its margin": (torchmargin.InterTopKArcFaceLoss, {"hardest_margin": 0.0, "sub_centers": 1}),
    "filter": (torchmargin.ArcFaceLoss, {"interclass_filter": 0.2}),
    "SphereFace2": (torchmargin.SphereFace2Loss, {}),
    "SphereFace2 weighted": (torchmargin.SphereFace2Loss, {"class_weight": torch.linspace(0.0, 2.0, C)}),
    "SphereFace2 a": (torchmargin.SphereFace2Loss, {"kind": "a", "sub_centers": 2, "reduction": "sum"}),
    "UniFace": (torchmargin.UniFaceLoss, {"reduction": "none"}),
    "own": (Own, {"scale": 16.0, "m2": 0.2}),
}


def make(name, dtype=torch.float64, **options):
    torch.manual_seed(1)
    kind, given = LOSSES[name]
    loss = kind(D, C, dtype=dtype, **{**given, **options})
    if loss.bias is not None:
        torch.nn.init.constant_(loss.bias, 0.3)
    return loss


def batch(rows=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    x = 8 * torch.randn(rows, D, dtype=torch.float64, generator=generator)
    y = torch.randint(0, C, (rows,), generator=generator)
    y[1:2] = -100
    return x.to(dtype), y


def _whole(head):
    return torch.cat([block.full_tensor() for block in head.weight]).reshape(head.loss.weight.shape)


def _whole_gradient(head):
    gradients = [block.grad.full_tensor() for block in head.weight]
    return torch.cat(gradients).reshape(head.loss.weight.shape)


def steps(rank, world, name, counts, upstream, **options):
    """Two calls: value, statistics, gradients of x, of the weights and of the bias, and the loss's buffers."""
    head = ClassParallel(make(name), init_device_mesh("cpu", (world,)), input_grad_scale=1.0, **options)
    x, y = (share(rank, counts, each) for each in batch())
    found = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        value, means = head(leaf, y, return_statistics=True)
        head.zero_grad()
        value.backward(None if value.dim() == 0 else share(rank, counts, upstream))
        bias = head.shared_bias.grad.full_tensor() if head.shared_bias is not None else None
        state = {key: buffer.clone() for key, buffer in head.loss.named_buffers()}
        found.append((value.detach(), list(means), leaf.grad, _whole_gradient(head), bias, state))
    return found


def of_one(name, upstream):
    """The same of one process, with bounds of value, x, weights and bias."""
    loss, (x, y) = make(name), batch()
    found = []
    for _ in range(2):
        before = copy.deepcopy(loss)

        def run(before=before):
            one, leaf = copy.deepcopy(before), x.clone().requires_grad_()
            value, means = one(leaf, y, return_statistics=True)
            value.backward(None if value.dim() == 0 else upstream)
            bias = [] if one.bias is None else [one.bias.grad]
            return [value.detach(), leaf.grad, one.weight.grad, *bias]

        values, bounds = monte_carlo(run)
        _, means = loss(x, y, return_statistics=True)
        found.append((values, bounds, list(means), {key: b.clone() for key, b in loss.named_buffers()}))
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_that_of_one_process(name):
    """Twice, for the state that moves; empty ranks, blocks, a bound on the rows."""
    upstream = torch.linspace(0.5, 1, 7, dtype=torch.float64)
    expected = of_one(name, upstream)
    for world, options in ((1, {"blocks": 3}), (2, {}), (3, {"blocks": 3, "max_rows": 6}), (4, {"blocks": 2})):
        ranks = on(world, _steps, (name, BATCHES[world], upstream), options)
        for k, (values, bounds, means, state) in enumerate(expected):
            value = torch.cat([rank[k][0] for rank in ranks]) if values[0].dim() else ranks[0][k][0]
            if not values[0].dim():
                assert all(torch.equal(rank[k][0], value) for rank in ranks)
            found = [value, torch.cat([rank[k][2] for rank in ranks]), ranks[0][k][3]]
            found += [] if ranks[0][k][4] is None else [ranks[0][k][4]]
            assert len(found) == len(values)
            for what, here, there, bound in zip(("value", "x", "weights", "bias"), found, values, bounds):
                assert_within(here, there, MERGED * bound + FLUSHED * there.abs().max(), what)
            for rank in ranks:
                torch.testing.assert_close(rank[k][1], means, rtol=1e-13, atol=0)
                for key, number in state.items():
                    torch.testing.assert_close(rank[k][5][key], number, rtol=1e-6, atol=0)


def _steps(rank, world, arguments, options):
    return steps(rank, world, *arguments, **options)


def _inference(rank, world, name):
    loss = make(name)
    x = share(rank, BATCHES[world], batch()[0])
    expected = copy.deepcopy(loss).logits(x).detach()
    head = ClassParallel(loss, init_device_mesh("cpu", (world,)), blocks=3)
    return head.logits(x), head.top1(x), expected


@pytest.mark.parametrize("name", ["SubCenterArcFace", "InterTopK", "CurricularFace", "SphereFace2", "SphereFace2 a"])
def test_logits_and_top1(name):
    for own, (largest, classes), expected in on(3, _inference, name):
        assert own.shape == expected.shape == (len(expected), C)
        torch.testing.assert_close(own, expected, rtol=1e-13, atol=1e-13)
        if len(own):
            assert torch.equal(largest, own.amax(1)) and torch.equal(classes, own.argmax(1))


@pytest.mark.parametrize("name", ["SubCenterArcFace", "InterTopK", "SphereFace2"])
def test_a_head_is_copied_and_pickled(name):
    x, y = batch()
    with alone() as mesh:
        head = ClassParallel(make(name), mesh, blocks=2)
        for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
            assert torch.equal(other(x, y), head(x, y)) and torch.equal(other.logits(x), head.logits(x))
            assert all(one is not own for one, own in zip(other.parameters(), head.parameters()))


# ---- ties, NaN, and the functions --------------------------------------------------------------------------------


def _tied(rank, world, counts, blocks, options):
    """The weights of class 3 at 9 and 12; the ranks hold the later classes first."""
    x, y = batch()
    w = torch.randn(C, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x[0], y[:] = w[3], torch.tensor([5, 5, 3, 9, 12, 1, 0])
    w[9] = w[12] = w[3]
    x[2:5] = w[3] + 0.01 * x[2:5]
    if rank is None:
        leaf, weight = x.requires_grad_(), w.requires_grad_()
        value = F.linear_margin_cross_entropy(leaf, weight, y, **options)
        return torch.autograd.grad(value, [leaf, weight])
    edges = [0, 4, 9, 10, C][: world * blocks] + [C]
    mine = [k for k in range(len(edges) - 1) if (len(edges) - 2 - k) % world == rank][::-1]
    weights = [w[edges[k] : edges[k + 1]].clone().requires_grad_() for k in mine]
    leaf = share(rank, counts, x).clone().requires_grad_()
    group = torch.distributed.group.WORLD
    value = class_parallel_cross_entropy(
        leaf, weights, [edges[k] for k in mine], share(rank, counts, y), C, group=group, **options
    )
    value.backward()
    return leaf.grad, [(edges[k], weight.grad) for k, weight in zip(mine, weights)]


@pytest.mark.parametrize("hardest", [1, 2, 3])
def test_of_equal_classes_the_lower_of_all_ranks_is_the_harder(hardest):
    """A rank's blocks need not be in the order of their classes."""
    options = {"scale": 16.0, "m2": 0.2, "hardest": hardest, "hardest_margin": 0.4}
    expected_x, expected_w = _tied(None, 1, None, 1, options)
    for world, blocks in ((2, 1), (2, 2), (4, 1)):
        ranks = on(world, _tied, BATCHES[world], blocks, options)
        torch.testing.assert_close(torch.cat([x for x, _ in ranks]), expected_x, rtol=1e-12, atol=1e-13)
        w = torch.cat([w for _, w in sorted((each for _, found in ranks for each in found), key=lambda each: each[0])])
        torch.testing.assert_close(w, expected_w, rtol=1e-12, atol=1e-13)
    # So that the test can fail: which of the equal ones is chosen is to be seen in the gradients.
    assert not torch.allclose(expected_w[3], expected_w[12])


def _function(rank, world, way, row, counts):
    """A function with numbers of rows: value and gradients of rows, weights and, of one against all, of the bias."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)
    x, w, bias = draw(7, D), draw(2 * C, D), torch.tensor(0.3, dtype=torch.float64)
    y = torch.randint(0, C, (7,), generator=generator)
    y[1] = -100
    threshold, coefficients = 0.2 * draw(7), draw(7, 3)
    if row is not None:
        x[2] = row
    more = {"ignore_index": 2} if row is not None else {}
    y[2] = 2 if row is not None else y[2]
    sliced = (lambda each: each) if rank is None else functools.partial(share, rank, counts)
    if way == "hard":
        more |= {"scale": 8.0, "m2": 0.2, "hard_threshold": sliced(threshold)}
        more["hard_coefficients"] = sliced(coefficients)
    elif way == "own threshold":
        more |= {"scale": 8.0, "m2": 0.2, "sample_m3": 0.1 * sliced(threshold), "hard_coefficients": coefficients[0]}
    elif way == "hardest":
        more |= {"scale": 8.0, "m2": 0.2, "hardest": 3, "hardest_margin": 0.2, "label_smoothing": 0.1}
    else:
        more |= {"scale": 8.0, "margin": 0.2, "power": 3.0, "positive_weight": 0.7, "negative_weight": 0.3}
    y[y == -100] = more.get("ignore_index", -100)
    more["sub_centers"] = 2
    bias.requires_grad_()
    leaf = sliced(x).clone().requires_grad_()
    if rank is None:
        w.requires_grad_()
        if way == "binary":
            value = F.linear_margin_binary_cross_entropy(leaf, w, y, bias, **more)
        else:
            value = F.linear_margin_cross_entropy(leaf, w, y, **more)
        value.backward()
        return value.detach(), leaf.grad, w.grad, bias.grad
    edges = {2: [0, 7, C], 3: [0, 2, 7, C], 4: [0, 2, 2, 7, C]}[world]
    first, last = edges[rank], edges[rank + 1]
    middle = (first + last) // 2
    weights = [w[2 * a : 2 * b].clone().requires_grad_() for a, b in ((first, middle), (middle, last))]
    arguments = leaf, weights, [first, middle], sliced(y), C
    group = torch.distributed.group.WORLD
    if way == "binary":
        value = class_parallel_binary_cross_entropy(*arguments, group=group, bias=bias, **more)
    else:
        value = class_parallel_cross_entropy(*arguments, group=group, **more)
    value.backward()
    return value.detach(), leaf.grad, torch.cat([weight.grad for weight in weights]), bias.grad


@pytest.mark.parametrize("row", [None, math.nan, math.inf])
@pytest.mark.parametrize("way", ["hard", "own threshold", "hardest", "binary"])
def test_the_functions(way, row):
    """Numbers of rows travel; an ignored row may hold anything, also under a label inside the classes."""
    value, x, w, bias = _function(None, 1, way, row, None)
    assert value.isfinite() and x.isfinite().all() and w.isfinite().all()
    for world in (2, 3, 4):
        ranks = on(world, _function, way, row, BATCHES[world])
        assert all(torch.equal(rank[0], ranks[0][0]) for rank in ranks)
        torch.testing.assert_close(ranks[0][0], value, rtol=1e-13, atol=0)
        torch.testing.assert_close(torch.cat([rank[1] for rank in ranks]), x, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(torch.cat([rank[2] for rank in ranks]), w, rtol=1e-11, atol=1e-13)
        for rank in ranks:
            assert (rank[3] is None) == (bias is None)
            if bias is not None:
                torch.testing.assert_close(rank[3], bias, rtol=1e-12, atol=0)


def _not_finite(rank, world, name):
    head = ClassParallel(make(name), init_device_mesh("cpu", (world,)))
    x, y = (share(rank, BATCHES[world], each) for each in batch())
    if rank == 2:
        x = x.clone()
        x[0] = math.nan
    return head(x, y).detach(), {key: buffer.clone() for key, buffer in head.loss.named_buffers()}


@pytest.mark.parametrize("name", ["CurricularFace", "MVSoftmax am", "InterTopK", "SphereFace2"])
def test_a_row_that_is_not_finite_is_nan_on_all_ranks(name):
    """And moves no state that others have: CurricularFace's t stays a number."""
    for value, state in on(3, _not_finite, name):
        assert value.isnan().all() and all(number.isfinite().all() for number in state.values())


# ---- training ----------------------------------------------------------------------------------------------------


def _trained(rank, world, name, rate, in_backward, recompute):
    """Three steps; the weights and the bias."""
    sampler = None if rate is None else ClassSampler(rate)
    head = ClassParallel(make(name), init_device_mesh("cpu", (world,)), blocks=2, sampler=sampler)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    if rate is not None:
        attach_row_optimizer(head, optimizer)
    if in_backward:
        step_in_backward(head, optimizer)
    x, y = (share(rank, BATCHES[world], each) for each in batch())
    for step in range(3):
        leaf = (x + step).requires_grad_()
        value = checkpoint(head, leaf, y, use_reentrant=False) if recompute else head(leaf, y)
        if not in_backward:
            optimizer.zero_grad()
        value.backward()
        if not in_backward:
            optimizer.step()
    bias = [] if head.shared_bias is None else [head.shared_bias.detach().full_tensor()]
    return [_whole(head), *bias, *head.loss.buffers()]


@pytest.mark.parametrize("way", ["dense", "rate 1", "in backward", "recomputed"])
@pytest.mark.parametrize("name", ["SubCenterArcFace", "CurricularFace", "InterTopK", "SphereFace2", "UniFace"])
def test_training_is_that_of_one_process(name, way):
    options = {"reduction": "mean", "label_smoothing": 0.0}
    loss = make(name, **options)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    x, y = batch()
    for step in range(3):
        optimizer.zero_grad()
        loss(x + step, y).backward()
        optimizer.step()
    expected = [loss.weight.detach(), *([] if loss.bias is None else [loss.bias.detach()]), *loss.buffers()]
    arguments = name, 1.0 if way == "rate 1" else None, way == "in backward", way == "recomputed"
    for found in on(3, _trained_with, arguments, options):
        # Three steps of roundings, which the loss's curvature (its scale is 64) makes larger.
        for here, there in zip(found, expected):
            torch.testing.assert_close(here, there, rtol=1e-6 if here.dtype == torch.float32 else 1e-10, atol=1e-12)


def _trained_with(rank, world, arguments, options):
    name = arguments[0]
    kind, given = LOSSES[name]
    LOSSES["tried"] = kind, {**given, **options}
    return _trained(rank, world, "tried", *arguments[1:])


def _sampled(rank, world, name):
    """Which classes were drawn, the loss among them, and the loss of one process on these classes alone."""
    loss = make(name, label_smoothing=0.0)
    one = copy.deepcopy(loss)
    head = ClassParallel(loss, init_device_mesh("cpu", (world,)), blocks=2, sampler=ClassSampler(0.4, seed=3))
    x, y = batch()
    drawn = []
    for first, count in head.class_ranges:
        drawn.append(head.sampler.draw(first, count, 0, torch.unique(y[y >= 0]))[0])
    everywhere = [None] * world
    torch.distributed.all_gather_object(everywhere, torch.cat(drawn).tolist())
    classes = torch.tensor(sorted(sum(everywhere, [])))
    value = head(share(rank, BATCHES[world], x), share(rank, BATCHES[world], y))
    centers = one.weight.unflatten(0, (C, -1))[classes].flatten(0, 1)
    alone = LOSSES[name][0](D, len(classes), dtype=torch.float64, **{**LOSSES[name][1], "label_smoothing": 0.0})
    with torch.no_grad():
        alone.weight.copy_(centers)
        if alone.bias is not None:
            alone.bias.copy_(one.bias)
    labels = torch.where(y < 0, y, torch.searchsorted(classes, y))
    return value.detach(), alone(x, labels).detach(), len(classes)


@pytest.mark.parametrize("name", ["SubCenterArcFace", "CurricularFace", "InterTopK", "SphereFace2"])
def test_a_sampled_step_is_the_loss_among_the_drawn_classes(name):
    for value, expected, drawn in on(3, _sampled, name):
        assert 5 < drawn < C
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def _drawn(rank, world, name):
    kind, given = LOSSES[name]
    loss = kind(D, C, dtype=torch.float64, device="meta", **given)
    head = ClassParallel(loss, init_device_mesh("cpu", (world,)), blocks=2)
    shapes = [tuple(block.shape) for block in head.weight]
    torch.manual_seed(0)
    head.reset_parameters()
    first = _whole(head)
    added = head.append_classes(4)
    x, y = (share(rank, BATCHES[world], each) for each in batch())
    value = head(x, y)
    value.sum().backward()
    bias = None if head.shared_bias is None else head.shared_bias.detach().full_tensor()
    return shapes, first, [tuple(each.shape) for each in added], added[0].grad is not None, head.logits(x).shape, bias


@pytest.mark.parametrize("name", ["SubCenterArcFace", "InterTopK", "SphereFace2", "UniFace"])
def test_weights_are_drawn_where_they_live_and_appended(name):
    """A class stays on one rank with all its centers; the same weights at any number of ranks."""
    found = [on(world, _drawn, name) for world in (1, 2, 3)]
    centers = LOSSES[name][1].get("sub_centers", 3 if name in ("SubCenterArcFace", "InterTopK") else 1)
    of_class = (D,) if centers == 1 else (centers, D)
    for ranks in found:
        for rank, (shapes, first, added, has_gradient, logits, bias) in enumerate(ranks):
            assert shapes == [(6, *of_class), (7, *of_class)] and added == [(4, *of_class)] and has_gradient
            assert logits == (BATCHES[len(ranks)][rank], C + 4)
            assert torch.equal(first, found[0][0][1]), "drawn otherwise"
            bound = math.sqrt(6 / (C * centers + D))  # Xavier's, of one process's weight [C K, D]
            assert first.abs().max() <= bound and first.std() > bound / 2
            assert (bias is None) == (name not in ("SphereFace2", "UniFace"))
            if bias is not None:
                assert bias == (0.0 if name == "SphereFace2" else -torch.tensor(10.0 * C).double().log())


def _plain_weight(rank, world):
    head = ClassParallel(make("SubCenterArcFace"), init_device_mesh("cpu", (world,)), blocks=2)
    before = export_weight(head)
    new = torch.arange(3.0 * C * D, dtype=torch.float64).view(3 * C, D) if rank == 0 else None
    import_weight(head, new)
    return before, _whole(head), export_weight(head)


def test_a_plain_weight_goes_in_and_out():
    new = torch.arange(3.0 * C * D, dtype=torch.float64).view(3 * C, D)
    for rank, (before, whole, after) in enumerate(on(3, _plain_weight)):
        assert torch.equal(whole, new)
        if rank == 0:
            assert torch.equal(before, make("SubCenterArcFace").weight.detach()) and torch.equal(after, new)
        else:
            assert before is None and after is None


def _save(rank, world, folder, name):
    import torch.distributed.checkpoint as dcp

    head = ClassParallel(make(name), init_device_mesh("cpu", (world,)), blocks=2)
    dcp.save(head.state_dict(), checkpoint_id=folder)
    return head.logits(share(rank, BATCHES[world], batch()[0]))


def _load(rank, world, folder, name):
    import torch.distributed.checkpoint as dcp

    kind, given = LOSSES[name]
    head = ClassParallel(
        kind(D, C, dtype=torch.float64, device="meta", **given), init_device_mesh("cpu", (world,)), blocks=2
    )
    state = head.state_dict()
    dcp.load(state, checkpoint_id=folder)
    head.load_state_dict(state)
    return head.logits(share(rank, BATCHES[world], batch()[0]))


@pytest.mark.parametrize("name", ["SubCenterArcFace", "CurricularFace", "SphereFace2"])
def test_what_three_ranks_save_two_load(tmp_path, name):
    saved = torch.cat(on(3, _save, str(tmp_path), name))
    torch.testing.assert_close(torch.cat(on(2, _load, str(tmp_path), name)), saved, rtol=1e-13, atol=1e-13)


def _narrow(rank, world, name):
    """float32 weights before bfloat16 rows, under autocast; head and loss of one process."""
    loss = make(name, dtype=torch.float32, label_smoothing=0.0)
    one, head = copy.deepcopy(loss), ClassParallel(loss, init_device_mesh("cpu", (world,)), input_grad_scale=1.0)
    x, y = batch(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = head(share(rank, BATCHES[world], x).requires_grad_(), share(rank, BATCHES[world], y))
        expected = one(x.requires_grad_(), y)
    value.backward()
    expected.backward()
    return value.detach(), expected.detach(), _whole_gradient(head), one.weight.grad


@pytest.mark.parametrize("name", ["SubCenterArcFace", "CurricularFace", "InterTopK", "SphereFace2"])
def test_sixteen_bits(name):
    for value, expected, weight, weight_expected in on(3, _narrow, name):
        assert value.dtype == torch.float32 and weight.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
        atol = 2**-7 * weight_expected.abs().max().item()
        torch.testing.assert_close(weight, weight_expected, rtol=2**-6, atol=atol)


# ---- what is refused ---------------------------------------------------------------------------------------------


def _refused(rank, world, way):
    mesh = init_device_mesh("cpu", (world,))
    x, y = (share(rank, BATCHES[world], each) for each in batch())
    if way in ("InterTopK", "SphereFace2"):
        ClassParallel(make(way, label_smoothing=0.0), mesh, sampler=ClassSampler(0.5, correction=True))
    elif way == "centers":
        centers = 2 if rank == 1 else 3
        ClassParallel(make("SubCenterArcFace", sub_centers=centers), mesh)
    elif way == "masked":
        head = ClassParallel(Own(D, C, scale=8.0, dtype=torch.float64, label_smoothing=0.1), mesh)
        head.loss.negatives = lambda *_: {"hard_coefficients": torch.tensor([0.0, 0.0, -math.inf]).double()}
        head(x, y)
    else:
        w = torch.ones(3 * 4 + (rank == 1 and way == "rows of a class"), D, dtype=torch.float64)
        given = {"sub_centers": 0 if rank == 1 and way == "no centers" else 3}
        if way == "margin of none":
            given["hardest_margin"] = 0.1 if rank == 1 else 0.0
        if way == "shape":
            given |= {"hard_coefficients": torch.zeros(2 if rank == 1 else 3).double()}
        if way == "gradient":
            given |= {"hard_coefficients": torch.zeros(3).double().requires_grad_(rank == 1)}
        call = class_parallel_cross_entropy
        if way in ("bias", "label"):
            call, shape = class_parallel_binary_cross_entropy, [1] if rank == 1 and way == "bias" else []
            given = {"bias": torch.zeros(shape, dtype=torch.float64), "sub_centers": 3}
            y = torch.full_like(y, C) if rank == 0 and way == "label" else y
        call(x, [w], [4 * rank], y, C, group=torch.distributed.group.WORLD, **given)


REFUSED = {
    "InterTopK": "expected a sampler without correction",
    "SphereFace2": "expected a sampler without correction",
    "centers": "expected the same arguments on all ranks, but rank 0 has sub_centers=3",
    "masked": "label_smoothing",
    "rows of a class": "to hold 3 rows for each class",
    "no centers": "expected sub_centers in [1, 255], but got 0",
    "margin of none": "expected hardest > 0 with hardest_margin",
    "shape": "expected hard_coefficients to have shape",
    "gradient": "expected hard_coefficients not to require grad",
    "bias": "expected bias to be 0-dimensional",
    "label": "expected target values in [0, 13)",
}


@pytest.mark.parametrize("way", REFUSED)
def test_refusals(way):
    """Of one rank, on all: its own error there, elsewhere that it has refused."""
    found = [error[1] for error in outcomes(3, _refused, way, seconds=20)]
    if way in ("InterTopK", "SphereFace2", "centers", "masked", "label"):
        assert all(REFUSED[way] in text for text in found), found
    else:
        assert REFUSED[way] in found[1], found
        assert all("rank 1 of the group refused its arguments" in found[k] for k in (0, 2)), found
