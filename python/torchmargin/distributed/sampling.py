"""Which classes a training step sees: the batch's own, and others that a hash of seed, step and class draws.

Every rank draws for its own classes alone, and what it draws depends on neither its rank nor their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["ClassSampler", "Sampler", "uniform_of"]

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # the constants of splitmix64, as int64 has them
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)
_CLASSES_AT_ONCE = 1 << 20  # 8 MiB for each temporary


class Sampler(Protocol):
    """What :class:`ClassParallel` asks of a sampler: the classes of a step, drawn on each rank for its own alone."""

    @property
    def rate(self) -> float:
        """The share of the classes outside the batch that a step sees."""

    @property
    def correction(self) -> bool:
        """Whether classes that were drawn by the hash alone get the bias -log(rate)."""

    def draw(self, first_class: int, count: int, step: int | Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
        """The classes among [first_class, first_class + count) that this step sees.

        ``positives`` are the batch's classes, int64, sorted, each once; those outside the range are others' to draw.
        Returns the classes [m] int64, sorted, and [m] bool: whether a class is none of the positives.
        """


@dataclass(frozen=True)
class ClassSampler:
    """Draws the batch's classes and each other class with probability ``rate``, anew at every step.

    Args:
        rate: in (0, 1]; 1 draws all classes.
        seed: another seed, another sequence of draws.
        correction: whether the logits of classes that were drawn by chance alone are raised by -log(rate), so that the
            softmax's denominator is right on average. Without it the loss is lower than that of all classes.
    """

    rate: float
    seed: int = 0
    correction: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"expected rate in (0, 1], but got {self.rate}")

    @torch.no_grad()
    def draw(self, first_class: int, count: int, step: int | Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Sampler.draw`."""
        classes, by_chance = [positives.new_empty(0)], [positives.new_empty(0, dtype=torch.bool)]
        for begin in range(first_class, first_class + count, _CLASSES_AT_ONCE):
            end = min(begin + _CLASSES_AT_ONCE, first_class + count)
            chosen = uniform_of(self.seed, step, torch.arange(begin, end, device=positives.device)) < self.rate
            alone = torch.ones_like(chosen)
            own = positives[(positives >= begin) & (positives < end)] - begin
            chosen[own], alone[own] = True, False
            places = chosen.nonzero().squeeze(1)
            classes.append(places + begin)
            by_chance.append(alone[places])
        return torch.cat(classes), torch.cat(by_chance)


def uniform_of(seed: int, step: int | Tensor, classes: Tensor) -> Tensor:
    """A number in [0, 1) for each class: float64, the same on every device.

    It is the class's output of a splitmix64 generator whose seed is the step's output of the one seeded with ``seed``.
    """
    # NB: the product with int64's constants wraps; a Python product of them would not.
    steps = torch.as_tensor(step, dtype=torch.int64, device=classes.device)
    state = _mixed(_int64(seed) + (steps + 1) * _GOLDEN)
    return _shifted(_mixed(state + (classes + 1) * _GOLDEN), 11).double() * 2.0**-53


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left: int64's own shift repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _int64(value: int) -> int:
    """The value's low 64 bits, as int64 has them."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
