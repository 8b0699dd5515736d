"""Photographs on disk: finding and decoding them."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from recipes.face.errors import RecipeError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class BadImageError(RecipeError):
    """Bytes that are no image, or not a whole one."""


def decode(data: bytes) -> Image.Image:
    """Decoded to its end, as it was encoded; BadImageError for what is no image."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError:  # whose text names an object of ours
        raise BadImageError("no image: of no format that is known here") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImageError(f"no image: {error}"[:200]) from None
    return image


def upright(image: Image.Image) -> Image.Image:
    """RGB, turned as the camera says that it was held; what is transparent is black."""
    return ImageOps.exif_transpose(image).convert("RGB")


def fitted(image: Image.Image, size: int) -> Image.Image:
    """RGB, size x size: as it is, or resized."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)


def read_photo(path: Path) -> Image.Image:
    """Upright, RGB; BadImageError names the file."""
    try:
        return upright(decode(path.read_bytes()))
    except (BadImageError, OSError) as error:
        raise BadImageError(f"{path}: {error}") from None


def _images(folder: Path) -> list[Path]:
    return sorted(each for each in folder.rglob("*") if each.suffix.lower() in IMAGES and each.is_file())


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise RecipeError(f"{folder} is no folder")


def images_in(folder: Path) -> list[Path]:
    """All images under a folder, in the order of their names."""
    _check_folder(folder)
    found = _images(folder)
    if not found:
        raise RecipeError(f"{folder} has no images ({', '.join(IMAGES)})")
    return found


def classes_of(folder: Path) -> dict[str, list[Path]]:
    """The images of each subfolder, in the order of names."""
    _check_folder(folder)
    found = {each.name: _images(each) for each in sorted(folder.iterdir()) if each.is_dir()}
    found = {name: images for name, images in found.items() if images}
    bad = next((name for name in found if "\n" in name or "\r" in name), None)
    if bad is not None:
        raise RecipeError(f"{folder} has a class {bad!r}, which is no line of a text")
    if not found:
        raise RecipeError(f"{folder} has no subfolders with images ({', '.join(IMAGES)})")
    return found


def bad(what: object, error: Exception, on_bad: str) -> None:
    """Something that cannot be used: fails, or is named."""
    if on_bad == "fail":
        raise RecipeError(f"{what}: {error}") from None
    tqdm.write(f"skipped {what}: {error}", file=sys.stderr)
