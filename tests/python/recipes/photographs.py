"""What packages carry that tests compare with: photographs, and another's detector. None is in this repository."""

import importlib.util
import sys
from pathlib import Path

import pytest

# Installed beside the environment's own packages (requirements/oracles.txt), whose versions they do not fit.
sys.path.append(str(Path(sys.prefix) / "oracles"))


def astronaut():
    """One face (scikit-image's, NASA's Eileen Collins)."""
    Image = pytest.importorskip("PIL.Image")
    return Image.fromarray(pytest.importorskip("skimage.data").astronaut())


def group():
    """Eight people beside each other (insightface's), found without importing the package."""
    Image = pytest.importorskip("PIL.Image")
    found = importlib.util.find_spec("insightface")
    if found is None or not found.submodule_search_locations:
        pytest.skip("there is no insightface, whose picture of a group this needs")
    return Image.open(Path(found.submodule_search_locations[0]) / "data/images/t1.jpg").convert("RGB")


def without_faces():
    """A cup of coffee."""
    Image = pytest.importorskip("PIL.Image")
    return Image.fromarray(pytest.importorskip("skimage.data").coffee())
