"""The demo on a folder of real images: scikit-learn's digits, written out as files."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from torchmargin.demo.data import rotating_splits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    for digit in range(6):
        (root / f"digit-{digit}").mkdir()
        for number, image in enumerate(digits.images[digits.target == digit][:20]):
            Image.fromarray((image * 15.9).astype(np.uint8)).save(root / f"digit-{digit}" / f"{number}.png")
    return root


def _demo(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "torchmargin.demo", *map(str, arguments)], capture_output=True, text=True
    )


def test_a_folder_of_images(folder, tmp_path):
    options = ["--data", folder, "--image-size", 16, "--losses", "arcface", "softmax", "--epochs", 1, "--splits", 2]
    ran = _demo(*options, "--out", tmp_path)
    assert ran.returncode == 0, ran.stderr
    table = (tmp_path / "table.txt").read_text()
    assert table in ran.stdout and "ArcFace" in table and "trained on 4 classes" in table
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64") == 5 and "120 images of 6 classes" in page
    assert "http" not in page  # self-contained
    assert _demo(*options, "--out", tmp_path / "again").returncode == 0
    assert (tmp_path / "again" / "table.txt").read_text() == table


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--losses", "triplet"], "invalid choice: 'triplet'"),
        (["--epochs", "0"], "--epochs should be at least 1"),
        (["--verify-fraction", "1"], "--verify-fraction should lie between 0 and 1"),
        (["--data", "/nowhere"], "there is no folder /nowhere"),
    ],
)
def test_bad_options_are_refused(arguments, text):
    ran = _demo(*arguments)
    assert ran.returncode != 0 and text in ran.stderr and "Traceback" not in ran.stderr


def test_splits_rotate():
    splits = rotating_splits(10, 0.4, 5)
    assert splits[0] == ([4, 5, 6, 7, 8, 9], [0, 1, 2, 3]) and splits[4] == ([2, 3, 4, 5, 6, 7], [0, 1, 8, 9])
    counts = [sum(c in verify for _, verify in splits) for c in range(10)]
    assert counts == [2] * 10
