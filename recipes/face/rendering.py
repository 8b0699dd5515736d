"""Drawn faces: people by parameters, each seen in many ways, with known landmarks.

No face data set with identities may be shipped with a program, so the tour trains on people who do not exist. A person
is a head, eyes, brows, nose, mouth, hair and marks; a view of them turns the head, moves the mouth, and changes light,
place and background. They are drawings: what is learned on them says nothing about photographs.
"""

from __future__ import annotations

import colorsys
import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from recipes.face.align import LANDMARKS

SIZE = 160  # of a picture, in pixels
_FINER = 2  # it is drawn so many times larger
Color = tuple[float, float, float]
Array = np.ndarray[Any, Any]


@dataclass
class Person:
    """Lengths in units of half a head's width; colours in [0, 1]."""

    skin: Color
    hair: Color
    iris: Color
    lips: Color
    jaw: float  # its width
    chin: float  # its length
    forehead: float
    eye_distance: float
    eye_width: float
    eye_height: float
    eye_slant: float
    eye_level: float
    brow_height: float
    brow_thickness: float
    brow_slant: float
    nose_length: float
    nose_width: float
    mouth_level: float
    mouth_width: float
    lip: float  # its thickness
    hair_top: float
    hair_sides: float
    fringe: float
    beard: float  # 0: none
    marks: list[tuple[float, float, float]]  # moles: x, y, radius

    @staticmethod
    def random(random: np.random.Generator) -> Person:
        def between(low: float, high: float) -> float:
            return float(random.uniform(low, high))

        def color(hue: tuple[float, float], saturation: tuple[float, float], value: tuple[float, float]) -> Color:
            return colorsys.hsv_to_rgb(between(*hue) % 1, between(*saturation), between(*value))

        return Person(
            skin=color((0.03, 0.1), (0.25, 0.6), (0.4, 0.95)),
            hair=color((0.02, 0.12), (0.1, 0.8), (0.08, 0.75)),
            iris=color((0.05, 0.65), (0.3, 0.8), (0.2, 0.6)),
            lips=color((0.95, 1.03), (0.35, 0.7), (0.45, 0.8)),
            jaw=between(0.55, 0.95),
            chin=between(1.05, 1.45),
            forehead=between(0.95, 1.3),
            eye_distance=between(0.33, 0.5),
            eye_width=between(0.15, 0.24),
            eye_height=between(0.06, 0.13),
            eye_slant=between(-0.3, 0.3),
            eye_level=between(-0.2, 0.0),
            brow_height=between(0.16, 0.3),
            brow_thickness=between(0.02, 0.09),
            brow_slant=between(-0.3, 0.35),
            nose_length=between(0.35, 0.6),
            nose_width=between(0.13, 0.28),
            mouth_level=between(0.62, 0.8),
            mouth_width=between(0.25, 0.42),
            lip=between(0.04, 0.11),
            hair_top=between(0.05, 0.4),
            hair_sides=between(-0.4, 1.2),
            fringe=between(0.0, 0.5),
            beard=max(0.0, between(-1.5, 1.0)),
            marks=[(between(-0.6, 0.6), between(0.1, 0.8), between(0.02, 0.045)) for _ in range(random.integers(0, 4))],
        )


@dataclass
class View:
    """How a person is seen; angles in radians."""

    yaw: float
    pitch: float
    roll: float
    scale: float  # pixels of half a head's width
    place: tuple[float, float]
    smile: float
    opened: float  # the mouth
    squint: float
    light: tuple[float, float, float]  # its direction in the picture, and how strong
    brightness: float
    warmth: float
    glasses: bool
    background: tuple[Color, Color]
    noise: float
    blur: float
    seed: int

    @staticmethod
    def random(random: np.random.Generator) -> View:
        def between(low: float, high: float) -> float:
            return float(random.uniform(low, high))

        angle = between(0, 2 * math.pi)
        colors = [colorsys.hsv_to_rgb(between(0, 1), between(0.05, 0.7), between(0.15, 0.95)) for _ in range(2)]
        return View(
            yaw=between(-0.5, 0.5),
            pitch=between(-0.22, 0.22),
            roll=between(-0.35, 0.35),
            scale=between(34, 46),
            place=(between(-10, 10), between(-8, 8)),
            smile=between(-0.4, 1.0),
            opened=max(0.0, between(-0.6, 1.0)),
            squint=between(0.0, 0.5),
            light=(math.cos(angle), math.sin(angle), between(0.1, 0.75)),
            brightness=between(0.55, 1.25),
            warmth=between(-0.18, 0.18),
            glasses=bool(random.random() < 0.15),
            background=(colors[0], colors[1]),
            noise=between(2, 10),
            blur=max(0.0, between(-0.8, 1.0)),
            seed=int(random.integers(1 << 62)),
        )


class Picture(NamedTuple):
    image: Image.Image
    landmarks: list[tuple[float, float]]  # five


# ---- drawing -------------------------------------------------------------------------------------------------------


def _ellipse(x: float, y: float, wide: float, high: float, slant: float = 0.0, count: int = 24) -> Array:
    """[count, 2] points of its outline."""
    angle = np.linspace(0, 2 * math.pi, count, endpoint=False)
    points = np.stack([wide * np.cos(angle), high * np.sin(angle)], 1)
    turn = np.array([[math.cos(slant), -math.sin(slant)], [math.sin(slant), math.cos(slant)]])
    placed: Array = points @ turn.T + [x, y]
    return placed


class _Drawing:
    """Flat shapes on a head that is turned."""

    def __init__(self, person: Person, view: View) -> None:
        self.person, self.view = person, view
        self.size = SIZE * _FINER
        self.image = Image.new("RGB", (self.size, self.size))
        self.pen = ImageDraw.Draw(self.image)

    def depth(self, points: Array) -> Array:
        """How far the face stands out at each place."""
        found: Array = np.sqrt(np.clip(1 - (points[:, 0] / 1.1) ** 2 - (points[:, 1] / 1.7) ** 2, 0, None))
        return found

    def project(self, points: Array, out: float = 0.0, flat: float = 1.0) -> Array:
        """[N, 2] places on the face, standing out by `out`, to the larger picture's pixels."""
        view = self.view
        x, y, z = points[:, 0], points[:, 1], self.depth(points) * flat + out
        x, z = x * math.cos(view.yaw) + z * math.sin(view.yaw), z * math.cos(view.yaw) - x * math.sin(view.yaw)
        y = y * math.cos(view.pitch) - z * math.sin(view.pitch)
        turned = np.stack(
            [x * math.cos(view.roll) - y * math.sin(view.roll), x * math.sin(view.roll) + y * math.cos(view.roll)], 1
        )
        middle = np.array([SIZE / 2 + view.place[0], SIZE / 2 + view.place[1]])
        pixels: Array = (turned * view.scale + middle) * _FINER
        return pixels

    def fill(self, points: Array, color: Color, out: float = 0.0, flat: float = 1.0) -> None:
        found = self.project(points, out, flat)
        self.pen.polygon([tuple(point) for point in found.tolist()], fill=tuple(round(255 * each) for each in color))

    def line(self, points: Array, color: Color, width: float, out: float = 0.0) -> None:
        found = self.project(points, out)
        pixels = max(1, round(width * self.view.scale * _FINER))
        ink = tuple(round(255 * each) for each in color)
        self.pen.line([tuple(point) for point in found.tolist()], fill=ink, width=pixels, joint="curve")


def _outline(person: Person, larger: float = 1.0) -> Array:
    """Of the head: its upper half an ellipse, its lower one narrowing to the chin."""
    angle = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    x, y = np.cos(angle), np.sin(angle)
    low = np.clip(y, 0, None)
    wide = 1 - (1 - person.jaw) * low**1.5
    return np.stack([x * wide * larger, np.where(y > 0, y * person.chin, y * person.forehead) * larger], 1)


def _darker(color: Color, by: float) -> Color:
    return (color[0] * by, color[1] * by, color[2] * by)


def _draw_hair_behind(drawing: _Drawing) -> None:
    person = drawing.person
    sides = person.hair_sides
    back = _ellipse(0, -0.1 + sides / 4, 1.12, person.forehead + person.hair_top + max(0.0, sides) / 4)
    drawing.fill(back, _darker(person.hair, 0.8), out=-0.4, flat=0.3)
    for side in (-1, 1):  # ears
        drawing.fill(_ellipse(side * 1.0, 0.1, 0.13, 0.25), _darker(person.skin, 0.88), out=-0.1)


def _draw_head(drawing: _Drawing) -> None:
    person = drawing.person
    drawing.fill(_outline(person), person.skin)
    if person.beard > 0.3:
        low = _outline(person, 0.99)
        low = low[low[:, 1] > person.mouth_level - 0.3]
        shade = np.array(person.skin) * (1 - 0.6 * person.beard) + np.array(person.hair) * 0.6 * person.beard
        drawing.fill(low, (float(shade[0]), float(shade[1]), float(shade[2])))
    top = _outline(person, 1.02)
    top = top[top[:, 1] < -0.1 - person.forehead * (0.75 - person.fringe)]
    if len(top) > 2:
        crown = np.concatenate([top, [[0, -person.forehead - person.hair_top]]])
        order = np.argsort(np.arctan2(crown[:, 1] + person.forehead * 0.7, crown[:, 0]))
        drawing.fill(crown[order], person.hair, out=0.06)
    for x, y, radius in person.marks:
        drawing.fill(_ellipse(x, y, radius, radius, count=10), _darker(person.skin, 0.45), out=0.01)


def _draw_eyes(drawing: _Drawing) -> None:
    person, view = drawing.person, drawing.view
    for side in (-1, 1):
        x, y, slant = side * person.eye_distance, person.eye_level, side * person.eye_slant
        high = person.eye_height * (1 - view.squint)
        drawing.fill(_ellipse(x, y, person.eye_width * 1.15, high + 0.035, slant), _darker(person.skin, 0.6), out=0.01)
        drawing.fill(_ellipse(x, y, person.eye_width, high, slant), (0.93, 0.93, 0.92), out=0.02)
        round_ = min(high, person.eye_height * 0.85)
        drawing.fill(_ellipse(x, y, person.eye_height * 0.8, round_), person.iris, out=0.03)
        drawing.fill(_ellipse(x, y, person.eye_height * 0.35, round_ * 0.5), (0.04, 0.04, 0.05), out=0.03)
        brow = y - person.brow_height - 0.03 * view.smile
        ends = np.array([[-1.0, person.brow_slant], [0, -0.25], [1.0, -person.brow_slant]])
        ends = ends * [side * -person.eye_width * 1.3, 0.2] + [x, brow]
        drawing.line(ends, _darker(person.hair, 0.7), person.brow_thickness, out=0.05)
    if view.glasses:
        for side in (-1, 1):
            ring = _ellipse(side * person.eye_distance, person.eye_level, 0.28, 0.22)
            drawing.line(np.concatenate([ring, ring[:1]]), (0.1, 0.1, 0.12), 0.03, out=0.1)
        bridge = np.array(
            [[-person.eye_distance + 0.28, person.eye_level], [person.eye_distance - 0.28, person.eye_level]]
        )
        drawing.line(bridge, (0.1, 0.1, 0.12), 0.03, out=0.12)


def _draw_nose_and_mouth(drawing: _Drawing) -> None:
    person, view = drawing.person, drawing.view
    tip = person.eye_level + person.nose_length
    dark = _darker(person.skin, 0.72)
    wing = person.nose_width
    drawing.line(np.array([[-0.06, person.eye_level + 0.05], [-0.05, tip - 0.1], [-wing, tip]]), dark, 0.025, out=0.12)
    drawing.fill(
        _ellipse(0, tip - 0.03, wing * 0.8, 0.08), _darker(person.skin, 1.0 if view.light[1] > 0 else 0.94), out=0.2
    )
    for side in (-1, 1):
        drawing.fill(_ellipse(side * wing * 0.5, tip + 0.03, wing * 0.25, 0.03), _darker(person.skin, 0.4), out=0.15)
    y, wide = person.mouth_level, person.mouth_width * (1 + 0.15 * view.smile)
    corner = -0.08 * view.smile
    gap = 0.13 * view.opened
    x = np.linspace(-1, 1, 13)
    middle = y + corner * x**2
    upper, lower = middle - person.lip * (1 - x**2), middle + (person.lip + gap) * (1 - x**2)
    drawing.fill(
        np.concatenate([np.stack([x * wide, upper], 1), np.stack([x * wide, lower], 1)[::-1]]), person.lips, out=0.06
    )
    inner = np.concatenate(
        [
            np.stack([x * wide * 0.85, middle], 1),
            np.stack([x * wide * 0.85, middle + gap * (1 - x**2) + 0.012], 1)[::-1],
        ]
    )
    drawing.fill(inner, (0.2, 0.06, 0.07), out=0.06)


def _lit(image: Image.Image, view: View) -> Image.Image:
    """Light from one side, its colour, and what a camera adds."""
    pixels = np.asarray(image, dtype=np.float32)
    place = (np.arange(SIZE, dtype=np.float32) - SIZE / 2) / (SIZE / 2)
    shade = 1 + view.light[2] * (view.light[0] * place[None, :] + view.light[1] * place[:, None])
    color = np.array([1 + view.warmth, 1, 1 - view.warmth], dtype=np.float32)
    noise = np.random.default_rng(view.seed).normal(0, view.noise, pixels.shape).astype(np.float32)
    found = pixels * (view.brightness * np.clip(shade, 0.15, 2))[:, :, None] * color + noise
    return Image.fromarray(np.clip(found, 0, 255).round().astype(np.uint8))


def draw(person: Person, view: View) -> Picture:
    """One picture of a person, SIZE x SIZE."""
    drawing = _Drawing(person, view)
    first, second = (tuple(round(255 * each) for each in color) for color in view.background)
    drawing.pen.rectangle((0, 0, drawing.size, drawing.size), fill=first)
    split = drawing.size * (0.3 + 0.4 * (view.seed % 1000) / 1000)
    drawing.pen.polygon(
        [(split, 0), (drawing.size, 0), (drawing.size, drawing.size), (split / 2, drawing.size)], fill=second
    )
    neck = np.array([[-0.4, 0.8], [0.4, 0.8], [0.5, 2.2], [-0.5, 2.2]])
    _draw_hair_behind(drawing)
    drawing.fill(neck, _darker(person.skin, 0.75), out=-0.3, flat=0)
    _draw_head(drawing)
    _draw_eyes(drawing)
    _draw_nose_and_mouth(drawing)
    image = drawing.image.resize((SIZE, SIZE), Image.Resampling.BOX)
    if view.blur > 0:
        image = image.filter(ImageFilter.GaussianBlur(view.blur))

    wide = person.mouth_width * (1 + 0.15 * view.smile)
    corner = person.mouth_level - 0.08 * view.smile
    eyes = [(side * person.eye_distance, person.eye_level) for side in (-1, 1)]
    tip = (0.0, person.eye_level + person.nose_length - 0.03)
    places = [(eyes, 0.03), ([tip], 0.2), ([(-wide, corner), (wide, corner)], 0.06)]
    found = [drawing.project(np.array(points), out) for points, out in places]
    pixels = np.concatenate(found) / _FINER - 0.5  # the first pixel's center is (0, 0)
    return Picture(_lit(image, view), [(float(x), float(y)) for x, y in pixels])


# ---- folders -------------------------------------------------------------------------------------------------------


def render(out: Path, people: int, views: int, seed: int = 0, first: int = 0) -> Path:
    """Pictures OUT/PERSON/VIEW.png, and their landmarks in OUT/landmarks.csv, whose path is returned. ``first``: the
    number of the first person; a person of a number is the same in every call with the same seed."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[list[object]] = []
    for number in tqdm(range(first, first + people), desc=f"draw {out.name}", unit="person"):
        random = np.random.default_rng([seed, number])
        person = Person.random(random)
        folder = out / f"person{number:04d}"
        folder.mkdir(exist_ok=True)
        for view in range(views):
            image, landmarks = draw(person, View.random(random))
            image.save(folder / f"{view:02d}.png", compress_level=1)
            rows.append([f"{folder.name}/{view:02d}.png", *(f"{value:.3f}" for point in landmarks for value in point)])
    path = out / "landmarks.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["photo", *LANDMARKS])
        table.writerows(rows)
    return path
