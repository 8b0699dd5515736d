"""`align` as a user runs it: photographs of packages, known landmarks, a run that was stopped."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
from recipes.face import align as aligning  # noqa: E402
from recipes.face.__main__ import main  # noqa: E402
from recipes.face.alignment import similarity, template  # noqa: E402
from recipes.face.detection import DetectorError, Face, find_weights  # noqa: E402

from photographs import astronaut, group, without_faces  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]


def _needs_weights():
    try:
        find_weights()
    except DetectorError as error:
        pytest.skip(str(error))


def _rows(out):
    with (out / "aligned.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "space").mkdir(parents=True)
    astronaut().save(folder / "space/eileen.png")
    group().save(folder / "group.jpg", quality=95)
    without_faces().save(folder / "cup.jpg")
    (folder / "broken.jpg").write_bytes(b"no image at all")
    (folder / "notes.txt").write_text("not looked at")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_photographs(photos, tmp_path, capfd, workers):
    _needs_weights()
    out = tmp_path / "out"
    assert main(["align", str(photos), str(out), "--workers", str(workers)]) == 0
    heard = capfd.readouterr()
    assert "2 crops of 2 photographs, 2 without a face" in heard.out
    assert "broken.jpg: no image" in heard.err and "cup.jpg: no face found" in heard.err
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.jpg")) == ["group.jpg", "space/eileen.jpg"]
    rows = {row["photo"]: row for row in _rows(out)}
    assert set(rows) == {"group.jpg", "space/eileen.png"}
    assert float(rows["space/eileen.png"]["score"]) > 0.99 and float(rows["space/eileen.png"]["residual"]) < 8
    with Image.open(out / "space/eileen.jpg") as crop:
        assert crop.size == (112, 112) and crop.mode == "RGB"
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.size == (960, 96)
    # Landmarks that are found again in the crop lie where the similarity has brought the photograph's.
    row = rows["space/eileen.png"]
    before = torch.tensor([[float(row[f"{point}_{axis}"]) for axis in "xy"] for point in aligning.POINTS])
    (face,) = aligning.Detector(min_score=0.5)(Image.open(out / "space/eileen.jpg"))
    assert (torch.tensor(face.landmarks) - similarity(before)(before)).norm(dim=1).max() < 4  # of 112 pixels


def test_several_faces(photos, tmp_path):
    _needs_weights()
    out = tmp_path / "all"
    assert main(["align", str(photos), str(out), "--faces", "all", "--size", "64"]) == 0
    of_group = [row for row in _rows(out) if row["photo"] == "group.jpg"]
    assert len(of_group) == 6 and len({row["crop"] for row in of_group}) == 6
    assert all((out / row["crop"]).is_file() for row in of_group)
    chosen = {}
    for which in ("largest", "center"):
        assert main(["align", str(photos), str(tmp_path / which), "--faces", which]) == 0
        (row,) = [row for row in _rows(tmp_path / which) if row["photo"] == "group.jpg"]
        chosen[which] = row

    def area(row):
        return (float(row["right"]) - float(row["left"])) * (float(row["bottom"]) - float(row["top"]))

    assert area(chosen["largest"]) == max(area(row) for row in of_group)
    width, height = group().size

    def from_middle(row):
        x, y = ((float(row[a]) + float(row[b])) / 2 for a, b in (("left", "right"), ("top", "bottom")))
        return (x - width / 2) ** 2 + (y - height / 2) ** 2

    assert from_middle(chosen["center"]) == min(from_middle(row) for row in of_group)


@pytest.mark.parametrize(
    ("option", "text"), [("--on-missing", "cup.jpg: no face found"), ("--on-bad", "broken.jpg: no image")]
)
def test_fails_where_it_is_asked_to(photos, tmp_path, capsys, option, text):
    _needs_weights()
    assert main(["align", str(photos), str(tmp_path / "out"), option, "fail"]) == 2
    assert text in capsys.readouterr().err


def _landmarks(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["photo", *(f"{point}_{axis}" for point in aligning.POINTS for axis in "xy")])
        table.writerows(rows)
    return path


def _placed(scale, angle, x, y):
    """The template, turned and moved, as ten numbers."""
    points = template()
    c, s = scale * torch.cos(torch.tensor(angle)), scale * torch.sin(torch.tensor(angle))
    turned = points @ torch.tensor([[c, s], [-s, c]], dtype=torch.float64) + torch.tensor([x, y])
    return [f"{value:.9f}" for value in turned.flatten().tolist()]


def test_known_landmarks(tmp_path):
    """No detector; landmarks that are a similarity of the template have no residual; a turned photograph is upright."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    size = 200
    for name in ("a", "b", "c"):
        Image.new("RGB", (size, size), "navy").save(folder / f"{name}.png")
    csv_file = _landmarks(
        tmp_path / "landmarks.csv",
        [
            ["a.png", *_placed(1.0, 0.0, 20, 30)],
            ["b.png", *_placed(0.7, 0.6, 60, 10)],
            ["b.png", *_placed(0.5, 0, 0, 0)],
        ],
    )
    arguments = ["align", str(folder), str(out), "--landmarks", str(csv_file), "--faces", "all"]
    assert main(arguments) == 0
    rows = _rows(out)
    assert [row["crop"] for row in rows] == ["a.0.jpg", "b.0.jpg", "b.1.jpg"]
    assert all(float(row["residual"]) < 1e-6 for row in rows)
    # What align wrote is a file of landmarks itself.
    again = ["align", str(folder), str(tmp_path / "again"), "--landmarks", str(out / "aligned.csv"), "--faces", "all"]
    assert main(again) == 0
    assert [row["residual"] for row in _rows(tmp_path / "again")] != []
    assert [row["crop"] for row in _rows(tmp_path / "again")] == [row["crop"] for row in rows]


def test_the_crop_is_of_the_landmarks(tmp_path):
    """A dot at each landmark is at the template's places."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    numbers = _placed(1.5, 0.3, 60, 20)
    photo = Image.new("RGB", (300, 300))
    for x, y in zip(numbers[::2], numbers[1::2]):
        photo.paste("white", tuple(round(float(v)) + d for d in (-2, 3) for v in (x, y)))
    photo.save(folder / "dots.png")
    landmarks = _landmarks(tmp_path / "landmarks.csv", [["dots.png", *numbers]])
    assert main(["align", str(folder), str(out), "--landmarks", str(landmarks)]) == 0
    crop = Image.open(out / "dots.jpg").convert("L")
    pixels = torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).double().view(112, 112)
    for x, y in template().tolist():
        left, top = round(x) - 4, round(y) - 4
        part = pixels[top : top + 9, left : left + 9]
        part = (part - 60).clamp_min(0)
        ys, xs = (torch.arange(9, dtype=torch.float64) + corner for corner in (top, left))
        middle = ((part.sum(0) * xs).sum() / part.sum(), (part.sum(1) * ys).sum() / part.sum())
        assert abs(middle[0] - x) < 0.6 and abs(middle[1] - y) < 0.6


def test_a_stopped_run_goes_on(photos, tmp_path, monkeypatch, capsys):
    _needs_weights()
    out, whole = tmp_path / "out", tmp_path / "whole"
    astronaut().save(photos / "again.png")
    assert main(["align", str(photos), str(whole)]) == 0
    real, calls = aligning._align, []

    def stopping(job, name):
        calls.append(name)
        if name == "space/eileen.png":
            raise KeyboardInterrupt
        return real(job, name)

    monkeypatch.setattr(aligning, "_align", stopping)
    assert main(["align", str(photos), str(out)]) == 130
    monkeypatch.setattr(aligning, "_align", lambda job, name: (calls.append(name), real(job, name))[1])
    calls.clear()
    assert main(["align", str(photos), str(out)]) == 0
    # What came of the last photograph may not have been whole, and what has no face is in no table.
    assert calls == ["broken.jpg", "cup.jpg", "group.jpg", "space/eileen.png"]
    assert _rows(out) == _rows(whole)
    assert main(["align", str(photos), str(out), "--size", "64"]) == 2
    assert "was begun with size 112, not 64" in capsys.readouterr().err
    assert not list(out.rglob("*.partial"))


def test_refusals(photos, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("kept")
    good = _landmarks(tmp_path / "good.csv", [["group.jpg", *_placed(1, 0, 0, 0)]])
    short = tmp_path / "short.csv"
    short.write_text("photo,nose_x\na.jpg,1\n")
    words = _landmarks(tmp_path / "words.csv", [["group.jpg", *["x"] * 10]])
    infinite = _landmarks(tmp_path / "infinite.csv", [["group.jpg", *["inf"] * 10]])
    stranger = _landmarks(tmp_path / "stranger.csv", [["nobody.jpg", *_placed(1, 0, 0, 0)]])
    empty = tmp_path / "empty"
    empty.mkdir()
    new = tmp_path / "new"
    for arguments, text in [
        ([photos, other, "--landmarks", good], "is not empty, and not what align wrote"),
        ([photos, new, "--landmarks", short], "short.csv has no column left_eye_x"),
        ([photos, new, "--landmarks", words], "words.csv, line 2: expected ten numbers"),
        ([photos, new, "--landmarks", infinite], "infinite.csv, line 2: a landmark is not finite"),
        ([photos, new, "--landmarks", stranger], "names nobody.jpg, which is not in"),
        ([photos, new, "--landmarks", tmp_path / "none.csv"], "No such file"),
        ([empty, new], "has no images"),
        ([tmp_path / "nowhere", new], "is no folder"),
        ([photos, new, "--size", "4"], "--size of at least 8 pixels, but got 4"),
        ([photos, new, "--workers", "-1"], "--workers of at least 0"),
        ([photos, new, "--min-face", "3"], "min_face to be at least 12"),
    ]:
        assert main(["align", *map(str, arguments)]) == 2, arguments
        assert text in capsys.readouterr().err
    assert not new.exists() and (other / "mine.txt").read_text() == "kept"


def test_two_photographs_with_one_crop(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (50, 50)).save(folder / name)
    assert main(["align", str(folder), str(tmp_path / "out")]) == 2
    assert "a.jpg and a.png would have one crop" in capsys.readouterr().err


def test_landmarks_that_are_one_point_are_named(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (50, 50)).save(folder / "a.png")
    landmarks = _landmarks(tmp_path / "l.csv", [["a.png", *["5"] * 10]])
    assert main(["align", str(folder), str(tmp_path / "out"), "--landmarks", str(landmarks)]) == 2
    heard = capsys.readouterr().err
    assert "a.png: all landmarks are one point" in heard and "no face found in any of the 1 photographs" in heard


def test_a_camera_that_was_held_sideways(tmp_path):
    """The orientation in a photograph's EXIF is followed: landmarks are of the upright one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    upright = astronaut()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.rotate(90, expand=True).save(folder / "turned.jpg", exif=exif, quality=95)
    upright.save(folder / "upright.jpg", quality=95)
    _needs_weights()
    assert main(["align", str(folder), str(tmp_path / "out")]) == 0
    first, second = _rows(tmp_path / "out")
    assert float(first["nose_x"]) == pytest.approx(float(second["nose_x"]), abs=1)


def test_choosing_among_none_and_one():
    face = Face((0, 0, 10, 10), 1.0, ())
    for which in ("largest", "all", "center"):
        assert aligning.choose([], which, (10, 10)) == []
        assert aligning.choose([face], which, (10, 10)) == [face]


def test_help_names_every_command():
    found = subprocess.run(
        [sys.executable, "-m", "recipes.face", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in (
        "align",
        "pack",
        "unpack",
        "train",
        "eval",
        "export",
        "import",
        "verify",
        "enroll",
        "identify",
        "tour",
    ):
        assert name in found.stdout
