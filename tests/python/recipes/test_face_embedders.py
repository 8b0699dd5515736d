"""Embedders: what a file holds, what is refused; `export` beside them; `verify`, `enroll`, `identify`."""

import csv
import io
import json
import pickle
import warnings

import pytest
import torch

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
from drawn import SIZE, embedder, faces  # noqa: E402

from recipes.face import exporting  # noqa: E402
from recipes.face.__main__ import main  # noqa: E402
from recipes.face.align import align_face  # noqa: E402
from recipes.face.detection import Detector, DetectorError, find_weights  # noqa: E402
from recipes.face.embedders import EmbedderError, load_embedder  # noqa: E402
from recipes.face.recognition import fingerprint  # noqa: E402

from photographs import astronaut, group, without_faces  # noqa: E402


def _pixels(count, seed=0):
    return torch.randint(
        0, 256, (count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def test_what_is_saved_is_loaded(tmp_path):
    options = {"mean": 100.0, "deviation": 50.0, "colors": "BGR", "flip": False, "thresholds": {"0.01": 0.4}}
    made = embedder(tmp_path / "e.pt", **options)
    found = load_embedder(tmp_path / "e.pt")
    assert {name: getattr(found, name) for name in options} == options and found.network == made.network
    assert torch.equal(found.embed_pixels(_pixels(3)), made.embed_pixels(_pixels(3)))
    assert not any(each.requires_grad for each in found.model.parameters()) and not found.model.training
    assert fingerprint(found) == fingerprint(made)
    assert fingerprint(embedder(tmp_path / "f.pt", seed=1, **options)) != fingerprint(made)
    assert fingerprint(embedder(tmp_path / "f.pt", **{**options, "flip": True})) != fingerprint(made)


def test_pixels_become_input_as_the_file_says(tmp_path):
    made = embedder(tmp_path / "e.pt", mean=100.0, deviation=50.0, colors="BGR", flip=True)
    pixels = _pixels(2)
    x = (pixels[:, [2, 1, 0]].float() - 100) / 50
    with torch.no_grad():
        wanted = made.model(x) + made.model(x.flip(3))
        torch.testing.assert_close(made.embed_pixels(pixels, flip=False), made.model(x))
    torch.testing.assert_close(made.embed_pixels(pixels), wanted)


def test_images_of_any_kind_and_number(tmp_path):
    made = embedder(tmp_path / "e.pt")
    images = [Image.new("L", (SIZE, SIZE), 9 * k) for k in range(5)] + [Image.new("RGBA", (50, 40), "red")]
    found = made.embed(iter(images), batch=4)
    assert found.shape == (6, 16)
    for row, image in zip(found, images):
        torch.testing.assert_close(row, made.embed([image])[0], rtol=1e-4, atol=1e-5)
    assert made.embed([]).shape == (0, 16) and made.embed_pixels(_pixels(0)).shape == (0, 16)


def test_thresholds_by_rate(tmp_path):
    made = embedder(tmp_path / "e.pt", thresholds={"0.1": 0.2, "0.001": 0.5, "0.01": 0.4})
    assert made.threshold() == 0.5 and made.threshold(0.1) == 0.2
    with pytest.raises(EmbedderError, match="rates 0.1, 0.001, 0.01, not 0.5"):
        made.threshold(0.5)
    made.thresholds = {}
    with pytest.raises(EmbedderError, match="has no threshold: `eval` it on pairs, or give one"):
        made.threshold()


class _Hostile:
    def __reduce__(self):
        return (print, ("it ran",))


def test_hostile_and_damaged_files_are_refused(tmp_path, capsys):
    embedder(tmp_path / "e.pt")
    good = (tmp_path / "e.pt").read_bytes()
    whole = torch.load(tmp_path / "e.pt", weights_only=True)
    files = {
        "pickle": pickle.dumps(_Hostile()),
        "text": b"hello",
        "empty": b"",
        "half": good[: len(good) // 2],
    }
    for name, change in {
        "hostile": {"thresholds": _Hostile()},
        "other": {"format": "something"},
        "network": {"network": {"name": "iresnet18", "depth": 3}},
        "net": {"network": {"name": "nothing"}},
        "state": {"state": {**whole["state"], "fc.bias": torch.zeros(3)}},
        "no_state": {"state": None},
    }.items():
        out = io.BytesIO()
        torch.save({**whole, **change}, out)
        files[name] = out.getvalue()
    out = io.BytesIO()
    torch.save([1, 2], out)
    files["list"] = out.getvalue()
    for name, data in files.items():
        (tmp_path / f"{name}.pt").write_bytes(data)
        assert main(["verify", "a.jpg", "b.jpg", "--aligned", "--embedder", str(tmp_path / f"{name}.pt")]) == 2, name
        heard = capsys.readouterr()
        assert f"{name}.pt" in heard.err or "expected one of" in heard.err, (name, heard.err)
        assert "it ran" not in heard.out and heard.err.count("\n") == 1


def test_bare_weights_become_an_embedder(tmp_path, capsys):
    made = embedder(tmp_path / "e.pt", colors="BGR", flip=False)
    state = {f"module.{n}": v for n, v in made.model.state_dict().items() if not n.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "backbone.pth")
    using = ["--net", "iresnet18", "--features", "16", "--size", str(SIZE), "--colors", "BGR", "--no-flip"]
    arguments = ["import", str(tmp_path / "backbone.pth"), str(tmp_path / "found.pt"), *using]
    assert main([*arguments, "--width", "2"]) == 0
    found = load_embedder(tmp_path / "found.pt")
    assert fingerprint(found) == fingerprint(made)
    assert torch.equal(found.embed_pixels(_pixels(2)), made.embed_pixels(_pixels(2)))
    capsys.readouterr()
    assert main(arguments) == 2
    assert "conv1.weight is [2, 3, 3, 3] in the file, but [64, 3, 3, 3] in the network" in capsys.readouterr().err


# ---- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pt2", "aoti", "onnx"])
@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_is_the_embedder(tmp_path, capsys, form):
    if form == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)
    made = embedder(tmp_path / "e.pt", colors="BGR", mean=120.0)
    assert main(["export", str(tmp_path / "e.pt"), "--format", form]) == 0
    path = tmp_path / f"e{exporting.FORMATS[form]}"
    assert str(path) in capsys.readouterr().out and path.is_file()
    assert {each.name for each in tmp_path.iterdir()} == {"e.pt", path.name}
    if form == "pt2":
        run = torch.export.load(str(path)).module()
    elif form == "aoti":
        run = torch._inductor.aoti_load_package(str(path))
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        run = lambda pixels: torch.from_numpy(session.run(["embeddings"], {"pixels": pixels.numpy()})[0])
    for count in (1, 2, 7):
        pixels = _pixels(count, seed=count)
        wanted = torch.nn.functional.normalize(made.embed_pixels(pixels), dim=1)
        torch.testing.assert_close(run(pixels), wanted, rtol=0, atol=exporting.TOLERANCE)


@pytest.mark.filterwarnings("ignore")
def test_a_program_that_differs_is_not_kept(tmp_path, capsys, monkeypatch):
    embedder(tmp_path / "e.pt")
    real = exporting.Deployed.forward
    monkeypatch.setattr(exporting.Deployed, "forward", lambda self, pixels: real(self, pixels // 2))
    assert main(["export", str(tmp_path / "e.pt"), "--format", "pt2"]) == 2
    assert "from the embedder's; nothing was written" in capsys.readouterr().err
    assert {each.name for each in tmp_path.iterdir()} == {"e.pt"}
    assert main(["export", str(tmp_path / "e.pt"), "--format", "aoti", "--out", str(tmp_path / "x.so")]) == 2
    assert "to end in .pt2" in capsys.readouterr().err


# ---- verify, enroll, identify --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return faces(tmp_path_factory.mktemp("people"), people=4, views=4)


def _by_hand(made, path):
    return torch.nn.functional.normalize(made.embed([Image.open(path)])[0].double(), dim=0)


def test_verify_aligned(people, tmp_path, capsys):
    made = embedder(tmp_path / "e.pt", thresholds={"0.01": 0.5})
    first, second = sorted(people.rglob("*.jpg"))[:2]
    cosine = float(_by_hand(made, first) @ _by_hand(made, second))
    arguments = ["verify", str(first), str(second), "--aligned", "--embedder", str(tmp_path / "e.pt")]
    assert main([*arguments, "--threshold", str(cosine - 0.01)]) == 0
    assert f"cosine {cosine:.4f}" in (heard := capsys.readouterr().out) and "one person" in heard
    assert main([*arguments, "--threshold", str(cosine + 0.01)]) == 1
    assert "two persons" in capsys.readouterr().out
    assert main(arguments) == (0 if cosine >= 0.5 else 1)
    assert main([*arguments, "--far", "0.01"]) == (0 if cosine >= 0.5 else 1)
    capsys.readouterr()
    assert main([*arguments, "--device", "cuda:99"]) == 2
    assert "there is no device cuda:99 here" in capsys.readouterr().err
    assert main([*arguments, "--far", "0.1"]) == 2
    assert "rates 0.01, not 0.1" in capsys.readouterr().err


def test_enroll_and_identify(people, tmp_path, capsys):
    made = embedder(tmp_path / "e.pt", thresholds={"0.01": 0.999999})
    using = ["--aligned", "--embedder", str(tmp_path / "e.pt")]
    assert main(["enroll", str(people), str(tmp_path / "gallery.pt"), *using]) == 0
    assert "4 people by 16 photographs" in capsys.readouterr().out
    names = sorted(each.name for each in people.iterdir() if each.is_dir())
    means = [sum(_by_hand(made, path) for path in sorted((people / name).glob("*.jpg"))) for name in names]
    probe = people / names[2] / "01.jpg"
    cosines = {n: float(torch.cosine_similarity(m, _by_hand(made, probe), dim=0)) for n, m in zip(names, means)}
    best = sorted(cosines, key=lambda name: -cosines[name])[:3]
    for gallery in (str(tmp_path / "gallery.pt"), str(people)):
        assert main(["identify", gallery, str(probe), "--top", "3", *using]) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert [row["name"] for row in rows] == best and [row["rank"] for row in rows] == ["1", "2", "3"]
        for row in rows:
            assert float(row["cosine"]) == pytest.approx(cosines[row["name"]], abs=1e-5)
    out = tmp_path / "found.json"
    arguments = [
        "identify",
        str(tmp_path / "gallery.pt"),
        str(people / names[0]),
        "--format",
        "json",
        "--out",
        str(out),
    ]
    assert main([*arguments, *using]) == 0
    rows = json.loads(out.read_text())
    assert len(rows) == 4 * 4 and len({row["probe"] for row in rows}) == 4  # a gallery of four, top 5
    assert main([*arguments, *using, "--unknown"]) == 0
    assert [row["name"] for row in json.loads(out.read_text())] == ["unknown"] * 4
    assert main([*arguments, *using, "--unknown", "-1", "--top", "1"]) == 0
    assert "unknown" not in out.read_text()


def test_a_gallery_of_another_embedder(people, tmp_path, capsys):
    embedder(tmp_path / "e.pt")
    embedder(tmp_path / "f.pt", seed=1)
    assert main(["enroll", str(people), str(tmp_path / "g.pt"), "--aligned", "--embedder", str(tmp_path / "e.pt")]) == 0
    probe = str(next(people.rglob("*.jpg")))
    for gallery, text in [
        ("g.pt", "is of another embedder; enroll again"),
        ("f.pt", "is no gallery that `enroll` wrote"),
    ]:
        arguments = ["identify", str(tmp_path / gallery), probe, "--aligned", "--embedder", str(tmp_path / "f.pt")]
        assert main(arguments) == 2
        assert text in capsys.readouterr().err


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Photographs of packages: a folder of people, and probes."""
    try:
        find_weights()
    except DetectorError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("album")
    for name in ("people/Eileen", "people/Group", "people/Nobody", "probes"):
        (folder / name).mkdir(parents=True)
    astronaut().save(folder / "people/Eileen/1.png")
    group().save(folder / "people/Group/1.png")
    without_faces().save(folder / "people/Nobody/1.png")
    (folder / "people/Eileen/broken.png").write_bytes(b"broken")
    astronaut().rotate(10).save(folder / "probes/turned.png")
    return folder


def test_photographs_are_aligned_on_the_way(album, tmp_path, capsys):
    made = embedder(tmp_path / "e.pt", thresholds={"0.01": 0.9})
    using = ["--embedder", str(tmp_path / "e.pt")]
    eileen, turned = str(album / "people/Eileen/1.png"), str(album / "probes/turned.png")
    assert main(["verify", eileen, turned, *using, "--threshold", "-1"]) == 0
    cosine = float(capsys.readouterr().out.split()[1].rstrip(","))
    crops = []
    for path in (eileen, turned):
        photo = Image.open(path).convert("RGB")
        (face,) = Detector()(photo)
        crops.append(align_face(photo, face, SIZE)[0])
    assert cosine == pytest.approx(float(torch.cosine_similarity(*made.embed(crops), dim=0)), abs=1e-4)
    for arguments in (
        [eileen, album / "people/Nobody/1.png"],
        [eileen, album / "people/Eileen/broken.png"],
        [eileen, "none.jpg"],
    ):
        assert main(["verify", *map(str, arguments), *using]) == 2
        heard = capsys.readouterr().err
        assert str(arguments[1]) in heard and ("no face found" in heard or "no image" in heard or "No such" in heard)
    gallery = str(tmp_path / "gallery.pt")
    assert main(["enroll", str(album / "people"), gallery, *using, "--on-bad", "fail"]) == 2
    assert "broken.png: no image" in capsys.readouterr().err
    assert main(["enroll", str(album / "people"), gallery, *using]) == 0
    heard = capsys.readouterr()
    assert "2 people by 2 photographs" in heard.out
    assert "skipped" in heard.err and "Nobody: no face in any photograph" in heard.err
    assert main(["identify", gallery, turned, *using, "--top", "1"]) == 0
    assert ",Eileen," in capsys.readouterr().out
    assert main(["identify", gallery, str(album / "people/Nobody"), *using]) == 2
    assert "no face in any of the probes" in capsys.readouterr().err
    assert main(["identify", gallery, turned, *using, "--top", "0"]) == 2
    assert "--top of at least 1" in capsys.readouterr().err


def test_nothing_warns(people, tmp_path):
    embedder(tmp_path / "e.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            main(["enroll", str(people), str(tmp_path / "g.pt"), "--aligned", "--embedder", str(tmp_path / "e.pt")])
            == 0
        )
