"""_recall_state: a step outside a backward pass, its state again inside one."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import torchmargin  # noqa: F401  (registers the ops)

recall_state = torch.ops.torchmargin._recall_state
K, S = 2, 1


def _log(rows=4):
    log = torch.zeros(rows, K + 1 + S, dtype=torch.float64)
    log[:, :K] = math.inf
    return log


def _numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_steps_are_logged_newest_first_and_the_oldest_falls_out():
    log = _log(rows=2)
    for step in range(3):
        state = _numbers(10.0 + step)
        then, fresh = recall_state(log, _numbers(step, -step), state)
        assert fresh.dtype == torch.bool and fresh.dim() == 0 and fresh.item()
        assert torch.equal(then, state) and then.data_ptr() != state.data_ptr()
    assert log.tolist() == [[2.0, -2.0, -1.0, 12.0], [1.0, -1.0, -1.0, 11.0]]


class InBackward(torch.autograd.Function):
    """Calls the op from inside a backward pass."""

    @staticmethod
    def forward(ctx, x, calls):
        ctx.calls = calls
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.calls()
        return grad, None


def _recalled(log, *keys):
    found = []

    def calls():
        found.extend(recall_state(log, key, _numbers(-1.0)) for key in keys)

    InBackward.apply(torch.zeros(1, requires_grad=True), calls).sum().backward()
    assert not any(fresh.item() for _, fresh in found)
    return [then.item() for then, _ in found]


def test_the_nearest_row_is_recalled():
    log = _log()
    for value in (1.0, 2.0, 1e6):
        recall_state(log, _numbers(value, 5.0), _numbers(10 * value))
    before = log.clone()
    assert _recalled(log, _numbers(2.0, 5.0), _numbers(1.0 + 1e-9, 5.0), _numbers(1e6 + 1, 5.0)) == [20.0, 10.0, 1e7]
    assert len(set(log[:3, K].tolist())) == 1 and log[0, K] >= 0 and log[3, K] == 0.0
    log[:, K] = before[:, K]
    assert torch.equal(log, before)


def test_of_equal_keys_the_newest_that_this_backward_pass_has_not_had():
    log, key = _log(), _numbers(3.0, 4.0)
    for state in (1.0, 2.0, 3.0):
        recall_state(log, key, _numbers(state))
    for _ in range(2):  # a graph that is retained
        assert _recalled(log, key, key, key, key) == [3.0, 2.0, 1.0, 3.0]


def test_an_empty_log_gives_the_state_itself():
    log = _log()
    assert _recalled(log, _numbers(1.0, 1.0)) == [-1.0]
    assert torch.equal(log, _log())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_key_that_is_not_finite_finds_its_row(value):
    log = _log()
    recall_state(log, _numbers(1.0, 2.0), _numbers(1.0))
    recall_state(log, _numbers(value, 2.0), _numbers(2.0))
    assert _recalled(log, _numbers(value, 2.0), _numbers(1.0, 2.0)) == [2.0, 1.0]


class Counting(torch.nn.Module):
    """x * n in its n-th step, whatever is computed again."""

    def __init__(self):
        super().__init__()
        self.register_buffer("step", torch.zeros(S, dtype=torch.float64))
        self.register_buffer("log", _log())

    def forward(self, x):
        key = torch.stack([x.detach().sum(), x.detach().square().sum()]).double()
        moved = self.step + 1
        then, fresh = recall_state(self.log, key, moved)
        self.step.copy_(torch.where(fresh, then, self.step))
        return x * x * then.to(x.dtype)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_differentiates_the_step_that_was_made(use_reentrant):
    module = Counting()
    module(torch.randn(5))
    first, second = torch.randn(2, 5).unbind()
    first, second = first.requires_grad_(), second.requires_grad_()
    values = [checkpoint(module, x, use_reentrant=use_reentrant) for x in (first, second)]
    with torch.no_grad():
        module(torch.randn(5))  # a forward between
    sum(value.sum() for value in values).backward()
    assert module.step.item() == 4
    # The same bits: doubling is exact.
    assert torch.equal(values[0], first**2 * 2)
    assert torch.equal(first.grad, 2 * (first * 2)) and torch.equal(second.grad, 2 * (second * 3))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("where", ["no checkpoint", "inside", "outside"])
def test_compiled(backend, where):
    """Called at run time, once a step, and not folded, whether checkpoint is compiled too or around it."""
    module = Counting()

    def run(x):
        return checkpoint(module, x, use_reentrant=False) if where == "inside" else module(x)

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    for step in (1, 2, 3):
        x = torch.randn(5, requires_grad=True)
        value = checkpoint(compiled, x, use_reentrant=False) if where == "outside" else compiled(x)
        assert torch.equal(value, step * x**2)
        value.sum().backward()
        assert torch.equal(x.grad, 2 * (step * x))
        assert module.step.item() == step
    assert module.log[:3, K + 1].tolist() == [3.0, 2.0, 1.0]


def test_fake_tensors_and_opcheck():
    torch.library.opcheck(
        recall_state, (_log(), _numbers(1.0, 2.0), _numbers(3.0)), test_utils=("test_schema", "test_faketensor")
    )
    then, fresh = recall_state(_log().to("meta"), _numbers(1, 2).to("meta"), _numbers(3).to("meta"))
    assert then.shape == (S,) and fresh.shape == () and fresh.dtype == torch.bool


BAD = {
    "log dtype": ({"log": _log().float()}, "expected log to be Double, but got Float"),
    "key rank": ({"key": _log()}, r"expected key to have shape \[K\] with K > 0, but got \[4, 4\]"),
    "no key": ({"key": _numbers()}, r"expected key to have shape \[K\] with K > 0, but got \[0\]"),
    "state rank": ({"state": torch.tensor(1.0).double()}, r"expected state to have shape \[S\], but got \[\]"),
    "log columns": ({"state": _numbers(1, 2)}, r"expected log to have shape \[N, 5\] with N > 0, .*but got \[4, 4\]"),
    "no rows": ({"log": _log(0)}, r"expected log to have shape \[N, 4\] with N > 0, .*but got \[0, 4\]"),
    "device": ({"key": _numbers(1, 2).to("meta")}, "expected key on the device of log, cpu, but got meta"),
    "gradient": ({"state": _numbers(1).requires_grad_()}, "expected state not to require grad"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    change, text = BAD[case]
    given = {"log": _log(), "key": _numbers(1.0, 2.0), "state": _numbers(3.0), **change}
    with pytest.raises(RuntimeError, match=f"^_recall_state: {text}"):
        recall_state(**given)
