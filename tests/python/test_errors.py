"""Every bad argument raises a clear text, from every path, before any work."""

import pytest
import torch

import torchmargin
import torchmargin.functional as F

from conftest import FORWARD_RESULTS, linear_numbers, margin_numbers, packed, problem

X, W = torch.randn(4, 6), torch.randn(9, 6)
Y = torch.zeros(4, dtype=torch.long)
LSE, LOSS = "linear_margin_lse", "linear_margin_cross_entropy"


def _good():
    return {"input": X, "weight": W, "target": Y}


# What to change in a good call, and what the text must say.
BAD = {
    "input none": ({"input": None}, "expected input to be a tensor, but got none"),
    "weight none": ({"weight": None}, "expected weight to be a tensor, but got none"),
    "target none": ({"target": None}, "expected target to be a tensor, but got none"),
    "input rank": ({"input": X[0]}, r"expected input to have shape \[B, D\], but got \[6\]"),
    "input dtype": ({"input": X.long()}, r"expected input to be float64, float32, bfloat16 or float16, but got Long"),
    "input complex": ({"input": X + 0j}, r"expected input to be float64, .*but got ComplexFloat"),
    "weight shape": (
        {"weight": W[:, :5]},
        r"expected weight to have shape \[C, 6\], but got \[9, 5\], for input of shape \[4, 6\]",
    ),
    "weight rank": ({"weight": W[0]}, r"expected weight to have shape \[C, 6\], but got \[6\]"),
    "weight dtype": ({"weight": W.double()}, r"expected weight to have the dtype of input, Float, but got Double"),
    "no classes": ({"weight": W[:0]}, r"expected weight to hold at least one class, but got shape \[0, 6\]"),
    "no features": ({"input": X[:, :0], "weight": W[:, :0]}, r"expected at least one feature, but got input of shape"),
    "weight device": ({"weight": W.to("meta")}, r"expected weight on the device of input, cpu, but got meta"),
    "sparse weight": ({"weight": W.to_sparse()}, r"expected weight to be a dense tensor, but got layout Sparse"),
    "target int32": (
        {"target": Y.int()},
        r"expected target to be int64, but got int32; convert it with target.long\(\)",
    ),
    "target dtype": ({"target": X[:, 0]}, r"expected target to be class indices of dtype int64, but got Float"),
    "target length": ({"target": Y[:3]}, r"expected target to have shape \[4\], but got \[3\]"),
    "target rank": ({"target": Y[:, None]}, r"expected target to have shape \[4\], but got \[4, 1\]"),
    "bias shape": ({"bias": torch.zeros(8)}, r"expected bias to have shape \[9\], but got \[8\]"),
    "bias dtype": (
        {"bias": torch.zeros(9).double()},
        r"expected bias to have the dtype of input, Float, but got Double",
    ),
    "sample_m2 shape": ({"sample_m2": torch.zeros(3)}, r"expected sample_m2 to have shape \[4\], but got \[3\]"),
    "sample_m2 scalar": ({"sample_m2": torch.tensor(0.0)}, r"expected sample_m2 to have shape \[4\], but got \[\]"),
    "sample_m3 dtype": (
        {"sample_m3": torch.zeros(4).half()},
        r"expected sample_m3 to be Float or Double, but got Half",
    ),
    "sample_m3 integer": ({"sample_m3": Y}, r"expected sample_m3 to be float64, .*but got Long"),
    "margin weight shape": (
        {"sample_margin_weight": torch.zeros(3)},
        r"expected sample_margin_weight to have shape \[4\] or to be 0-dimensional, but got \[3\]",
    ),
    "margin weight gradient": (
        {"sample_margin_weight": torch.ones(4, requires_grad=True)},
        r"expected sample_margin_weight not to require grad",
    ),
    "straight-through sample": (
        {"sample_m2": torch.zeros(4, requires_grad=True), "margin_gradient": "straight_through"},
        r"expected sample_m2 not to require grad with margin_gradient 'straight_through'",
    ),
    "scale": ({"scale": 0.0}, r"expected scale > 0, but got 0"),
    "scale nan": ({"scale": float("nan")}, r"expected scale to be finite, but got nan"),
    "m1": ({"m1": -1.0}, r"expected m1 > 0, but got -1"),
    "m2 inf": ({"m2": float("inf")}, r"expected m2 to be finite, but got inf"),
    "m3 nan": ({"m3": float("nan")}, r"expected m3 to be finite, but got nan"),
    "margin_weight": ({"margin_weight": 1.5}, r"expected margin_weight in \[0, 1\], but got 1.5"),
    "linear with m1": ({"m1": 2.0, "extension": "linear"}, r"expected m1 = 1 with extension 'linear', but got m1 = 2"),
    "easy with m1": ({"m1": 2.0, "extension": "easy"}, r"expected m1 = 1 with extension 'easy', but got m1 = 2"),
    "continuous with m1": (
        {"m1": 2.0, "extension": "continuous"},
        r"expected m1 = 1 with extension 'continuous', but got m1 = 2",
    ),
    "extension": (
        {"extension": "soft"},
        r"expected extension to be one of 'none', 'linear', 'easy', 'clip', 'monotonic', 'continuous', but got 'soft'",
    ),
    "margin_gradient": (
        {"margin_gradient": "approximate"},
        r"expected margin_gradient to be one of 'exact', 'straight_through', but got 'approximate'",
    ),
    "compute_dtype integer": (
        {"compute_dtype": torch.int32},
        r"expected compute_dtype to be float16, bfloat16 or float32, but got Int",
    ),
    "compute_dtype float64": (
        {"input": X.double(), "weight": W.double(), "compute_dtype": torch.float16},
        r"expected no compute_dtype with Double inputs",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("op", [LSE, LOSS])
@pytest.mark.parametrize("mode", ["eager", "inference", "private"])
def test_bad_arguments(case, op, mode):
    change, text = BAD[case]
    arguments = {**_good(), **change}
    if case == "no classes" and (op == LSE or mode == "private"):
        pytest.skip("a shard of the classes may hold none")
    if mode == "private":
        if case in ("extension", "margin_gradient", "sparse weight") or case.endswith("none"):
            pytest.skip("a private op has numbers for them, no None, and no kernel for a sparse tensor")
        op = "_linear_margin_forward"
        with pytest.raises(RuntimeError, match=f"^{op}: {text}"):
            torch.ops.torchmargin._linear_margin_forward(*packed(**arguments), None, True, 0, None)
        return
    if mode == "inference":
        if "requires_grad=True" in repr(change) or "require grad" in text:
            pytest.skip("gradients do not matter in inference mode")
        with torch.inference_mode(), pytest.raises(RuntimeError, match=f"^{op}: {text}"):
            getattr(torch.ops.torchmargin, op)(**arguments)
        return
    with pytest.raises(RuntimeError, match=f"^{op}: {text}"):
        getattr(torch.ops.torchmargin, op)(**arguments)


META_CASES = [case for case in BAD if "device" not in case and "sparse" not in case]


@pytest.mark.parametrize("case", META_CASES)
def test_bad_arguments_on_meta(case):
    change, text = BAD[case]
    arguments = {**_good(), **change}
    if any(name.startswith("grad") for name in change):
        return  # compiled autograd traces with gradients of unknown shape
    on_meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    for name, tensor in arguments.items():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            on_meta[name].requires_grad_() if on_meta[name].is_leaf else None
    with pytest.raises(RuntimeError, match=f"^{LOSS}: {text}"):
        torch.ops.torchmargin.linear_margin_cross_entropy(**on_meta)


def test_bad_arguments_under_compile():
    step = torch.compile(lambda x, w, y: F.linear_margin_cross_entropy(x, w, y), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"expected weight to have shape \[C, 6\], but got \[9, 5\]"):
        step(X, W[:, :5], Y)


def _calls(**change):
    """Every public op with one argument changed: (op, call) of those that have it."""
    linear = {**_good(), **{k: v for k, v in change.items() if k != "cosine"}}
    cosine = {
        "cosine": torch.rand(4, 9),
        "target": Y,
        **{k: v for k, v in change.items() if k not in ("input", "weight")},
    }
    (name,) = change
    if name != "cosine":
        yield LSE, lambda: F.linear_margin_lse(**linear)
        yield LOSS, lambda: F.linear_margin_cross_entropy(**linear)
        yield LOSS, lambda: torch.ops.torchmargin._linear_margin_cross_entropy_statistics(**linear)
        if not (name == "target" and change[name] is None):  # which means no target there
            yield "margin_logits", lambda: F.margin_logits(**linear)
    if name in ("cosine", "target"):
        yield "margin_cross_entropy", lambda: F.margin_cross_entropy(**cosine)
    if name == "cosine":
        yield "margin_transform", lambda: F.margin_transform(change["cosine"])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["input", "weight", "target", "cosine"])
def test_no_tensor_is_named(name, autocast):
    for op, call in _calls(**{name: None}):
        with torch.autocast("cpu", enabled=autocast):
            with pytest.raises(RuntimeError, match=f"^{op}: expected {name} to be a tensor, but got none"):
                call()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("name", ["input", "weight", "target", "cosine"])
def test_a_nested_tensor_is_named(name, layout):
    rows = [torch.arange(n) if name == "target" else torch.rand(n, 6) for n in (1, 3)]
    nested = torch.nested.nested_tensor(rows, layout=layout)
    for op, call in _calls(**{name: nested}):
        with pytest.raises(RuntimeError, match=f"^{op}: expected {name} to be a dense tensor, but got a nested one"):
            call()


@pytest.mark.parametrize("name", ["input", "weight", "target", "cosine"])
def test_what_is_no_tensor_at_all_is_named(name):
    """Torch's own text, which names the op and the argument."""
    for value in ([[0.0] * 6] * 4, X.numpy(), 1.0):
        for op, call in _calls(**{name: value}):
            with pytest.raises((RuntimeError, TypeError), match=rf"{op}(?s:.)*'{name}'"):
                call()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"reduction": "average"}, r"expected reduction to be one of 'none', 'mean', 'sum', but got 'average'"),
        ({"label_smoothing": -0.1}, r"expected label_smoothing in \[0, 1\], but got -0.1"),
        ({"label_smoothing": float("nan")}, r"expected label_smoothing in \[0, 1\], but got nan"),
    ],
)
def test_bad_arguments_of_the_loss(change, text):
    with pytest.raises(RuntimeError, match=f"^{LOSS}: {text}"):
        F.linear_margin_cross_entropy(X, W, Y, **change)


@pytest.mark.parametrize("value", [9, -1, 2**40, -(2**40)])
def test_target_out_of_range(value):
    y = Y.clone()
    y[2] = value
    text = rf"^{LOSS}: expected target values in \[0, 9\) or ignore_index \(-100\), but got {value} at row 2"
    with pytest.raises(IndexError, match=text):
        F.linear_margin_cross_entropy(X, W, y)
    assert F.linear_margin_cross_entropy(X, W, y, ignore_index=value).isfinite()
    assert F.linear_margin_lse(X, W, y).target_logit[2] == 0  # absent, in the core op


def test_a_limit_too_small_for_one_tile():
    x, w, y, _ = problem(features=512, dtype=torch.float32)
    with (
        torchmargin.workspace_limit(4096),
        pytest.raises(RuntimeError, match=r"workspace limit of 4096 bytes is too small"),
    ):
        F.linear_margin_cross_entropy(x, w, y)


def test_settings_refuse_nonsense():
    with pytest.raises(ValueError, match="expected the workspace limit to be a positive number of bytes, but got 0"):
        torchmargin.set_workspace_limit(0)
    with pytest.raises(ValueError, match="expected device type 'cpu' or 'cuda', but got 'tpu'"):
        torchmargin.get_workspace_limit("tpu")
    with pytest.raises(ValueError, match="expected dtype float64, float32, bfloat16 or float16, but got 'int64'"):
        torchmargin.plan(4, 5, 6, dtype=torch.int64)
    with pytest.raises(
        ValueError, match="expected compute_dtype float16, .* with dtype float32 only, but got 'float16'"
    ):
        torchmargin.plan(4, 5, 6, dtype=torch.float64, compute_dtype=torch.float16)
    with pytest.raises(ValueError, match="expected B >= 0, D >= 1 and C >= 1"):
        torchmargin.plan(4, 0, 6)
    if not torchmargin.config.cuda_architectures():
        with pytest.raises(ValueError, match="no CUDA kernels"):
            torchmargin.plan(4, 5, 6, device="cuda")


def _record():
    """What the private backward needs of its forward, by name."""
    results = torch.ops.torchmargin._linear_margin_forward(*packed(X, W, Y), None, True, 0, None)
    named = dict(zip(FORWARD_RESULTS, results, strict=True))
    return {name: named[name] for name in ("other_lse", *FORWARD_RESULTS[6:])}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"grad_other_lse": torch.zeros(3)}, r"expected grad_other_lse to have shape \[4\], but got \[3\]"),
        ({"grad_logit_sum": torch.zeros(4, 1)}, r"expected grad_logit_sum to have shape \[4\], but got \[4, 1\]"),
        ({"grad_other_lse": torch.ones(4).long()}, "expected grad_other_lse to be float64, .*but got Long"),
        ({"grad_other_lse": torch.ones(4, device="meta")}, "expected grad_other_lse on the device of input, cpu"),
        ({"other_lse": torch.zeros(3)}, r"expected other_lse to have shape \[4\], but got \[3\]"),
        ({"other_lse": torch.zeros(4)}, "expected other_lse as the forward returned it, in Double, but got Float"),
        ({"kept": torch.zeros(4, 10)}, r"expected kept to have shape \[4, at most 9\], but got \[4, 10\]"),
        ({"inverse_norms": torch.zeros(8)}, r"expected inverse_norms to have shape \[9\], but got \[8\]"),
        ({"row_state": torch.zeros(4, 3)}, r"expected row_state to have shape \[4, 5\], but got \[4, 3\]"),
        ({"weight_scale": torch.zeros(1)}, r"expected weight_scale to have shape \[0\], but got \[1\]"),
        ({"weight_sum": torch.zeros(5)}, r"expected weight_sum to have shape \[6\], but got \[5\]"),
    ],
)
def test_the_private_backward_refuses_what_does_not_fit(change, text):
    good = {
        "grad_other_lse": torch.ones(4),
        "grad_target_logit": None,
        "grad_logit_sum": torch.ones(4),
        "grad_hardest_logit": None,
        **_record(),
        "wanted": [True, True, False, False, False],
    }
    torch.ops.torchmargin._linear_margin_backward(*packed(X, W, Y), **good)
    with pytest.raises(RuntimeError, match="_linear_margin_backward: " + text):
        torch.ops.torchmargin._linear_margin_backward(*packed(X, W, Y), **{**good, **change})
    if any(name.startswith("grad") for name in change):
        return  # compiled autograd traces with gradients of unknown shape
    on_meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in {**good, **change}.items()}
    with pytest.raises(RuntimeError, match="_linear_margin_backward: " + text):
        torch.ops.torchmargin._linear_margin_backward(*packed(*(t.to("meta") for t in (X, W, Y))), **on_meta)


@pytest.mark.parametrize("name", ["other_lse", *FORWARD_RESULTS[6:]])
def test_the_private_backward_refuses_a_record_of_another_device(name):
    record = _record()
    record[name] = record[name].to("meta")
    text = f"_linear_margin_backward: expected {name} on the device of input, cpu, but got meta"
    with pytest.raises(RuntimeError, match=text):
        torch.ops.torchmargin._linear_margin_backward(
            *packed(X, W, Y),
            grad_other_lse=torch.ones(4),
            grad_target_logit=None,
            grad_logit_sum=torch.ones(4),
            grad_hardest_logit=None,
            **record,
            wanted=[True, True, False, False, False],
        )


def test_the_other_private_backwards_refuse_what_does_not_fit():
    ops = torch.ops.torchmargin
    more = {"row_state": torch.zeros(4, 5).double(), "wanted": [True, True, False, False, False]}
    with pytest.raises(RuntimeError, match=r"_margin_logits_backward: expected grad_logits to have shape \[4, 9\]"):
        ops._margin_logits_backward(*packed(X, W, Y), grad_logits=torch.ones(4, 8), inverse_norms=torch.ones(9), **more)
    with pytest.raises(RuntimeError, match=r"_margin_logits_backward: expected inverse_norms to have shape \[9\]"):
        ops._margin_logits_backward(*packed(X, W, Y), grad_logits=torch.ones(4, 9), inverse_norms=torch.ones(3), **more)
    upstream = {"grad_other_lse": torch.ones(3), "grad_target_logit": None, "grad_logit_sum": None}
    with pytest.raises(RuntimeError, match=r"_margin_cosine_backward: expected grad_other_lse to have shape \[4\]"):
        ops._margin_cosine_backward(
            torch.rand(4, 9),
            None,
            None,
            Y,
            None,
            margin_numbers(),
            **upstream,
            other_lse=torch.ones(4),
            wanted=[True, False, False],
        )
    with pytest.raises(RuntimeError, match=r"_margin_transform_backward: expected grad to have shape \[4, 9\]"):
        ops._margin_transform_backward(torch.ones(4), torch.rand(4, 9), margin_numbers())
    with pytest.raises(RuntimeError, match=r"_linear_margin_forward: expected kept_classes in \[0, 9\], but got 10"):
        ops._linear_margin_forward(*packed(X, W, Y), None, True, 10, None)


@pytest.mark.parametrize("numbers", [[], [1.0] * 14, [1.0] * 16, linear_numbers(scale=1.0)[:4] + [6.0] * 11])
def test_private_ops_refuse_numbers_that_they_cannot_read(numbers):
    arguments = packed(X, W, Y)
    arguments[-1] = numbers
    with pytest.raises(RuntimeError, match="a private op was given"):
        torch.ops.torchmargin._linear_margin_forward(*arguments, None, True, 0, None)
