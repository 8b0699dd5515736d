"""The tour's own parts; the whole of it is `make face`, which CI runs."""

import csv

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
from drawn import faces, people_of  # noqa: E402

from recipes.face import tour  # noqa: E402
from recipes.face.__main__ import main  # noqa: E402
from recipes.face.errors import RecipeError  # noqa: E402
from recipes.face.verification_sets import write_verification_set  # noqa: E402


def test_a_folder_of_someone_elses_is_left_alone(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/mine.txt").write_text("kept")
    assert main(["tour", "--quick", "--out", str(tmp_path)]) == 2
    assert "is not empty, and no tour's folder" in capsys.readouterr().err
    assert (tmp_path / "photos/mine.txt").read_text() == "kept"


def test_pairs_and_who_is_in_the_gallery(tmp_path):
    of = faces(tmp_path, people=5, views=4)
    tour.write_pairs(of, tmp_path / "pairs.csv", 40)
    with (tmp_path / "pairs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 40 and sum(int(row[2]) for row in rows) == 20
    for first, second, same in rows:
        assert first != second and (tmp_path / first).is_file() and (tmp_path / second).is_file()
        assert (first.rsplit("/", 1)[0] == second.rsplit("/", 1)[0]) == bool(int(same))
    tour._split(people_of(of), tmp_path / "gallery", tmp_path / "probes")
    names = [each.name for each in people_of(of)]
    assert [each.name for each in people_of(tmp_path / "gallery")] == names[:4]
    assert [each.name for each in people_of(tmp_path / "probes")] == names
    for name in names[:4]:
        both = [{each.name for each in (tmp_path / kind / name).iterdir()} for kind in ("gallery", "probes")]
        assert len(both[0]) == len(both[1]) == 2 and not both[0] & both[1]


def test_the_cosine_of_pixels(tmp_path):
    import io

    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(4)]
    encoded = []
    for array in arrays:
        out = io.BytesIO()
        Image.fromarray(array).save(out, "PNG")
        encoded.append(out.getvalue())
    write_verification_set(tmp_path / "x.bin", encoded, [True, False])
    found = tour.pixel_pairs(tmp_path / "x.bin")
    rows = [torch.tensor(array, dtype=torch.float64).flatten() for array in arrays]
    rows = [row - row.mean() for row in rows]
    wanted = [float(torch.cosine_similarity(rows[k], rows[k + 1], dim=0)) for k in (0, 2)]
    assert found.scores.tolist() == pytest.approx(wanted, abs=1e-6) and found.same.tolist() == [True, False]


def test_a_command_that_fails_ends_the_tour(tmp_path, capsys):
    walk = tour.Tour(lambda words: {"good": 0, "other": 1, "bad": 2}[words[0]])
    walk("good", tmp_path)
    walk("other", allowed=(0, 1))
    with pytest.raises(RecipeError, match="python -m recipes.face bad ended with status 2"):
        walk("bad")
    assert [status for *_, status in walk.said] == [0, 1, 2]
    assert f"$ python -m recipes.face good {tmp_path}" in capsys.readouterr().out
