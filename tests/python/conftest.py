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
