"""Numbers of a loss's constructor as attributes that stay live: checked when they are set, and saved.

A number that is saved stands in a 0-dim float64 buffer of its own name, so that a schedule (``loss.margin = 0.3``)
neither recompiles torch.compile nor is frozen by it, and no cast of the module rounds it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeGuard, TypeVar, cast, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchmargin.losses.base import MarginLoss

__all__ = [
    "Alias",
    "ClassWeight",
    "Number",
    "check_finite",
    "check_not_negative",
    "check_radians",
    "check_share",
    "is_number",
    "version_of",
]

Check = Callable[[str, float], Any]
Value = TypeVar("Value", bound="float | Tensor")


def check_finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"expected {name} to be finite, but got {value}")
    return value


def check_not_negative(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"expected {name} to be finite and not negative, but got {value}")
    return value


def check_share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"expected {name} in [0, 1], but got {value}")
    return value


def check_radians(name: str, angle: float) -> float:
    """The angle itself, refused if it can only be meant in degrees."""
    if not abs(angle) <= math.pi:
        raise ValueError(f"expected {name} in radians, not degrees: at most pi in size, but got {angle}")
    return angle


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def version_of(tensor: Tensor) -> int:
    """How often it has been written to; an inference tensor does not know."""
    return 0 if tensor.is_inference() else tensor._version


def _copied(name: str, value: Tensor) -> Tensor:
    """Numbers of classes, in a float64 tensor of its own."""
    if value.is_meta:
        raise ValueError(f"expected {name} to hold numbers, but it is on the meta device; make it on another")
    return value.detach().to(torch.float64, copy=True)


class Number(Generic[Value]):
    """A number among a loss's attributes. ``check(name, value)`` raises ValueError for a bad one.

    ``of_classes``: it may also be a tensor [C], a number for each class.
    """

    name: str

    @overload
    def __init__(self: Number[float], check: Check = ..., *, of_classes: Literal[False] = False) -> None: ...
    @overload
    def __init__(self: Number[float | Tensor], check: Check = ..., *, of_classes: Literal[True]) -> None: ...
    def __init__(self, check: Check = check_finite, *, of_classes: bool = False) -> None:
        self.check = check
        self.of_classes = of_classes

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, loss: None, owner: type) -> Number[Value]: ...
    @overload
    def __get__(self, loss: MarginLoss, owner: type) -> Value: ...
    def __get__(self, loss: MarginLoss | None, owner: type) -> Number[Value] | Value:
        return self if loss is None else cast(Value, self._value(loss))

    def _value(self, loss: MarginLoss) -> float | Tensor:
        if self.name not in loss._numbers:
            raise AttributeError(f"{type(loss).__name__} has no number {self.name!r} yet")
        buffer = loss._buffers.get(self.name)
        if buffer is not None and buffer.dim() > 0:
            return buffer
        if buffer is None or buffer.is_meta or torch.compiler.is_compiling():
            return loss._numbers[self.name]
        return buffer.item()

    def __set__(self, loss: MarginLoss, value: float | Tensor) -> None:
        loss._set_number(self, value)

    def checked(self, loss: MarginLoss, value: object) -> float | Tensor | None:
        """The value as a float, or as a float64 tensor [C] of its own."""
        owner = type(loss).__name__
        if is_number(value):
            number = float(value)
            self.check(self.name, number)
            return number
        wanted = "a number" + (f" or a tensor of shape [{loss.num_classes}]" if self.of_classes else "")
        if not self.of_classes or not isinstance(value, Tensor) or value.dim() == 0:
            what = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise TypeError(f"{owner}: expected {self.name} to be {wanted}, but got {what}")
        if value.shape != (loss.num_classes,) or not value.is_floating_point():
            raise TypeError(
                f"{owner}: expected {self.name} to be {wanted}, but got {value.dtype} of shape {list(value.shape)}"
            )
        if value.requires_grad:
            raise TypeError(
                f"{owner}: expected {self.name} not to require grad, there is no gradient to it; detach it, or return "
                f"sample_m2 or sample_m3 from sample_margins"
            )
        values = _copied(self.name, value)
        # The one farthest from 0, or one that is no number, is what a check would refuse.
        self.check(self.name, values[values.abs().nan_to_num(nan=math.inf).argmax()].item())
        return values


class ClassWeight(Number[Any]):
    """A tensor [C], or None: then it is not among the loss's numbers. Its buffer is not saved."""

    def _value(self, loss: MarginLoss) -> Any:
        return loss._buffers.get(self.name)

    def __set__(self, loss: MarginLoss, value: Any) -> None:
        loss._set_number(self, value)

    def checked(self, loss: MarginLoss, value: object) -> Tensor | None:
        if value is None:
            return None
        wanted = f"{type(loss).__name__}: expected {self.name} to be"
        if not isinstance(value, Tensor):
            raise TypeError(f"{wanted} a tensor of shape [{loss.num_classes}] or None, but got {value!r}")
        if value.shape != (loss.num_classes,) or not value.is_floating_point():
            raise TypeError(
                f"{wanted} a floating-point tensor of shape [{loss.num_classes}], but got {value.dtype} of shape "
                f"{list(value.shape)}"
            )
        if value.requires_grad:
            raise TypeError(f"{wanted} without requires_grad, there is no gradient to it; detach it")
        values = _copied(self.name, value)
        bad = ~((values >= 0) & (values < math.inf))
        if bad.any():
            raise ValueError(
                f"expected {self.name} to be finite and not negative, but {self.name}[{int(bad.nonzero()[0])}] is "
                f"{values[bad][0].item()}"
            )
        return values


class Alias(Number[Any]):
    """Another name of a number."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of = of

    def _value(self, loss: MarginLoss) -> Any:
        return getattr(loss, self.of)

    def __set__(self, loss: MarginLoss, value: float | Tensor) -> None:
        setattr(loss, self.of, value)
