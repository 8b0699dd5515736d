"""`pack` and `unpack` as a user runs them."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

Image = pytest.importorskip("PIL.Image")
from recipes.face.__main__ import main  # noqa: E402
from recipes.face.records import TrainingRecords  # noqa: E402
from recipes.face.verification_sets import read_verification_set, write_verification_set  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]


def _draw(path, seed, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 256, (9, 7, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.frombytes("RGB", (7, 9), bytes(pixels.flatten().tolist())).save(path, **options)
    return path.read_bytes()


@pytest.fixture
def photographs(tmp_path):
    """Three classes: JPEG, PNG in a deeper folder, one without images; and files that are no images by name."""
    folder = tmp_path / "photographs"
    images = {
        "Ada/1.jpg": _draw(folder / "Ada/1.jpg", 1),
        "Ada/2.JPEG": _draw(folder / "Ada/2.JPEG", 2, format="JPEG"),
        "Bébé/in/a.png": _draw(folder / "Bébé/in/a.png", 3),
        "Zoe/z.bmp": _draw(folder / "Zoe/z.bmp", 4),
    }
    (folder / "nobody").mkdir()
    (folder / "Ada/notes.txt").write_text("no image")
    return folder, images


def test_there_and_back(photographs, tmp_path, capsys):
    folder, images = photographs
    assert main(["pack", str(folder), str(tmp_path / "out/train.rec")]) == 0
    assert "4 images of 3 classes" in capsys.readouterr().out
    records = TrainingRecords(tmp_path / "out/train.rec")
    assert [records[i] for i in range(4)] == [(image, label) for image, label in zip(images.values(), (0, 0, 1, 2))]
    assert records.identities == 3 and records.count_classes() == 3
    assert (tmp_path / "out/classes.txt").read_text(encoding="utf-8").splitlines() == ["Ada", "Bébé", "Zoe"]
    assert main(["unpack", str(tmp_path / "out/train.rec"), str(tmp_path / "again")]) == 0
    again = {str(p.relative_to(tmp_path / "again")): p.read_bytes() for p in (tmp_path / "again").rglob("*.*")}
    assert again == dict(
        zip(["Ada/00000001.jpg", "Ada/00000002.jpg", "Bébé/00000003.png", "Zoe/00000004.bmp"], images.values())
    )
    assert main(["pack", str(tmp_path / "again"), str(tmp_path / "out2/train.rec")]) == 0
    assert (tmp_path / "out2/train.rec").read_bytes() == (tmp_path / "out/train.rec").read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_bad_images_fail_or_are_named_and_skipped(photographs, tmp_path, capsys):
    folder, images = photographs
    whole = (folder / "Ada/1.jpg").read_bytes()
    (folder / "Ada/1.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "Zoe/z.bmp").write_bytes(b"nothing")
    out = tmp_path / "train.rec"
    assert main(["pack", str(folder), str(out)]) == 2
    assert "Ada/1.jpg: no image" in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.glob("*.partial")) and not (tmp_path / "classes.txt").exists()
    assert main(["pack", str(folder), str(out), "--on-bad", "skip"]) == 0
    said = capsys.readouterr()
    assert "skipped" in said.err and "Ada/1.jpg" in said.err and "Zoe/z.bmp" in said.err
    records = TrainingRecords(out)
    assert [records[i][1] for i in range(len(records))] == [0, 1]
    assert (tmp_path / "classes.txt").read_text(encoding="utf-8").splitlines() == ["Ada", "Bébé"]


def test_pairs(photographs, tmp_path, capsys):
    folder, images = photographs
    pairs = folder / "pairs.csv"
    pairs.write_text("first,second,same\nAda/1.jpg,Ada/2.JPEG,1\nAda/1.jpg,Bébé/in/a.png,0\n", encoding="utf-8")
    assert main(["pack", str(pairs), str(tmp_path / "val.bin")]) == 0
    found = read_verification_set(tmp_path / "val.bin")
    one, two, three, _ = images.values()
    assert found.images == [one, two, one, three] and found.same == [True, False]
    assert main(["unpack", str(tmp_path / "val.bin"), str(tmp_path / "images")]) == 0
    with (tmp_path / "images/pairs.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    assert [row[2] for row in rows] == ["1", "0"] and (tmp_path / "images" / rows[1][1]).read_bytes() == three
    assert main(["pack", str(tmp_path / "images/pairs.csv"), str(tmp_path / "again.bin")]) == 0
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "val.bin").read_bytes()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["pack", "missing", "a.rec"], "missing is no folder"),
        (["pack", "empty", "a.rec"], "empty has no subfolders with images"),
        (["pack", "empty", "a.txt"], "expected a.txt to end in .rec or .bin"),
        (["pack", "bad.csv", "a.bin"], "bad.csv, line 1: expected two images and 0 or 1, but got a,b"),
        (["pack", "missing.csv", "a.bin"], "missing.csv"),
        (["pack", "gone.csv", "a.bin"], "gone.jpg"),
        (["unpack", "bad.bin", "out"], "bad.bin: it asks for os.system"),
        (["unpack", "missing.rec", "out"], "missing.rec has no index"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("a,b\n")
    (tmp_path / "gone.csv").write_text("gone.jpg,gone.jpg,1\n")
    (tmp_path / "bad.bin").write_bytes(b"\x80\x02(cos\nsystem\n.")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{arguments[0]}: ") and said in error
    assert not (tmp_path / "a.rec").exists() and not (tmp_path / "a.bin").exists()


def test_a_second_unpack_names_its_own_files(photographs, tmp_path):
    """What lies there from another set, by the same numbers, is not taken for this one's."""
    folder, images = photographs
    (tmp_path / "out").mkdir()
    (tmp_path / "out/0000000.bmp").write_bytes(b"of another set")
    pairs = folder / "pairs.csv"
    pairs.write_text("Ada/1.jpg,Ada/2.JPEG,1\n")
    for _ in range(2):
        assert main(["pack", str(pairs), str(tmp_path / "val.bin")]) == 0
        assert main(["unpack", str(tmp_path / "val.bin"), str(tmp_path / "out")]) == 0
        assert (tmp_path / "out/pairs.csv").read_text().splitlines()[1] == "0000000.jpg,0000001.jpg,1"


def test_a_set_without_a_readable_image(tmp_path, capsys):
    write_verification_set(tmp_path / "bad.bin", [b"no image", b"nor this"], [True])
    assert main(["unpack", str(tmp_path / "bad.bin"), str(tmp_path / "out"), "--on-bad", "skip"]) == 0
    assert "bad.bin, image 0: no image" in capsys.readouterr().err
    assert (tmp_path / "out/pairs.csv").read_text().splitlines() == ["first,second,same"]


def test_class_names_are_lines(photographs, tmp_path, capsys):
    folder, _ = photographs
    (folder / "Ada").rename(folder / "A\nda")
    assert main(["pack", str(folder), str(tmp_path / "train.rec")]) == 2
    assert "a class 'A\\nda', which is no line of a text" in capsys.readouterr().err
    (folder / "A\nda").rename(folder / "A\u2028da")  # which str.splitlines() would take for two
    assert main(["pack", str(folder), str(tmp_path / "train.rec")]) == 0
    assert main(["unpack", str(tmp_path / "train.rec"), str(tmp_path / "out")]) == 0
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == sorted(["A\u2028da", "Bébé", "Zoe"])


def test_class_names_are_no_paths(photographs, tmp_path, capsys):
    folder, _ = photographs
    main(["pack", str(folder), str(tmp_path / "in/train.rec")])
    (tmp_path / "in/classes.txt").write_text("../outside\nb\nc\n")
    assert main(["unpack", str(tmp_path / "in/train.rec"), str(tmp_path / "out")]) == 2
    assert "'../outside' is no folder's name" in capsys.readouterr().err
    assert not (tmp_path / "outside").exists()


def test_from_the_repository_root():
    ran = subprocess.run([sys.executable, "-m", "recipes.face", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and "unpack" in ran.stdout, ran.stderr
