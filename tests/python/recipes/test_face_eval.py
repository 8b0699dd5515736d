"""`eval`: verification sets, LFW's list and IJB's templates, each counted again by hand."""

import json

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
from drawn import SIZE, embedder, faces, pairs, people_of  # noqa: E402

from recipes.face import protocols  # noqa: E402
from recipes.face.__main__ import main  # noqa: E402
from recipes.face.alignment import crop, similarity, template  # noqa: E402
from recipes.face.embedders import load_embedder  # noqa: E402
from recipes.face.verification_sets import read_verification_set, write_verification_set  # noqa: E402


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Aligned drawn faces and a verification set of them."""
    folder = tmp_path_factory.mktemp("eval")
    of = faces(folder, people=6, views=6)
    return of, pairs(folder, of, count=120)


def _by_hand(model, images, flip=True):
    """Embeddings of PIL images: (x / 255 - 0.5) / 0.5, image and mirror image, then L2; float64."""
    rows = []
    for image in images:
        x = (torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].double() / 255 - 0.5) / 0.5
        with torch.no_grad():
            found = model.double()(x)
            rows.append(found + model(x.flip(3)) if flip else found)
    model.float()
    return torch.cat(rows)


def _cosines(rows, first, second):
    unit = torch.nn.functional.normalize(rows, dim=1)
    return (unit[first] * unit[second]).sum(1)


@pytest.mark.parametrize("flip", [True, False])
def test_a_verification_set(sets, tmp_path, capsys, flip):
    made = embedder(tmp_path / "embedder.pt")
    arguments = ["eval", str(tmp_path / "embedder.pt"), "--bin", str(sets[1]), "--thresholds", "insightface"]
    assert main([*arguments, *([] if flip else ["--no-flip"])]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    found = report["sets"]["pairs"]
    images, same = read_verification_set(sets[1])
    import io

    rows = _by_hand(made.model, [Image.open(io.BytesIO(data)) for data in images], flip)
    scores = _cosines(rows, torch.arange(0, 240, 2), torch.arange(1, 240, 2))
    measured = protocols.bin_pairs(made, sets[1], flip=flip, progress=False)
    torch.testing.assert_close(measured.scores.double(), scores, rtol=0, atol=1e-5)
    # Ten folds of twelve by the grid, counted here.
    distances, same = (2 - 2 * measured.scores.double()).tolist(), np.array(same)
    right = np.array([[(d < 0.01 * step) == s for d, s in zip(distances, same)] for step in range(400)])
    folds = []
    for fold in range(10):
        inside = np.zeros(120, bool)
        inside[fold * 12 : fold * 12 + 12] = True
        best = int(np.argmax(right[:, ~inside].sum(1)))
        folds.append(right[best, inside].mean())
    assert found["accuracy"] == pytest.approx(np.mean(folds)) and found["thresholds"] == "insightface"
    assert found["accuracy_deviation"] == pytest.approx(np.std(folds))
    assert (found["pairs"], found["same_pairs"]) == (120, int(same.sum()))
    assert set(found["tar_at_far"]) == {"0.1"}  # of some 60 pairs of two persons
    threshold = report["threshold_at_far"]["0.1"]
    accepted = measured.scores.numpy() >= threshold
    assert accepted[~same].mean() <= 0.1 and accepted[same].mean() == pytest.approx(found["tar_at_far"]["0.1"])
    saved = load_embedder(tmp_path / "embedder.pt")
    assert saved.thresholds == report["threshold_at_far"] and saved.flip == flip
    assert (tmp_path / "roc.png").read_bytes().startswith(b"\x89PNG")
    assert "pairs: accuracy" in capsys.readouterr().out


def test_an_embedder_without_mirror_images_stays_one(sets, tmp_path):
    file = tmp_path / "embedder.pt"
    made = embedder(file, flip=False)
    for more, flip in (([], False), (["--flip"], True), ([], True), (["--no-flip"], False)):
        assert main(["eval", str(file), "--bin", str(sets[1]), *more]) == 0
        report = json.loads((tmp_path / "report.json").read_text())
        assert load_embedder(file).flip == report["flip"] == flip
        measured = protocols.report(protocols.bin_pairs(made, sets[1], flip=flip, progress=False))
        assert report["threshold_at_far"] == pytest.approx(measured["threshold_at_far"])


def test_faces_are_aligned_to_the_embedders_template(sets, tmp_path):
    moved = tuple((x + 3.0, y) for x, y in template().tolist())
    made = embedder(tmp_path / "embedder.pt")
    _ijb(tmp_path / "ijb", sets, made)
    plain = protocols.ijb_pairs(made, tmp_path / "ijb", "C", progress=False)
    made.template = moved
    made.save(tmp_path / "moved.pt")
    found = protocols.ijb_pairs(load_embedder(tmp_path / "moved.pt"), tmp_path / "ijb", "C", progress=False)
    assert (found.scores - plain.scores).abs().max() > 1e-4


def test_thresholds_are_of_all_sets_together(sets, tmp_path):
    embedder(tmp_path / "embedder.pt")
    images, same = read_verification_set(sets[1])
    for name, part in (("a", slice(0, 80)), ("b", slice(80, 120))):
        chosen = images[2 * part.start : 2 * part.stop]
        write_verification_set(tmp_path / f"{name}.bin", chosen, same[part])
    arguments = ["eval", str(tmp_path / "embedder.pt"), "--out", str(tmp_path / "two"), "--bin"]
    assert main([*arguments, *(str(tmp_path / f"{name}.bin") for name in "ab")]) == 0
    two = json.loads((tmp_path / "two/report.json").read_text())
    assert set(two["sets"]) == {"a", "b"}
    assert main(["eval", str(tmp_path / "embedder.pt"), "--bin", str(sets[1]), "--out", str(tmp_path / "one")]) == 0
    assert two["threshold_at_far"] == json.loads((tmp_path / "one/report.json").read_text())["threshold_at_far"]


def test_lfw(sets, tmp_path):
    """LFW's own list and names; of images of a folder, each embedded once."""
    root = tmp_path / "lfw"
    lines, expected = ["2\t2"], []
    names = ["Ada_Lovelace", "Bo_Li"]
    photos = {}
    for name, person in zip(names, people_of(sets[0])):
        (root / name).mkdir(parents=True)
        for number, photo in enumerate(sorted(person.glob("*.jpg"))[:4], 1):
            image = Image.open(photo).convert("RGB")
            image.save(root / name / f"{name}_{number:04d}.png")
            photos[name, number] = image
    for fold in range(6):
        a, b = fold % 4 + 1, (fold + 1) % 4 + 1
        lines += [f"{names[fold % 2]}\t{a}\t{b}", f"{names[0]}\t{a}\t{names[1]}\t{b}"]
        expected += [((names[fold % 2], a), (names[fold % 2], b), True), ((names[0], a), (names[1], b), False)]
    (tmp_path / "pairs.txt").write_text("\n".join(lines) + "\n")
    made = embedder(tmp_path / "embedder.pt")
    assert main(["eval", str(tmp_path / "embedder.pt"), "--lfw", str(root), str(tmp_path / "pairs.txt")]) == 0
    found = json.loads((tmp_path / "report.json").read_text())["sets"]["lfw pairs"]
    assert found["pairs"] == 12 and found["same_pairs"] == 6
    rows = dict(zip(photos, _by_hand(made.model, photos.values())))
    scores = [float(torch.cosine_similarity(rows[a], rows[b], dim=0)) for a, b, _ in expected]
    measured = protocols.lfw_pairs(made, root, tmp_path / "pairs.txt", progress=False)
    np.testing.assert_allclose(measured.scores, scores, atol=1e-5)
    assert measured.same.tolist() == [same for *_, same in expected]


def _ijb(root, sets, made):
    """A toy: photographs larger than a face, landmarks, three templates; pairs of them. Returns the cosines by hand."""
    (root / "meta").mkdir(parents=True)
    (root / "loose_crop").mkdir()
    people = people_of(sets[0])
    rows = [  # person, view, template, medium, detector's score
        (0, 0, 10, 1, 0.9),
        (0, 1, 10, 1, 0.8),
        (0, 2, 10, 2, 1.0),
        (0, 3, 11, 1, 0.7),
        (1, 0, 30, 5, 0.95),
        (1, 1, 30, 6, 0.6),
    ]
    members, points, crops = [], [], []
    to = template(SIZE)
    for number, (person, view, of, medium, score) in enumerate(rows, 1):
        face = Image.open(sorted(people[person].glob("*.jpg"))[view]).convert("RGB").resize((64, 64))
        photo = Image.new("RGB", (90, 80), "grey")
        photo.paste(face, (11, 7))
        photo.save(root / "loose_crop" / f"{number}.jpg", quality=95)
        landmarks = (to + 0.5) * 2 - 0.5 + torch.tensor([11.0, 7.0]) + 0.3 * number
        members.append(f"{number}.jpg {of} {medium}")
        values = " ".join(f"{value:.6f}" for value in landmarks.flatten().tolist())
        points.append(f"{number}.jpg {values} {score}")
        read = Image.open(root / "loose_crop" / f"{number}.jpg").convert("RGB")
        given = torch.tensor([float(v) for v in values.split()], dtype=torch.float64).view(5, 2)
        crops.append(crop(read, similarity(given, to), SIZE))
    (root / "meta/ijbc_face_tid_mid.txt").write_text("\n".join(members) + "\n")
    (root / "meta/ijbc_name_5pts_score.txt").write_text("\n".join(points) + "\n")
    listed = [(10, 11, 1), (10, 30, 0), (11, 30, 0), (30, 30, 1)]
    (root / "meta/ijbc_template_pair_label.txt").write_text("".join(f"{a} {b} {s}\n" for a, b, s in listed))
    e = _by_hand(made.model, crops)
    e = e * torch.tensor([row[4] for row in rows], dtype=torch.float64)[:, None]
    of = {10: (e[0] + e[1]) / 2 + e[2], 11: e[3], 30: e[4] + e[5]}
    return [float(torch.cosine_similarity(of[a], of[b], dim=0)) for a, b, _ in listed], listed


def test_ijb(sets, tmp_path, capsys):
    made = embedder(tmp_path / "embedder.pt")
    expected, listed = _ijb(tmp_path / "ijb", sets, made)
    measured = protocols.ijb_pairs(made, tmp_path / "ijb", "C", progress=False)
    np.testing.assert_allclose(measured.scores, expected, atol=1e-5)
    assert measured.same.tolist() == [bool(same) for *_, same in listed]
    assert main(["eval", str(tmp_path / "embedder.pt"), "--ijb", str(tmp_path / "ijb"), "C"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    found = report["sets"]["IJB-C"]
    assert "accuracy" not in found and set(found["tar_at_nearest_far"]) == {
        "1e-06",
        "1e-05",
        "0.0001",
        "0.001",
        "0.01",
        "0.1",
    }
    assert "threshold_at_far" not in report  # of templates: not for two photographs
    assert load_embedder(tmp_path / "embedder.pt").thresholds == {}
    assert "IJB-C: EER" in capsys.readouterr().out


def test_refusals(sets, tmp_path, capsys):
    made = embedder(tmp_path / "embedder.pt")
    root = tmp_path / "ijb"
    _ijb(root, sets, made)

    def changed(name, change):
        path = root / "meta" / f"ijbc_{name}.txt"
        before = path.read_text()
        path.write_text(change(before))
        assert main(["eval", str(tmp_path / "embedder.pt"), "--ijb", str(root), "C"]) == 2
        path.write_text(before)
        return capsys.readouterr().err

    assert "line 1: expected 3 fields, but got 2" in changed("face_tid_mid", lambda text: text.replace(" 1\n", "\n", 1))
    assert "has 6 lines, but" in changed("name_5pts_score", lambda text: text.split("\n", 1)[1])
    assert "line 1 is of 1.jpg in" in changed("name_5pts_score", lambda text: text.replace("1.jpg", "9.jpg", 1))
    assert "names template 77" in changed("template_pair_label", lambda text: text + "77 10 0\n")
    assert "has no lines" in changed("template_pair_label", lambda text: "\n")
    assert "invalid literal" in changed("face_tid_mid", lambda text: text.replace("1.jpg 10", "1.jpg x", 1))
    (root / "loose_crop/3.jpg").unlink()
    assert "3.jpg" in changed("face_tid_mid", lambda text: text)
    (root / "meta/ijbc_template_pair_label.txt").unlink()

    images, same = read_verification_set(sets[1])
    write_verification_set(tmp_path / "bad.bin", [b"no image", *images[1:]], same)
    (tmp_path / "pairs.txt").write_text("Ada\t1\t2\nAda\t1\tBo\t1\n")
    (tmp_path / "none.txt").write_text("10 300\n")
    file = str(tmp_path / "embedder.pt")
    for arguments, text in [
        ([file], "expected pairs to evaluate on: --bin, --lfw or --ijb"),
        ([file, "--bin", str(tmp_path / "bad.bin")], "bad.bin, image 0: no image"),
        ([file, "--bin", str(tmp_path / "a/x.bin"), str(tmp_path / "b/x.bin")], "two of the --bin sets have one name"),
        ([file, "--bin", str(tmp_path / "none.bin")], "none.bin"),
        ([file, "--lfw", str(tmp_path), str(tmp_path / "pairs.txt")], "names Ada/Ada_0001.jpg, which is not in"),
        ([file, "--lfw", str(tmp_path), str(tmp_path / "none.txt")], "none.txt has no pairs"),
        ([file, "--ijb", str(root), "A"], "expected --ijb ROOT B or C, but got 'A'"),
        ([file, "--ijb", str(root), "C"], "template_pair_label.txt is no file"),
        ([str(tmp_path / "pairs.txt"), "--bin", str(sets[1])], "no weights alone"),
        ([str(tmp_path / "nowhere.pt"), "--bin", str(sets[1])], "is no file"),
    ]:
        assert main(["eval", *arguments]) == 2, arguments
        assert text in capsys.readouterr().err


def test_few_pairs_show_no_small_rates():
    assert protocols.rates_of(3000) == [1e-1, 1e-2, 1e-3]
    assert protocols.rates_of(1000) == [1e-1, 1e-2, 1e-3]
    assert protocols.rates_of(9) == []
