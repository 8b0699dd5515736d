from typing import NamedTuple

import pytest
import torch

import torchmargin


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Sizes(NamedTuple):
    rows: int = 9
    features: int = 6
    classes: int = 23


# Under 4 KiB a problem crosses many chunks; some are kept in the second case, none in the third,
# which also crosses row tiles. test_limits.py checks that it is so.
WORKSPACES = {
    "default": (256 << 20, Sizes()),
    "4KiB-kept": (4096, Sizes(9, 2, 61)),
    "4KiB-recomputed": (4096, Sizes(40, 3, 61)),
}


@pytest.fixture(params=WORKSPACES)
def workspace(request):
    """Sets the workspace limit and gives the sizes to run under it."""
    limit, sizes = WORKSPACES[request.param]
    with torchmargin.workspace_limit(limit):
        yield sizes


def problem(rows=9, features=6, classes=23, dtype=torch.float64, bias=False):
    """Leaf tensors (input, weight, target, bias or None), all but the target with gradients."""
    x = torch.randn(rows, features, dtype=dtype).requires_grad_()
    w = torch.randn(classes, features, dtype=dtype).requires_grad_()
    b = torch.randn(classes, dtype=dtype).requires_grad_() if bias else None
    return x, w, torch.randint(0, classes, (rows,)), b


def gradients(loss, *leaves, upstream=None):
    return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None], upstream)


EXTENSIONS = ["none", "linear", "easy", "clip", "monotonic", "continuous"]
SCALAR_TYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15, torch.int32: 3, None: -1}


def margin_numbers(
    scale=1.0, m1=1.0, m2=0.0, m3=0.0, extension="none", margin_weight=1.0, margin_gradient="exact"
) -> list[float]:
    """A margin as private ops take it: csrc/ops/numbers.h."""
    straight_through = float(margin_gradient == "straight_through")
    return [scale, m1, m2, m3, float(EXTENSIONS.index(extension)), margin_weight, straight_through]


# The private forward's results, by their place.
FORWARD_RESULTS = [
    "other_lse",
    "target_logit",
    "logit_sum",
    "hardest_logit",
    "target_angle",
    "max_other_logit",
    "hardest_class",
    "kept",
    "winners",
    "inverse_norms",
    "weight_sum",
    "row_state",
    "weight_scale",
]


def linear_numbers(
    normalize_input=True, normalize_weight=True, compute_dtype=None, sub_centers=1, hardest=0, **margin
) -> list[float]:
    """The same of a linear op; the last three are those of one against all, which it is not."""
    shape = [float(normalize_input), float(normalize_weight), SCALAR_TYPES[compute_dtype]]
    return [*margin_numbers(**margin), *shape, float(sub_centers), float(hardest), 0.0, 0.0, 1.0]


def packed(
    input,
    weight,
    target,
    bias=None,
    sample_m2=None,
    sample_m3=None,
    sample_margin_weight=None,
    hard_threshold=None,
    hard_coefficients=None,
    **options,
):
    """The arguments of a linear op as the private ones take them."""
    numbers = linear_numbers(**options)
    hard = [hard_threshold, hard_coefficients]
    return [input, weight, bias, sample_m2, sample_m3, target, sample_margin_weight, *hard, numbers]
