"""The five-point similarity beside least squares by numpy, and crops beside a bilinear sampler in float64."""

import cmath
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

Image = pytest.importorskip("PIL.Image")
from recipes.face.alignment import TEMPLATE, AlignmentError, Similarity, crop, similarity, template  # noqa: E402


def _by_least_squares(points, to):
    """x' = p x - q y + r, y' = q x + p y + s."""
    rows, wanted = [], []
    for (x, y), (u, v) in zip(points, to):
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]
        wanted += [u, v]
    (p, q, r, s), *_ = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)
    return complex(p, q), complex(r, s)


coordinate = st.floats(-2000, 2000, allow_nan=False, width=32)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(coordinate, coordinate), min_size=5, max_size=5, unique=True))
def test_beside_least_squares(points):
    a, b = _by_least_squares(points, TEMPLATE)
    try:
        found = similarity(points)
    except AlignmentError:
        return
    # Of five points that lie as near to each other as float32 allows, far from 0, the normal equations keep few digits.
    spread = np.std(np.array(points), axis=0).max()
    if spread < 1e-2 * (1 + np.abs(points).max()):
        return
    assert abs(found.a - a) < 1e-9 * (1 + abs(a)) and abs(found.b - b) < 1e-6 * (1 + abs(b))
    apart = found(torch.tensor(points, dtype=torch.float64)) - torch.tensor(TEMPLATE, dtype=torch.float64)
    assert found.residual == pytest.approx(apart.square().sum(1).mean().sqrt().item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("angle", [0.0, 0.5, -2.0, math.pi])
@pytest.mark.parametrize("scale", [0.05, 1.0, 9.0])
def test_a_turned_face_is_found_exactly(angle, scale):
    """A template that was moved by a known similarity comes back by its inverse, without a residual."""
    moved = Similarity(cmath.rect(scale, angle), complex(310.5, -42.25), 0.0)
    found = similarity(moved(template()))
    back = moved.inverse()
    assert abs(found.a - back.a) < 1e-12 * abs(back.a) and abs(found.b - back.b) < 1e-10 * (1 + abs(back.b))
    assert found.residual < 1e-9
    assert torch.allclose(found.inverse()(template()), moved(template()), rtol=1e-12, atol=1e-9)


def test_other_sizes():
    """Of 224 pixels every corner of the crop, and so every face in it, is at twice the place."""
    assert torch.allclose(template(224) + 0.5, 2 * (template(112) + 0.5), rtol=0, atol=1e-12)
    assert torch.equal(template(), torch.tensor(TEMPLATE, dtype=torch.float64))


@pytest.mark.parametrize(
    "landmarks, said",
    [
        ([[1.0, 2.0]] * 5, "all landmarks are one point"),
        ([[float("nan"), 2.0], *TEMPLATE[1:]], "a landmark is not finite"),
        (TEMPLATE[:4], r"expected landmarks of shape \[5, 2\], but got \[4, 2\]"),
    ],
)
def test_landmarks_that_say_nothing(landmarks, said):
    with pytest.raises(AlignmentError, match=said):
        similarity(landmarks)


def _smooth(width, height):
    """A picture without an edge, so that samplers may differ by their roundings alone."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [128 + 100 * np.sin(x / 9 + k) * np.cos(y / 7 - k) for k in range(3)]
    return Image.fromarray(np.stack(planes, -1).round().astype(np.uint8))


def _sample(image, back, size):
    """Bilinear at back(x, y), in float64; NaN outside."""
    pixels = np.asarray(image, dtype=np.float64)
    y, x = np.mgrid[0:size, 0:size]
    z = back.a * (x + 1j * y) + back.b
    u, v = z.real, z.imag
    left, top = np.floor(u).astype(int), np.floor(v).astype(int)
    inside = (left >= 0) & (top >= 0) & (left + 1 < pixels.shape[1]) & (top + 1 < pixels.shape[0])
    left, top = np.where(inside, left, 0), np.where(inside, top, 0)
    s, t = (u - left)[..., None], (v - top)[..., None]
    value = (1 - t) * ((1 - s) * pixels[top, left] + s * pixels[top, left + 1])
    value += t * ((1 - s) * pixels[top + 1, left] + s * pixels[top + 1, left + 1])
    return np.where(inside[..., None], value, np.nan)


@pytest.mark.parametrize("angle, scale", [(0.0, 1.0), (0.4, 0.8), (-1.2, 1.3)])
def test_crops_are_bilinear_samples(angle, scale):
    image = _smooth(260, 200)
    to_crop = Similarity(cmath.rect(1 / scale, -angle), complex(-40, -20) * cmath.rect(1 / scale, -angle), 0.0)
    got = np.asarray(crop(image, to_crop), dtype=np.float64)
    expected = _sample(image, to_crop.inverse(), 112)
    inside = ~np.isnan(expected)
    assert got.shape == (112, 112, 3) and inside.mean() > 0.3
    assert np.abs(got - expected)[inside].max() <= 1.5  # a rounding, and PIL's of the place to 2^-16 of a pixel


def test_the_identity_changes_no_pixel():
    image = _smooth(112, 112)
    assert np.array_equal(np.asarray(crop(image, Similarity(1 + 0j, 0j, 0.0))), np.asarray(image))


def test_large_photographs_are_reduced_before():
    """Eight pixels of the photograph to one: a fine pattern becomes grey, not a pattern of chance."""
    y, x = np.mgrid[0:1200, 0:1200]
    image = Image.fromarray((255 * ((x + y) % 2)).astype(np.uint8))
    got = np.asarray(crop(image, Similarity(0.125 + 0j, 0j, 0.0)), dtype=np.float64)
    assert np.abs(got - 127.5).max() < 2
    # And what is smooth stays where it is.
    got = np.asarray(crop(_smooth(1200, 1200), Similarity(0.25 + 0j, 0j, 0.0)), dtype=np.float64)
    expected = _sample(_smooth(1200, 1200), Similarity(4 + 0j, 0j, 0.0), 112)
    assert np.nanmean(np.abs(got - expected)) < 6
