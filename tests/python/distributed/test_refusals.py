"""What is refused, on every rank and without one that waits for another; and that the group is usable afterwards."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import torchmargin
from torchmargin.distributed import ClassParallel, class_parallel_cross_entropy, import_weight, step_in_backward

from ranks import on, share

C, D = 13, 8
COUNTS = [3, 0, 2]


def batch(rank, seed=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, D, generator=generator)
    y = torch.randint(0, C, (5,), generator=generator)
    return share(rank, COUNTS, x).clone().requires_grad_(), share(rank, COUNTS, y).clone()


def make(**options):
    torch.manual_seed(1)
    return torchmargin.ArcFaceLoss(D, C, **options)


def make_head(world, loss=None, **options):
    return ClassParallel(make() if loss is None else loss, init_device_mesh("cpu", (world,)), **options)


def function(rank, world, x, y, **options):
    w = make().weight.detach()[[0, 5, 10, C][rank] : [0, 5, 10, C][rank + 1]].clone().requires_grad_()
    return class_parallel_cross_entropy(x, [w], [[0, 5, 10][rank]], y, C, group=dist.group.WORLD, **options)


# What the last rank gives instead of its rows.
BAD = {
    "label": lambda x, y: (x, torch.tensor([3, C])),
    "negative label": lambda x, y: (x, torch.tensor([-1, 3])),
    "least label": lambda x, y: (x, torch.tensor([torch.iinfo(torch.int64).min, 3])),
    "dtype": lambda x, y: (x.double(), y),
    "dtype of labels": lambda x, y: (x, y.int()),
    "features": lambda x, y: (x[:, :-1], y),
    "dimensions": lambda x, y: (x[0], y),
    "fewer labels": lambda x, y: (x, y[:1]),
    "many rows": lambda x, y: (x.repeat(4, 1), y.repeat(4)),
    "no tensor": lambda x, y: (None, y),
}
LABELS = ("label", "negative label")
OF_LABELS = (*LABELS, "least label", "dtype of labels", "many rows")


def bad_call(rank, world, bad, max_rows, of_head):
    """What a bad call raises, and afterwards the value of a good one."""
    call = (
        make_head(world, max_rows=max_rows) if of_head else functools.partial(function, rank, world, max_rows=max_rows)
    )
    x, y = batch(rank)
    raised = None
    # What travels beside the network's forward is the labels: only their refusal reaches the other ranks.
    for prepared in (False, True) if of_head and bad in OF_LABELS else (False,):
        given = BAD[bad](x, y) if rank == world - 1 else (x, y)
        try:
            if prepared:
                call.prepare(given[1])
            call(*given)
        except Exception as error:
            found = type(error).__name__, str(error).split("\n")[0]
            assert raised is None or prepared
            raised = found if raised is None else raised
        else:
            raise AssertionError(f"nothing is raised with prepared = {prepared}")
    good = call(x, y)
    good.backward()
    return raised, good.detach()


@pytest.mark.parametrize("max_rows", [None, 4])
@pytest.mark.parametrize("of_head", [False, True], ids=["function", "head"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_call_of_one_rank_is_an_error_on_all(bad, of_head, max_rows):
    if bad == "many rows" and max_rows is None:
        return
    if bad == "no tensor" and not of_head:
        return
    results = on(3, bad_call, bad, max_rows, of_head, seconds=20)
    assert len({value for _, value in results}) == 3 and len({value.item() for _, value in results}) == 1
    raised = [error for error, _ in results]
    if bad in LABELS:
        label = {"label": C, "negative label": -1}[bad]
        text = f"class_parallel: expected target values in [0, {C}) or ignore_index (-100), but got {label} at row "
        assert raised[0][0] == "IndexError" and raised[0][1].startswith(text) and "of rank 2" in raised[0][1]
        assert raised == [raised[0]] * 3
    else:
        assert "rank 2 of the group refused its arguments" in raised[0][1] and raised[1] == raised[0]
        assert raised[2][0] in ("RuntimeError", "TypeError", "ValueError")
        assert bad == "least label" or "refused" not in raised[2][1]


def bad_inference(rank, world, method):
    head = make_head(world)
    x, _ = batch(rank)
    raised = []
    for bad in (x[:, :-1], x.double(), x[0] if len(x) else x, None):
        try:
            getattr(head, method)(bad if rank == 2 else x)
        except Exception as error:
            raised.append(f"{type(error).__name__}: {error}")
        else:
            raised.append(None)
    return raised, getattr(head, method)(x)


@pytest.mark.parametrize("method", ["logits", "top1"])
def test_bad_rows_of_one_rank_for_inference(method):
    for rank, (raised, _) in enumerate(on(3, bad_inference, method, seconds=20)):
        for error in raised:
            assert error is not None and ("rank 2 of the group refused its arguments" in error) == (rank != 2)


def bad_number(rank, world, method):
    head = make_head(world)
    given = batch(rank)[: 2 if method == "forward" else 1]
    raised = None
    buffer = head.loss._buffers["scale"]
    buffer.requires_grad_(rank == 2)
    try:
        getattr(head, method)(*given)
    except RuntimeError as error:
        raised = str(error)
    buffer.requires_grad_(False)
    getattr(head, method)(*given)
    return raised


@pytest.mark.parametrize("method", ["forward", "logits", "top1"])
def test_a_number_with_a_gradient_on_one_rank(method):
    for rank, raised in enumerate(on(3, bad_number, method, seconds=20)):
        assert ("expected scale to be one number for all" if rank == 2 else "rank 2 of the group refused") in raised


def not_finite(rank, world, value, of_head):
    x, y = batch(rank)
    if rank == 2:
        x.data[0, 0] = value
    call = make_head(world) if of_head else functools.partial(function, rank, world)
    return call(x, y).detach()


@pytest.mark.parametrize("of_head", [False, True], ids=["function", "head"])
def test_a_row_that_is_not_finite_is_nan_on_all_ranks(of_head):
    for number in (torch.nan, torch.inf):
        assert all(value.isnan() for value in on(3, not_finite, number, of_head))


class OtherForward(torchmargin.ArcFaceLoss):
    def forward(self, embeddings, labels, return_statistics=False):
        return super().forward(embeddings, labels)


class OtherParameters(torchmargin.ArcFaceLoss):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.temperature = torch.nn.Parameter(torch.ones(()))


CONSTRUCTED = {
    "another module": (lambda: torch.nn.CrossEntropyLoss(), {}, "TypeError", "torchmargin.MarginLoss"),
    "a forward": (lambda: OtherForward(D, C), {}, "TypeError", "OtherForward has its own"),
    "parameters": (lambda: OtherParameters(D, C), {}, "TypeError", "temperature"),
    "blocks": (make, {"blocks": C + 1}, "ValueError", r"blocks in [1, 13]"),
    "max_rows": (make, {"max_rows": 0}, "ValueError", "max_rows"),
    "input_grad_scale": (make, {"input_grad_scale": float("nan")}, "ValueError", "input_grad_scale"),
    # On some ranks only: these are fine by themselves.
    "classes": (lambda: torchmargin.ArcFaceLoss(D, C + 1), {}, "RuntimeError", "same arguments on all ranks"),
    "kind": (lambda: torchmargin.CosFaceLoss(D, C), {}, "RuntimeError", "same arguments on all ranks"),
    "margin": (lambda: make(margin=0.4), {}, "RuntimeError", "same arguments on all ranks"),
    "smoothing": (lambda: make(label_smoothing=0.1), {}, "RuntimeError", "same arguments on all ranks"),
    "lengths": (
        lambda: torchmargin.MarginLoss(D, C, normalize_weight=False), {}, "RuntimeError", "same arguments on all ranks"
    ),
    "other blocks": (make, {"blocks": 2}, "RuntimeError", "same arguments on all ranks"),
    "scale": (make, {"input_grad_scale": 2.0}, "RuntimeError", "same arguments on all ranks"),
    "meta": (lambda: make(device="meta"), {}, "RuntimeError", "same arguments on all ranks"),
}  # fmt: skip


def construct(rank, world, name, ranks):
    loss, options, *_ = CONSTRUCTED[name]
    try:
        make_head(world, *([loss()] if rank in ranks else []), **(options if rank in ranks else {}))
    except Exception as error:
        raised = type(error).__name__, str(error)
    else:
        raised = None
    x, y = batch(rank)
    return raised, make_head(world)(x, y).item()


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_a_head_that_cannot_be(name):
    _, _, kind, text = CONSTRUCTED[name]
    if text != "same arguments on all ranks":
        for raised, _ in on(3, construct, name, [0, 1, 2], seconds=20):
            assert raised is not None and raised[0] == kind and text in raised[1]
    for rank, (raised, _) in enumerate(on(3, construct, name, [1], seconds=20)):
        assert raised is not None, rank
        if rank == 1 or text == "same arguments on all ranks":
            assert raised[0] == kind and text in raised[1]
        else:
            assert raised[0] == "RuntimeError" and "rank 1" in raised[1]


def numbers_of_classes(rank, world, name):
    """Numbers [C] that are the same on all ranks, and then other ones on the last."""
    numbers = torch.linspace(0.1, 0.4, C)
    values, raised = [], None
    for other in (numbers, torch.where(torch.arange(C) == C - 1, 0.3, numbers)):
        try:
            head = make_head(world, make(**{name: other if rank == world - 1 else numbers}))
            values.append(head(*batch(rank)).item())
        except Exception as error:
            raised = type(error).__name__, str(error)
    return values, raised


@pytest.mark.parametrize("name", ["margin", "class_weight"])
def test_numbers_of_classes_that_differ_between_ranks(name):
    results = on(3, numbers_of_classes, name, seconds=20)
    (expected,) = results[0][0]
    for (value,), raised in results:
        assert value == expected and raised[0] == "RuntimeError"
        assert f"rank 0 has {name}='[13] with the digest " in raised[1] and f"and rank 2 has {name}='[13]" in raised[1]


def used_otherwise(rank, world):
    """What each misuse of a good head raises, and that it is good still."""
    head = make_head(world, blocks=2)
    x, y = batch(rank)
    raised = {}

    def attempt(name, call):
        try:
            call()
        except Exception as error:
            raised[name] = f"{type(error).__name__}: {error}"
        else:
            raised[name] = None

    attempt("the loss called", lambda: head.loss(x, y))
    attempt("the loss's logits", lambda: head.loss.logits(x))
    attempt("the loss spread again", lambda: make_head(world, head.loss))
    attempt("second derivatives", lambda: torch.autograd.grad(head(x, y), x, create_graph=True))
    head.prepare(y)  # and its forward does not come
    head.prepare(y)
    attempt("other labels", lambda: head(x, y.clone()))
    attempt("changed labels", lambda: (head.prepare(y), y.add_(0), head(x, y)))
    head.prepare(y)
    attempt("appended after prepare", lambda: head.append_classes(2))
    head(x, y)
    attempt("no classes appended", lambda: head.append_classes(0))
    attempt("some gradients", lambda: make_head(world)(x if rank else x.detach(), y))
    narrow = [x.detach().to(torch.float32 if rank else torch.bfloat16)] * 2
    mesh = init_device_mesh("cpu", (world,))
    attempt("some dtypes", lambda: ClassParallel(torchmargin.ArcFaceLoss(D, C), mesh)(narrow[0], y))
    attempt("dtypes of inference", lambda: ClassParallel(torchmargin.ArcFaceLoss(D, C), mesh).top1(narrow[0]))
    attempt("other numbers of classes", lambda: make_head(world).append_classes(2 + rank))
    stepping = make_head(world)
    handles = step_in_backward(stepping, torch.optim.SGD(stepping.parameters(), 0.1))
    attempt("appended while it steps", lambda: stepping.append_classes(2))
    stepping.loss.reduction = "none"
    attempt("losses of rows while it steps", lambda: stepping(x, y))
    assert [handle.remove() for handle in handles] == [None]
    attempt("no weight", lambda: import_weight(head, None))
    attempt("a state_dict as the weight", lambda: import_weight(head, {"weight": None}))
    margins = torchmargin.CosFaceLoss(D, C, margin=torch.linspace(0.1, 0.4, C))
    attempt("appended without margins", lambda: make_head(world, margins).append_classes(2))
    weighted = make(class_weight=torch.ones(C))
    attempt("appended without weights", lambda: make_head(world, weighted).append_classes(2))
    return raised, head(x, y).item()


MISUSES = {
    "the loss called": "RuntimeError: ArcFaceLoss: its classes are spread over ranks",
    "the loss's logits": "RuntimeError: ArcFaceLoss: its classes are spread over ranks",
    "the loss spread again": "ValueError: expected a loss with its own weights",
    "second derivatives": "RuntimeError: class_parallel: second derivatives",
    "changed labels": "RuntimeError: ClassParallel: expected the labels that prepare() was given, as they were",
    "other labels": "RuntimeError: ClassParallel: expected the labels that prepare() was given",
    "appended after prepare": "RuntimeError: append_classes: between prepare(labels) and its forward",
    "no classes appended": "ValueError: expected the number of new classes",
    "some gradients": "RuntimeError: ClassParallel: expected embeddings that require grad on all ranks or on none, but "
    "they do on some",
    "some dtypes": "RuntimeError: ClassParallel: expected embeddings of one dtype on all ranks, but got torch.float32",
    "dtypes of inference": "RuntimeError: ClassParallel: expected embeddings of one dtype on all ranks",
    "other numbers of classes": "RuntimeError: append_classes: expected the same number on all ranks",
    "appended while it steps": "RuntimeError: append_classes: remove the handles of step_in_backward",
    "losses of rows while it steps": "RuntimeError: ClassParallel: step_in_backward wants a scalar loss",
    "no weight": "ValueError: import_weight: expected a weight of shape",
    "a state_dict as the weight": "ValueError: import_weight: expected a weight of shape",
    "appended without margins": "RuntimeError: CosFaceLoss: margin has a number for each of the 13 old classes; set it "
    "to one number before append_classes",
    "appended without weights": "RuntimeError: ArcFaceLoss: class_weight has a number for each of the 13 old classes; "
    "set it to None before append_classes",
}


def test_misuses():
    results = on(3, used_otherwise, seconds=20)
    for raised, _ in results:
        assert raised.keys() == MISUSES.keys()
        for name, text in MISUSES.items():
            assert raised[name] is not None and raised[name].startswith(text), (name, raised[name])


OPTIMIZERS = {
    "SGD foreach": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, foreach=True),
    "SGD for loop": lambda ps: torch.optim.SGD(ps, 0.1, foreach=False),
    "AdamW": lambda ps: torch.optim.AdamW(ps, 0.1),
    "AdamW fused": lambda ps: torch.optim.AdamW(ps, 0.1, fused=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, 0.1),
}


def stepped(rank, world, name):
    """A second backward after a step, of one block or more; a forward after it is as good as any."""
    head = make_head(world, blocks=2)
    optimizer = OPTIMIZERS[name](head.parameters())
    x, y = batch(rank)
    value = head(x, y)
    value.backward(retain_graph=True)
    value.backward(retain_graph=True)  # nothing has changed yet
    optimizer.step()
    with pytest.raises(RuntimeError, match="the weights have changed since this forward"):
        value.backward()
    head(x, y).backward()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_backward_after_a_step(name):
    on(3, stepped, name, seconds=20)


class Whole(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.network, self.head = torch.nn.Linear(D, D), head

    def forward(self, x, y):
        return self.head(self.network(x), y)


def wrapped(rank, world):
    x, y = batch(rank)
    raised = []
    for wrap in (
        lambda head: DistributedDataParallel(Whole(head))(x, y),
        lambda head: DistributedDataParallel(head)(x, y),
        lambda head: fully_shard(head, mesh=head.mesh)(x, y),
        lambda head: fully_shard(Whole(head), mesh=head.mesh)(x, y),
    ):
        try:
            wrap(make_head(world))
        except Exception as error:
            raised.append(f"{type(error).__name__}: {error}")
        else:
            raised.append(None)
    return raised


def test_a_head_inside_ddp_or_fsdp():
    """torch refuses DTensors itself while it wraps, in words of its own where it sees the uneven ones."""
    for raised in on(3, wrapped, seconds=20):
        assert all(error is not None for error in raised), raised


def in_forward(rank, world):
    """Where wrapping went well, as with a network under DistributedDataParallel that the head was put into later."""
    head, (x, y) = make_head(world), batch(rank)
    network = DistributedDataParallel(Whole(torch.nn.Identity()))
    network.module.head = head
    with pytest.raises(
        RuntimeError, match="ClassParallel: its weights differ from rank to rank, so it takes part in no"
    ):
        network(x.to(torch.float32), y)


def test_a_head_that_is_called_inside_ddp():
    on(3, in_forward, seconds=20)
