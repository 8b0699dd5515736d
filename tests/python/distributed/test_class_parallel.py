"""class_parallel_cross_entropy: what the ranks find is what one process with all classes and rows finds."""

import math

import pytest
import torch
from torch.nn import functional as nnf

from torchmargin.functional import linear_margin_cross_entropy

from ranks import on, share
from rounding import LinearRounding, assert_within

# The bounds are of one log-sum-exp. A merge of shards adds another of no more terms, and its weights' relative error;
# the sums over ranks have no more terms than those over rows and classes.
MERGED = 2

C, D = 13, 8
BATCHES = {1: [7], 2: [5, 2], 3: [5, 0, 2], 4: [1, 3, 0, 3]}


def problem(rows=7, classes=C, features=D, dtype=torch.float64):
    """x, w, y with an ignored row, bias and margins of rows."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator).to(dtype)
    y = torch.randint(0, classes, (rows,), generator=generator)
    y[1] = -100
    return {
        "x": draw(rows, features), "w": draw(classes, features), "y": y, "b": draw(classes),
        "m2": (0.3 + 0.05 * draw(rows)).clamp(0, 0.5), "m3": 0.1 * draw(rows), "mu": draw(rows).abs().clamp(0.5, 1.0),
    }  # fmt: skip


def shared(rank, world, data, cuts, blocks, counts, options, sent=("m2", "m3", "mu"), bias=False, upstream=None):
    """Value and gradients of x, each block's w and b, and margins of rows, on a rank with classes cuts[rank:rank+2]."""
    leaf = lambda tensor: tensor.clone().requires_grad_()
    first, last = cuts[rank], cuts[rank + 1]
    edges = [first + (last - first) * k // blocks for k in range(blocks + 1)]
    x = leaf(share(rank, counts, data["x"]))
    ws = [leaf(data["w"][a:b]) for a, b in zip(edges, edges[1:])]
    bs = [leaf(data["b"][a:b]) for a, b in zip(edges, edges[1:])] if bias else None
    margins = {name: share(rank, counts, data[name]).clone() for name in sent}
    for name in set(margins) & {"m2", "m3"}:
        margins[name].requires_grad_()
    names = {"m2": "sample_m2", "m3": "sample_m3", "mu": "sample_margin_weight"}
    from torchmargin.distributed import class_parallel_cross_entropy

    value = class_parallel_cross_entropy(
        x, ws, edges[:-1], share(rank, counts, data["y"]), len(data["w"]), group=torch.distributed.group.WORLD,
        biases=bs, **{names[name]: margin for name, margin in margins.items()}, **options,
    )  # fmt: skip
    leaves = {"x": x, **{f"w{k}": w for k, w in enumerate(ws)}}
    leaves.update({f"b{k}": b for k, b in enumerate(bs)} if bias else {})
    leaves.update({name: margins[name] for name in margins if margins[name].requires_grad})
    given = None if upstream is None else share(rank, counts, upstream)
    found = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()), given)))
    joined = {"x": found["x"], "w": torch.cat([found[f"w{k}"] for k in range(blocks)])}
    if bias:
        joined["b"] = torch.cat([found[f"b{k}"] for k in range(blocks)])
    return value.detach(), {**joined, **{name: found[name] for name in margins if name in found}}


def of_one(data, options, sent=(), bias=False, upstream=None, function=linear_margin_cross_entropy):
    """The same of one process."""
    names = ["x", "w", *(["b"] if bias else []), *(name for name in sent if name != "mu")]
    leaves = {name: data[name].clone().requires_grad_() for name in names}
    margins = {"sample_m2": leaves.get("m2"), "sample_m3": leaves.get("m3")}
    margins["sample_margin_weight"] = data["mu"] if "mu" in sent else None
    options = {key: value for key, value in options.items() if key not in ("max_rows", "input_grad_scale")}
    value = function(leaves["x"], leaves["w"], data["y"], leaves.get("b"), **margins, **options)
    return value.detach(), dict(zip(names, torch.autograd.grad(value, list(leaves.values()), upstream)))


def eager(
    x, w, y, b=None, *, scale=1.0, m1=1.0, m2=0.0, m3=0.0, sample_m2=None, sample_m3=None, sample_margin_weight=None,
    normalize_input=True, normalize_weight=True, label_smoothing=0.0, ignore_index=-100, reduction="mean",
):  # fmt: skip
    """All logits at once, in a few lines of torch; for angles where no extension counts."""
    rows, valid = torch.arange(len(y)), y != ignore_index
    cosine = nnf.normalize(x) @ nnf.normalize(w).T
    theta = cosine[rows, y.where(valid, torch.tensor(0))].arccos()
    nothing = theta.new_zeros(())
    m2 = m2 + (nothing if sample_m2 is None else sample_m2)
    m3 = m3 + (nothing if sample_m3 is None else sample_m3)
    mu = 1.0 if sample_margin_weight is None else sample_margin_weight
    own = theta.cos() + mu * ((m1 * theta + m2).cos() - m3 - theta.cos())
    cosine = torch.where(nnf.one_hot(y.where(valid, torch.tensor(0)), len(w)).bool(), own[:, None], cosine)
    lengths = (1.0 if normalize_input else x.norm(dim=1)[:, None]) * (1.0 if normalize_weight else w.norm(dim=1))
    logits = scale * lengths * cosine + (0.0 if b is None else b)
    return nnf.cross_entropy(logits, y, None, None, ignore_index, reduction=reduction, label_smoothing=label_smoothing)


def bounds(data, options, sent=(), bias=False, upstream=None):
    """Of the value and of each gradient."""
    options = {**options, "m2": options.get("m2", 0.0) + 0.5 * ("m2" in sent), "m3": options.get("m3", 0.0) + 0.4}
    r = LinearRounding(data["x"], data["w"], data["y"], data["b"] if bias else None, **options)
    valid = (data["y"] != options.get("ignore_index", -100)).double()
    smoothing, reduction = options.get("label_smoothing", 0.0), options.get("reduction", "mean")
    divisor = {"mean": valid.sum(), "sum": 1.0, "none": None}[reduction]
    rows = valid * (upstream if reduction == "none" else 1 / divisor)
    x, w, b = r.loss_gradients(rows, smoothing)
    margins = r.sample_gradients(rows)
    of = {"x": x, "w": w, "b": b, "m2": margins, "m3": margins}
    return MERGED * r.loss(smoothing, divisor), {name: MERGED * bound for name, bound in of.items()}


def assert_same(ranks, expected, within):
    """Of `shared` on all ranks, and of `of_one`."""
    value, gradients = expected
    if value.dim() == 0:
        for other, _ in ranks:
            assert torch.equal(other, ranks[0][0]), "the ranks have different values"
        assert_within(ranks[0][0], value, within[0], "value")
    else:
        assert_within(torch.cat([rank[0] for rank in ranks]), value, within[0], "value")
    for name, gradient in gradients.items():
        found = torch.cat([rank[1][name] for rank in ranks])
        assert_within(found, gradient, within[1][name].expand_as(gradient), name)


# Where each rank's classes start: uneven, empty in front, between and behind, one class each.
CUTS = {
    "1": [0, 13], "2": [0, 7, 13], "2 empty": [0, 13, 13], "2 empty first": [0, 0, 13], "3": [0, 5, 10, 13],
    "3 one has all": [0, 13, 13, 13], "3 middle": [0, 0, 13, 13], "3 uneven": [0, 2, 7, 13], "4": [0, 2, 7, 7, 13],
}  # fmt: skip
MARGINS = {
    "plain": {},
    "combined": {"scale": 16.0, "m1": 0.9, "m2": 0.2, "m3": 0.1},
    "smoothed": {"scale": 16.0, "m2": 0.2, "label_smoothing": 0.1},
    "lengths": {"scale": 2.0, "m3": 0.2, "normalize_input": False, "normalize_weight": False, "reduction": "sum"},
}


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("margin", MARGINS)
def test_shards_of_classes_and_rows_are_one_process(cuts, margin):
    data, options = problem(), MARGINS[margin]
    world = len(CUTS[cuts]) - 1
    expected, within = of_one(data, options, bias=True), bounds(data, options, bias=True)
    assert_same([of_one(data, options, bias=True, function=eager)], expected, within)
    for blocks, max_rows in ((1, None), (3, 6 + world)):
        given = {**options, "max_rows": max_rows}
        ranks = on(world, shared, data, CUTS[cuts], blocks, BATCHES[world], given, (), True)
        assert_same(ranks, expected, within)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_classes(reduction):
    """The mean is over the weights of the rows of all ranks."""
    data = problem()
    weights = torch.linspace(0.0, 2.0, len(data["w"]))
    options = {"scale": 16.0, "m2": 0.1, "reduction": reduction}
    upstream = torch.linspace(-1, 2, 7, dtype=torch.float64) if reduction == "none" else None
    expected = of_one(data, {**options, "class_weight": weights}, bias=True, upstream=upstream)
    # No weight is above 2, and what weighs less than half of it on average divides by at least a quarter of the rows.
    value, of_each = bounds(data, options, bias=True, upstream=upstream)
    assert weights[data["y"].clamp(min=0)].mean() > 0.5
    within = 8 * value, {name: 8 * bound for name, bound in of_each.items()}
    for cuts in ("2", "3 one has all"):
        world = len(CUTS[cuts]) - 1
        given = {**options, "class_weight": weights}
        assert_same(on(world, shared, data, CUTS[cuts], 2, BATCHES[world], given, (), True, upstream), expected, within)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("cuts", ["2", "3 one has all"])
def test_margins_of_rows(cuts, reduction):
    """Their gradients come from the rank that holds the row's class."""
    data, options, sent = problem(), {"scale": 16.0, "m2": 0.1, "reduction": reduction}, ("m2", "m3", "mu")
    upstream = torch.linspace(-1, 2, 7, dtype=torch.float64) if reduction == "none" else None
    expected, within = of_one(data, options, sent, upstream=upstream), bounds(data, options, sent, upstream=upstream)
    assert_same([of_one(data, options, sent, upstream=upstream, function=eager)], expected, within)
    world = len(CUTS[cuts]) - 1
    for max_rows in (None, 5):
        given = {**options, "max_rows": max_rows}
        ranks = on(world, shared, data, CUTS[cuts], 2, BATCHES[world], given, sent, False, upstream)
        assert_same(ranks, expected, within)


EXTENSIONS = ["linear", "easy", "clip", "monotonic", "continuous"]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_extensions_and_gradients_that_are_no_derivatives(extension):
    """Against the op of one process, which has tests of its own."""
    data = problem()
    options = {"scale": 16.0, "m1": 2.0 if extension == "monotonic" else 1.0, "extension": extension}
    options["m2"] = 0.0 if extension == "monotonic" else 0.4
    for gradient in ("exact", "straight_through"):
        given = {**options, "margin_gradient": gradient, "margin_weight": 0.7}
        ranks = on(3, shared, data, CUTS["3 uneven"], 2, [2, 5, 0], given, ())
        assert_same(ranks, of_one(data, given), bounds(data, options))


def test_rows_that_are_ignored_count_for_nothing():
    """Whatever they hold, under a label inside the classes, beside them or far off."""
    for ignore_index in (4, 255, -1):
        data, options = problem(), {"scale": 16.0, "m2": 0.2, "ignore_index": ignore_index}
        data["y"][data["y"] == -100] = ignore_index
        kept = data["y"] != ignore_index
        data["x"][~kept] = torch.nan
        data["x"][1] = torch.inf
        alone = {**data, "x": data["x"][kept], "y": data["y"][kept]}
        value, gradients = of_one(alone, {**options, "ignore_index": -100})
        within = bounds(alone, {**options, "ignore_index": -100})
        ranks = on(3, shared, data, CUTS["3 uneven"], 1, BATCHES[3], options, ())
        of_rows = torch.cat([gradients_of["x"] for _, gradients_of in ranks])
        assert of_rows[~kept].eq(0).all()
        for k, count in enumerate(BATCHES[3]):
            ranks[k][1]["x"] = share(k, BATCHES[3], of_rows)[share(k, BATCHES[3], kept)]
            assert len(share(k, BATCHES[3], kept)) == count
        assert_same(ranks, (value, gradients), within)


def test_no_valid_row_at_all():
    """A mean of nothing is NaN, as cross_entropy's, and has no gradient; a sum is 0. So with no rows anywhere."""
    ignored = problem()
    ignored["y"][:] = -100
    empty = {**ignored, **{name: ignored[name][:0] for name in ("x", "y", "m2", "m3", "mu")}}
    for data, counts in ((ignored, BATCHES[3]), (empty, [0, 0, 0])):
        for reduction, max_rows in (("mean", None), ("mean", 8), ("sum", None), ("none", None)):
            upstream = torch.ones(len(data["y"]), dtype=torch.float64) if reduction == "none" else None
            given = {"scale": 8.0, "reduction": reduction, "max_rows": max_rows}
            ranks = on(3, shared, data, CUTS["3"], 2, counts, given, ("m2", "m3", "mu"), False, upstream)
            for value, gradients in ranks:
                assert value.isnan().all() if reduction == "mean" else value.eq(0).all()
                for name in ("x", "w", "m2", "m3"):
                    assert gradients[name].eq(0).all(), (name, reduction)


def test_one_class():
    """Its loss is 0: there is no other."""
    data = problem(classes=1)
    for value, gradients in on(2, shared, data, [0, 0, 1], 1, [4, 3], {"scale": 8.0, "m2": 0.2}, ()):
        assert value.eq(0) and gradients["x"].eq(0).all() and gradients["w"].eq(0).all()


def test_gradients_of_rows_are_scaled():
    """All that flows to rows and to margins of rows; nothing of the weights."""
    data, sent = problem(), ("m2", "m3", "mu")
    one, three = (on(3, shared, data, CUTS["3"], 1, BATCHES[3], {"input_grad_scale": s}, sent) for s in (1.0, 3.0))
    for (value, plain), (other, scaled) in zip(one, three):
        assert torch.equal(value, other) and torch.equal(plain["w"], scaled["w"])
        for name in ("x", "m2", "m3"):
            assert torch.equal(3.0 * plain[name], scaled[name])


@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_weights_round_no_worse_than_eager(rows):
    """Values within their bound; gradients as near to float64 as eager's of one process, with half more for chance."""
    data = problem(rows=48, classes=301, features=64, dtype=torch.float32)
    data["x"] = data["x"].to(rows)
    options = {"scale": 32.0, "m2": 0.3}
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in data.items()}
    value, exact = of_one(wide, options, function=eager)
    _, near = of_one({**data, "x": data["x"].float()}, options, function=eager)
    ranks = on(3, shared, data, [0, 100, 110, 301], 2, [16, 30, 2], options, ())
    rounding = LinearRounding(data["x"].float(), data["w"], data["y"], **options)
    if rows == torch.float32:
        assert_within(ranks[0][0], value, MERGED * rounding.loss(0.0, (data["y"] >= 0).sum()), "value")
    error = lambda found, name: ((found.double() - exact[name]).norm() / exact[name].norm()).item()
    for name in ("x", "w"):
        found = torch.cat([rank[1][name] for rank in ranks])
        assert found.dtype == data[name].dtype
        # A row of a 16-bit dtype gets its gradient rounded to it; its products are in that dtype.
        narrow = 0.0 if rows == torch.float32 else math.sqrt(2) * torch.finfo(rows).eps
        assert error(found, name) <= 1.5 * error(near[name], name) + narrow, name
