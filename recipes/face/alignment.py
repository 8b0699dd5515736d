"""Faces to 112 x 112 by five landmarks: eyes, nose, corners of the mouth (each left before right, as one sees them).

The similarity (rotation, one scale, shift) that brings landmarks nearest to the template, by least squares: with points
as complex numbers it is z -> a z + b, and a = cov(z, w) / var(z). Coordinates are of pixel centers, (0, 0) the first
pixel's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from recipes.face.errors import RecipeError

# At 112 x 112; ArcFace's, which the field aligns to.
TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
TEMPLATE_SIZE = 112
Points = Sequence[Sequence[float]]


class AlignmentError(RecipeError):
    """Landmarks that say nothing about where a face is."""


class Similarity(NamedTuple):
    """z -> a z + b with complex a and b: from the photograph to the crop."""

    a: complex
    b: complex
    residual: float  # root mean square distance of the landmarks to the template, in pixels of the crop

    def __call__(self, points: Tensor) -> Tensor:
        """[..., 2] float64 to [..., 2]."""
        x, y = points.to(torch.float64).unbind(-1)
        a, b = self.a, self.b
        return torch.stack([a.real * x - a.imag * y + b.real, a.imag * x + a.real * y + b.imag], -1)

    def inverse(self) -> Similarity:
        return Similarity(1 / self.a, -self.b / self.a, self.residual / abs(self.a))


def template(size: int = TEMPLATE_SIZE, points: Points = TEMPLATE) -> Tensor:
    """[5, 2] float64: points at 112 x 112, scaled with the pixels, whose centers are half a pixel from the corner."""
    return (torch.tensor(points, dtype=torch.float64) + 0.5) * (size / TEMPLATE_SIZE) - 0.5


def similarity(landmarks: Tensor | Sequence[Sequence[float]], to: Tensor | None = None) -> Similarity:
    """The nearest similarity from landmarks [N, 2] to ``to`` [N, 2] (default: the template).

    Raises AlignmentError where the landmarks are not finite or all one point.
    """
    to = template() if to is None else to.to(torch.float64)
    points = torch.as_tensor(landmarks, dtype=torch.float64)
    if points.shape != to.shape or points.dim() != 2 or points.shape[1] != 2:
        raise AlignmentError(f"expected landmarks of shape {list(to.shape)}, but got {list(points.shape)}")
    if not bool(points.isfinite().all()):
        raise AlignmentError("a landmark is not finite")
    z = torch.view_as_complex(points.contiguous())
    w = torch.view_as_complex(to.contiguous())
    centered, wanted = z - z.mean(), w - w.mean()
    size = float(centered.abs().square().sum())
    if size <= 1e-20 * max(1.0, float(z.abs().square().sum())):
        raise AlignmentError("all landmarks are one point")
    a = complex((centered.conj() * wanted).sum()) / size
    b = complex(w.mean()) - a * complex(z.mean())
    if abs(a) == 0.0:
        raise AlignmentError("no similarity brings these landmarks near to a face")
    residual = math.sqrt(float((a * z + b - w).abs().square().mean()))
    return Similarity(a, b, residual)


def crop(image: Image.Image, to_crop: Similarity, size: int = TEMPLATE_SIZE) -> Image.Image:
    """The aligned face, size x size, RGB; bilinear, black outside. A much larger photograph is reduced before."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    factor = int(1 / abs(to_crop.a) / 2)  # of whole pixels, so that bilinear reads every one
    back = to_crop.inverse()
    a, b = back.a, back.b
    if factor > 1:
        image = image.reduce(factor)
        a, b = a / factor, (b + 0.5 * (1 + 1j)) / factor - 0.5 * (1 + 1j)
    # PIL asks for where the pixel (x, y) comes from, with centers at + 0.5.
    shift = b + 0.5 * (1 + 1j) - a * 0.5 * (1 + 1j)
    matrix = (a.real, -a.imag, shift.real, a.imag, a.real, shift.imag)
    return image.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
