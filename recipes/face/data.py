"""Images to train on: folders or record files, decoded and changed the same way whoever asks for them.

What happens to an image depends on the seed, the epoch and its place alone. So a run that is resumed in the middle of
an epoch, or has another number of workers, sees the same pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from recipes.face.config import Config
from recipes.face.errors import RecipeError
from recipes.face.photos import BadImageError, classes_of, decode, fitted
from recipes.face.records import RecordError, TrainingRecords

IGNORED = -100  # the label of an image that could not be read: it counts for nothing


class Images(Protocol):
    """Encoded images and their classes."""

    classes: int

    def __len__(self) -> int: ...

    def read(self, place: int) -> tuple[bytes, int]: ...

    def name(self, place: int) -> str: ...


class FolderImages:
    """A subfolder for each class, numbered by their names' order."""

    def __init__(self, folder: Path) -> None:
        found = classes_of(folder)
        self.paths = [path for paths in found.values() for path in paths]
        self.labels = [label for label, paths in enumerate(found.values()) for _ in paths]
        self.classes = len(found)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, place: int) -> tuple[bytes, int]:
        return self.paths[place].read_bytes(), self.labels[place]

    def name(self, place: int) -> str:
        return str(self.paths[place])


class RecordImages:
    """InsightFace's ``train.rec``."""

    def __init__(self, path: Path) -> None:
        self.records = TrainingRecords(path)
        self.classes = self.records.count_classes()

    def __len__(self) -> int:
        return len(self.records)

    def read(self, place: int) -> tuple[bytes, int]:
        return self.records[place]

    def name(self, place: int) -> str:
        return f"{self.records.file.path}, record {self.records.keys[place]}"


def open_images(path: Path) -> Images:
    """A folder of classes, a ``.rec``, or a folder with a ``train.rec``."""
    if path.suffix == ".rec":
        if not path.is_file():
            raise RecipeError(f"{path} is no file")
        return RecordImages(path)
    if (path / "train.rec").is_file():
        return RecordImages(path / "train.rec")
    return FolderImages(path)


# ---- changes -------------------------------------------------------------------------------------------------------


def change(image: Image.Image, config: Config, random: np.random.Generator) -> Image.Image:
    """Mirrored, and made worse as AdaFace's training does, each by its chance. Always as many random numbers."""
    chances, amounts = random.random(5).tolist(), random.random(6).tolist()
    if chances[0] < config.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if chances[1] < config.low_resolution:
        small = max(4, round(image.width * (0.2 + 0.8 * amounts[0])))
        image = image.resize((small, small), Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.BILINEAR)
    if chances[2] < config.blur:
        image = image.filter(ImageFilter.GaussianBlur(0.3 + 1.7 * amounts[1]))
    if chances[3] < config.hsv:
        hue, saturation, value = image.convert("HSV").split()
        turned = hue.point([(each + round(36 * amounts[2]) - 18) % 256 for each in range(256)])
        factors = [0.6 + 0.8 * amount for amount in amounts[3:5]]
        others = [
            band.point([min(255, round(each * factor)) for each in range(256)])
            for band, factor in zip((saturation, value), factors)
        ]
        image = Image.merge("HSV", (turned, *others)).convert("RGB")
    if chances[4] < config.grey:
        image = image.convert("L").convert("RGB")
    return image


class Place(NamedTuple):
    """What a sampler asks for."""

    epoch: int
    image: int


class TrainingSet(Dataset[tuple[Tensor, int]]):
    """``dataset[Place]``: pixels [3, S, S] uint8 and the class."""

    def __init__(self, images: Images, config: Config, on_bad: str = "fail") -> None:
        self.images, self.config, self.on_bad = images, config, on_bad

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: Place) -> tuple[Tensor, int]:
        size = self.config.size
        try:
            data, label = self.images.read(place.image)
            image = fitted(decode(data), size)
        except (BadImageError, RecordError, OSError) as error:
            name = self.images.name(place.image)
            text = str(error) if name in str(error) else f"{name}: {error}"
            if self.on_bad == "fail":
                raise RecipeError(text) from None
            print(f"skipped {text}", file=sys.stderr)
            return torch.full((3, size, size), 127, dtype=torch.uint8), IGNORED
        random = np.random.default_rng([self.config.seed, place.epoch, place.image])
        return torch.from_numpy(np.array(change(image, self.config, random))).permute(2, 0, 1), label


class EpochPlaces(Sampler[Place]):
    """A rank's share of an epoch's steps: each step's images are one stretch of a permutation of all, dealt in turn to
    the ranks. What is left at the end is of no step. ``start``: the step to begin with."""

    def __init__(self, images: int, of_step: int, rank: int, ranks: int, seed: int) -> None:
        if of_step > images:
            raise RecipeError(f"a step takes {of_step:,} images, but there are {images:,}; set a smaller --batch")
        self.count, self.of_step, self.rank, self.ranks, self.seed = images, of_step, rank, ranks, seed
        self.steps = images // of_step
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return (self.steps - self.start) * (self.of_step // self.ranks)

    def __iter__(self) -> Iterator[Place]:
        order = np.random.default_rng([self.seed, 1, self.epoch]).permutation(self.count)
        for step in range(self.start, self.steps):
            of_step = order[step * self.of_step : (step + 1) * self.of_step]
            for image in of_step[self.rank :: self.ranks]:
                yield Place(self.epoch, int(image))
