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
    assert page.count("data:image/png;base64") == 6 and "120 images of 6 classes" in page
    assert "http" not in page  # self-contained


# What the demo trains, in short: every loss, for the table and for the pictures, on digits and on files.
TRAIN = """
import hashlib, pathlib, sys, torch
from torchmargin.demo.compare import compare, text_table
from torchmargin.demo.data import load_digits, load_folder
from torchmargin.demo.settings import LOSSES
from torchmargin.demo.train import Trainer

digits = load_digits()
digits = digits.take(torch.arange(0, len(digits), 40))
files = load_folder(pathlib.Path(sys.argv[1]), 16, 0)

def bits(images, loss, features, seed=0):
    digest = hashlib.sha256()
    for module in Trainer("small", 64, seed).train(LOSSES[loss], features, images, 1, loss):
        for value in module.state_dict().values():
            digest.update(value.numpy().tobytes())
    return digest.hexdigest()

for loss in LOSSES:
    print(loss, *(bits(digits, loss, features) for features in (2, 3)))
print("files", bits(files, "arcface", 2))
print(text_table(compare(digits, list(LOSSES), Trainer("small", 64, 0), 1, 1, 0.4)))
print("seeds", bits(digits, "arcface", 2, 0), bits(digits, "arcface", 2, 1))
"""


def test_two_runs_give_the_same_bits_and_tables(folder):
    """In processes of their own; another seed gives other bits."""
    command = [sys.executable, "-c", TRAIN, str(folder)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    (one, error), (other, _) = (run.communicate() for run in runs)
    assert [run.returncode for run in runs] == [0, 0], error
    assert one == other and "SphereFace-R" in one
    lines = {line.split()[0]: line.split()[1:] for line in one.splitlines()}
    first, second = lines["seeds"]
    assert lines["arcface"][0] == first != second


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
