"""Drawn people: the same in every call, different from each other, with landmarks where they are drawn."""

import csv
import math

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
import dataclasses  # noqa: E402

from recipes.face.alignment import similarity  # noqa: E402
from recipes.face.rendering import SIZE, Person, View, draw, render  # noqa: E402


def _plain(random, **changes):
    """Seen from the front in even light."""
    view = View.random(random)
    still = {"yaw": 0.0, "pitch": 0.0, "roll": 0.0, "smile": 0.0, "opened": 0.0, "squint": 0.0, "glasses": False}
    even = {"light": (1.0, 0.0, 0.0), "brightness": 1.0, "warmth": 0.0, "noise": 0.0, "blur": 0.0, "place": (0.0, 0.0)}
    return dataclasses.replace(view, **{**still, **even, "scale": 44.0, **changes})


def test_a_person_is_drawn_the_same_again():
    for seed in range(5):
        first, second = (draw(Person.random(r := np.random.default_rng(seed)), View.random(r)) for _ in range(2))
        assert first.image.size == (SIZE, SIZE) and first.image.tobytes() == second.image.tobytes()
        assert first.landmarks == second.landmarks
        assert all(0 < value < SIZE for point in first.landmarks for value in point)


@pytest.mark.parametrize(
    "change", [{}, {"roll": 0.3}, {"yaw": 0.3}, {"pitch": -0.2}, {"place": (8.0, -6.0), "scale": 36.0}]
)
def test_landmarks_are_where_eyes_and_mouth_are(change):
    """Pupils of a colour that nothing else has, and lips: their middles are the landmarks'."""
    random = np.random.default_rng(3)
    person = dataclasses.replace(
        Person.random(random), skin=(0.5, 0.5, 0.5), hair=(0.5, 0.5, 0.5), iris=(0.0, 1.0, 0.0), lips=(0.0, 0.0, 1.0)
    )
    person = dataclasses.replace(person, eye_height=0.13, lip=0.06, eye_distance=0.42, marks=[], beard=0.0)
    view = _plain(random, background=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), **change)
    image, landmarks = draw(person, view)
    pixels = np.asarray(image, dtype=float)
    green = np.clip(pixels[..., 1] - pixels[..., 0] - 30, 0, None)
    blue = np.clip(pixels[..., 2] - pixels[..., 1] - 30, 0, None)
    x = np.arange(SIZE)
    middle = lambda weight: ((weight.sum(0) * x).sum() / weight.sum(), (weight.sum(1) * x).sum() / weight.sum())
    axis = np.subtract(landmarks[1], landmarks[0])
    between = np.add(landmarks[0], landmarks[1]) / 2
    side = (x[None, :] - between[0]) * axis[0] + (x[:, None] - between[1]) * axis[1]
    for place, weight in enumerate((green * (side < 0), green * (side > 0))):
        assert math.dist(middle(weight), landmarks[place]) < 1.5
    assert math.dist(middle(blue), np.add(landmarks[3], landmarks[4]) / 2) < 2.5
    ys, xs = np.nonzero(blue > 60)
    along = (xs - between[0]) * axis[0] + (ys - between[1]) * axis[1]
    for place, corner in ((3, along.argmin()), (4, along.argmax())):
        assert math.dist((xs[corner], ys[corner]), landmarks[place]) < 4
    assert similarity(landmarks).residual < 12


def test_views_of_one_person_differ_and_people_differ():
    random = np.random.default_rng(0)
    people = [Person.random(random) for _ in range(2)]
    view = _plain(random)
    as_array = lambda picture: np.asarray(picture.image, dtype=float)
    assert np.abs(as_array(draw(people[0], view)) - as_array(draw(people[1], view))).mean() > 5
    for turned in ({"yaw": 0.4}, {"pitch": 0.2}, {"roll": 0.3}):
        other = dataclasses.replace(view, **turned)
        assert np.abs(as_array(draw(people[0], view)) - as_array(draw(people[0], other))).mean() > 2


def test_folders(tmp_path):
    path = render(tmp_path / "a", people=3, views=2, seed=1, first=5)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["photo"] for row in rows] == [f"person{n:04d}/{v:02d}.png" for n in (5, 6, 7) for v in (0, 1)]
    again = render(tmp_path / "b", people=1, views=2, seed=1, first=6)
    for view in range(2):
        name = f"person0006/{view:02d}.png"
        assert (tmp_path / "a" / name).read_bytes() == (again.parent / name).read_bytes()
    other = render(tmp_path / "c", people=1, views=1, seed=2, first=6)
    assert (other.parent / "person0006/00.png").read_bytes() != (again.parent / "person0006/00.png").read_bytes()
