"""What the options of losses and ops may be, in types: for annotations and type checkers."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor
from typing_extensions import TypedDict

__all__ = [
    "BinaryKind",
    "CosineMargin",
    "Extension",
    "LinearHead",
    "LinearMargin",
    "LinearRule",
    "MarginGradient",
    "MarginShape",
    "Reduction",
]

# The ops check the strings when they run; docs: torchmargin.functional.
Extension: TypeAlias = Literal["none", "linear", "continuous", "easy", "clip", "monotonic"]
MarginGradient: TypeAlias = Literal["exact", "straight_through"]
Reduction: TypeAlias = Literal["none", "mean", "sum"]
BinaryKind: TypeAlias = Literal["c", "a", "m"]


class MarginShape(TypedDict, total=False):
    """What a margin has one of for all rows."""

    m1: float
    extension: Extension
    margin_gradient: MarginGradient


class CosineMargin(MarginShape, total=False):
    """The margin of given cosines; tensors have a number for each."""

    m2: float | Tensor
    m3: float | Tensor
    margin_weight: float | Tensor


class LinearMargin(MarginShape, total=False):
    """The margin of the linear ops, and how they make their logits."""

    scale: float
    m2: float
    m3: float
    sample_m2: Tensor | None
    sample_m3: Tensor | None
    sample_margin_weight: Tensor | None
    margin_weight: float
    normalize_input: bool
    normalize_weight: bool


class LinearRule(LinearMargin, total=False):
    """The same, and what happens to other classes."""

    sub_centers: int
    hard_threshold: Tensor | None
    hard_coefficients: Tensor | None


class LinearHead(LinearRule, total=False):
    """What makes losses and logits takes beyond them."""

    hardest: int
    hardest_margin: float
