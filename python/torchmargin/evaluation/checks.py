"""The arguments of this package, checked once: what is wrong is a ValueError that names the argument."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real

import torch
from torch import Tensor

__all__ = [
    "check_count",
    "check_embeddings",
    "check_labels",
    "check_places",
    "check_rates",
    "is_number",
    "is_whole",
    "unit",
]


def _what(value: object) -> str:
    return f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"


def is_number(value: object) -> bool:
    """Python's or numpy's, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_count(name: str, value: int, largest: int | None = None, of: str = "", *, smallest: int = 1) -> int:
    """A whole number from `smallest` to `largest`, which is the size of `of`."""
    if not is_whole(value) or value < smallest or (largest is not None and value > largest):
        bounds = f"of at least {smallest}"
        if largest is not None:
            bounds = f"between {smallest} and the size of the {of}, {largest}"
        raise ValueError(f"expected {name} to be a whole number {bounds}, but got {_what(value)}")
    return int(value)


def check_rates(name: str, rates: Iterable[float]) -> tuple[float, ...]:
    if not isinstance(rates, Iterable) or isinstance(rates, (str, Tensor)):
        raise ValueError(f"expected {name} to be a sequence of rates in [0, 1], but got {_what(rates)}")
    rates = tuple(rates)
    for rate in rates:
        if not isinstance(rate, Real) or not 0 <= rate <= 1:
            raise ValueError(f"expected {name} to hold rates in [0, 1], but got {_what(rate)}")
    return rates


def check_embeddings(name: str, embeddings: Tensor) -> None:
    if not isinstance(embeddings, Tensor) or embeddings.dim() != 2 or not embeddings.is_floating_point():
        raise ValueError(
            f"expected {name} to be a floating-point tensor of shape [N, D], but got "
            f"{_what(embeddings) if isinstance(embeddings, Tensor) else type(embeddings).__name__}"
        )


def unit(name: str, embeddings: Tensor) -> Tensor:
    """Rows of unit length in float32 or better; a zero row stays zero. NaN and infinity are refused."""
    wide = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)  # not finite if any number of the row is not
    bad = length.squeeze(1).isfinite().logical_not()
    if bad.any():
        row = int(bad.nonzero()[0])
        why = "overflow in their length" if wide[row].isfinite().all() else "hold NaN or infinity"
        raise ValueError(
            f"expected {name} to be finite, but {int(bad.sum())} of {len(bad)} rows {why}; the first is row {row}"
        )
    directions: Tensor = wide / length.clamp_min(1e-12)
    return directions


def check_labels(name: str, labels: Tensor, rows: int | None = None) -> Tensor:
    """As int64, on the device that they are on."""
    shape = "[N]" if rows is None else f"[{rows}]"
    fits = isinstance(labels, Tensor) and labels.dim() == 1 and (rows is None or len(labels) == rows)
    if not fits or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"expected {name} to be an integer tensor of shape {shape}, but got "
            f"{_what(labels) if isinstance(labels, Tensor) else type(labels).__name__}"
        )
    return labels.long()


def check_places(name: str, places: Tensor, rows: int) -> Tensor:
    """Indices [P] of rows, none of them counted from the end."""
    if isinstance(places, Tensor) and places.dtype == torch.bool:
        raise ValueError(f"expected {name} to hold indices, but got {_what(places)}; `.nonzero()` makes them of a mask")
    places = check_labels(name, places)
    bad = (places < 0) | (places >= rows)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"expected {name} to hold indices of the {rows} rows, 0 to {rows - 1}, but {int(bad.sum())} of {len(bad)} "
            f"lie outside; the first is {name}[{at}] = {int(places[at])}"
        )
    return places
