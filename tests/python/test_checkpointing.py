"""Losses whose state moves with training, under activation checkpointing: a forward that runs twice counts once."""

import copy
import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import torchmargin

C, D = 17, 8


class Counting(torchmargin.MarginLoss):
    """A loss of one's own: the margin grows by a tenth with every step, a row's penalty with it."""

    def __init__(self, in_features, num_classes, **options):
        super().__init__(in_features, num_classes, scale=16.0, **options)
        self.register_buffer("count", torch.tensor(0))

    def advance(self, embeddings, labels):
        self.count.add_(1)

    def sample_margins(self, embeddings, labels):
        return {"sample_m3": (0.1 * self.count).expand(len(labels)).to(self.acc_dtype)}

    def row_penalty(self, embeddings, labels):
        return self.count.clone() * embeddings.square().mean(1)


LOSSES = {
    "AdaFace": functools.partial(torchmargin.AdaFaceLoss, momentum=0.5),
    "SphereFace": functools.partial(torchmargin.SphereFaceLoss, lambda_base=10.0, lambda_gamma=1.0, lambda_min=0.1),
    "L-Softmax": functools.partial(torchmargin.LargeMarginSoftmaxLoss, lambda_base=10.0, lambda_gamma=1.0),
    "ElasticFace": functools.partial(torchmargin.ElasticFaceLoss, deviation=0.2),
    "CurricularFace": functools.partial(torchmargin.CurricularFaceLoss, momentum=0.5),
    "own": Counting,
}
DIRECT = lambda function, *arguments: function(*arguments)
WAYS = {
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "to the end": functools.partial(checkpoint, use_reentrant=False, early_stop=False),
}


class Model(torch.nn.Module):
    def __init__(self, make):
        super().__init__()
        self.body = torch.nn.Linear(D, D)
        self.loss = make(D, C)

    def forward(self, x, y):
        return self.loss(10 * self.body(x), y)


def _batches(count):
    torch.manual_seed(5)
    return [(torch.randn(12, D).requires_grad_(), torch.randint(0, C, (12,))) for _ in range(count)]


def _outcome(model, values):
    """Gradients, and the state that is left."""
    sum(values).backward()
    grads = [parameter.grad for parameter in model.parameters()]
    return [*grads, *model.loss.buffers()]


def _equal(a, b):
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


@pytest.fixture(params=LOSSES)
def models(request):
    """Two equal models, some steps old."""
    torch.manual_seed(4)
    model = Model(LOSSES[request.param])
    for batch in _batches(2):
        model(*batch)
    return model, copy.deepcopy(model)


def _compare(models, scenario, way):
    outcomes = []
    for model, run in zip(models, (DIRECT, way)):
        torch.manual_seed(6)
        outcomes.append(_outcome(model, scenario(model, run)))
    assert _equal(*outcomes)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_one_call(models, way):
    (batch,) = _batches(1)
    _compare(models, lambda model, run: [run(model, *batch)], way)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_two_calls_before_one_backward(models, way):
    batches = _batches(2)
    _compare(models, lambda model, run: [run(model, *batch) for batch in batches], way)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_same_batch_twice(models, way):
    """Also with equal embeddings: the later call is computed again first."""
    (batch,) = _batches(1)
    _compare(models, lambda model, run: [run(model, *batch), 2 * run(model, *batch)], way)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_other_forwards_between(models, way):
    first, second, third = _batches(3)

    def scenario(model, run):
        value = run(model, *first)
        with torch.no_grad():
            model(*second)  # in training mode: it counts as a step
        model.eval()
        model(*second)
        model.train()
        return [value, model(*third)]

    _compare(models, scenario, way)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_many_steps_that_wait(models, way):
    batches = _batches(20)
    _compare(models, lambda model, run: [run(model, *batch) for batch in batches], way)


def test_two_backwards_through_one_graph(models):
    (batch,) = _batches(1)

    def scenario(model, run):
        value = run(model, *batch)
        value.backward(retain_graph=True)
        return [value]

    _compare(models, scenario, WAYS["not reentrant"])


def test_only_the_loss_is_checkpointed(models):
    (batch,) = _batches(1)
    for way in WAYS.values():
        model, other = copy.deepcopy(models[0]), copy.deepcopy(models[1])
        _compare((model, other), lambda model, run: [run(model.loss, model.body(batch[0]), batch[1])], way)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_compiled(models, where):
    """checkpoint in a compiled function, and a compiled model in a checkpoint."""
    torch.compiler.reset()
    batches = _batches(2)

    def scenario(model, run):
        if run is DIRECT:
            return [model(*batch) for batch in batches]
        if where == "outside":
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            return [checkpoint(compiled, *batch, use_reentrant=False) for batch in batches]
        steps = lambda first, second: [checkpoint(model, *batch, use_reentrant=False) for batch in (first, second)]
        return torch.compile(steps, backend="aot_eager", fullgraph=True)(*batches)

    outcomes = []
    for model, run in zip(models, (DIRECT, checkpoint)):
        torch.manual_seed(6)
        outcomes.append(_outcome(model, scenario(model, run)))
    if isinstance(models[0].loss, torchmargin.ElasticFaceLoss):
        return  # a compiled graph draws other numbers; that it runs is all that can be said
    for got, expected in zip(*reversed(outcomes)):
        assert torch.equal(got, expected)
    assert _equal(models[0].loss.buffers(), models[1].loss.buffers())


def test_a_call_that_raises_moves_nothing(models):
    model = models[0]
    before = [buffer.clone() for buffer in model.loss.buffers()]
    x, y = _batches(1)[0]
    y[3] = C
    with pytest.raises(IndexError, match="but got 17 at row 3"):
        model(x, y)
    with pytest.raises(RuntimeError, match="expected target to be int64"):
        model(x, y.int())
    assert _equal(model.loss.buffers(), before)


def test_only_the_base_has_a_forward():
    for name in torchmargin.losses.__all__:
        loss = getattr(torchmargin.losses, name)
        if isinstance(loss, type) and issubclass(loss, torchmargin.MarginLoss) and loss is not torchmargin.MarginLoss:
            assert "forward" not in vars(loss)
