"""What an exporter that knows nothing of our ops makes of them: in an ONNX export margin_logits is its formula.

margin_logits is composite: whoever traces it takes it apart into private ops. ``torch.onnx.export(..., dynamo=True)``
has no translation of those, so it is given the formula in ATen's ops instead, and the caller needs no table of
translations. torch.compile, torch.export and AOTInductor meet the private ops as before.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchmargin import reference
from torchmargin._extension import _C  # noqa: F401  (registers the ops)

__all__ = ["margin_logits_formula"]


def margin_logits_formula(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    **head: Any,
) -> Tensor:
    """The logits [B, C] of :func:`torchmargin.functional.margin_logits`, in its results' dtype throughout.

    ``compute_dtype`` is the lowest precision allowed, and not taken here.
    """
    acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
    input, weight = input.to(acc), weight.to(acc)
    bias = None if bias is None else bias.to(acc)
    changed = head.get("hard_coefficients") is not None or head.get("hardest", 0) > 0
    if target is not None or changed:
        return reference.margin_logits(input, weight, target, bias, **head)
    sub_centers = head.get("sub_centers", 1)
    rows = reference.unit(input) if head.get("normalize_input", True) else input
    centers = reference.unit(weight) if head.get("normalize_weight", True) else weight
    products = F.linear(rows, centers)
    if sub_centers > 1:
        products = products.unflatten(1, (weight.shape[0] // sub_centers, sub_centers)).amax(2)
    logits = products * float(head.get("scale", 1.0))
    return logits if bias is None else logits + bias


_OP = torch.ops.torchmargin.margin_logits.default
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


@_OP.py_impl(_COMPOSITE)  # asked for by tracers alone: eager calls never come to Python
def _traced(*args: Any, **kwargs: Any) -> Any:
    onnx = sys.modules.get("torch.onnx")  # torch imports it at its first use, and so would we
    if onnx is not None and onnx.is_in_onnx_export():
        return margin_logits_formula(*args, **kwargs)
    return _OP._op_dk(_COMPOSITE, *args, **kwargs)
