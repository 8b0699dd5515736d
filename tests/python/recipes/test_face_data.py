"""What a step is given: which images, changed how, whoever asks; and the settings by name."""

import dataclasses
import io

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image")
from recipes.face.config import CONFIGS, LOSSES, Config, ConfigError, changed, make_loss  # noqa: E402
from recipes.face.data import (  # noqa: E402
    IGNORED,
    EpochPlaces,
    FolderImages,
    Place,
    TrainingSet,
    change,
    open_images,
)
from recipes.face.errors import RecipeError  # noqa: E402
from recipes.face.pack import pack_folder  # noqa: E402


def _places(rank=0, ranks=1, start=0, epoch=0, images=23, of_step=6):
    made = EpochPlaces(images, of_step, rank, ranks, seed=5)
    made.start, made.epoch = start, epoch
    found = list(made)
    assert len(found) == len(made)
    return found


def test_an_epoch_has_each_image_at_most_once():
    found = _places()
    assert len(found) == 18 and len({place.image for place in found}) == 18
    assert {place.epoch for place in found} == {0}
    assert [place.image for place in found] != [place.image for place in _places(epoch=1)]
    assert found == _places()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_each_step(ranks):
    alone = _places()
    parts = [_places(rank, ranks) for rank in range(ranks)]
    share = 6 // ranks
    for step in range(3):
        together = [place for part in parts for place in part[step * share : (step + 1) * share]]
        assert sorted(together) == sorted(alone[step * 6 : step * 6 + 6])


def test_an_epoch_is_resumed_in_its_middle():
    assert _places(start=2) == _places()[12:]


def test_a_step_that_is_larger_than_the_set():
    with pytest.raises(RecipeError, match="a step takes 24 images, but there are 23; set a smaller --batch"):
        EpochPlaces(23, 24, 0, 1, 0)


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for person in ("Ada", "Bo"):
        (tmp_path / "set" / person).mkdir(parents=True)
        for place in range(3):
            pixels = torch.randint(0, 256, (20, 20, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "set" / person / f"{place}.png")
    return tmp_path / "set"


def _config(**options):
    return dataclasses.replace(Config(size=20), **options)


def test_folders_and_records_hold_the_same(folder, tmp_path):
    pack_folder(folder, tmp_path / "packed/train.rec")
    of_folder = open_images(folder)
    for path in (tmp_path / "packed/train.rec", tmp_path / "packed"):
        of_records = open_images(path)
        assert of_records.classes == of_folder.classes == 2 and len(of_records) == len(of_folder) == 6
        assert [of_records.read(k) for k in range(6)] == [of_folder.read(k) for k in range(6)]
    assert "train.rec, record 1" in open_images(tmp_path / "packed").name(0)
    with pytest.raises(RecipeError, match="none.rec is no file"):
        open_images(tmp_path / "none.rec")
    with pytest.raises(RecipeError, match="is no folder"):
        open_images(tmp_path / "nowhere")


def test_pixels_are_the_image_s(folder):
    pixels, label = TrainingSet(open_images(folder), _config(flip=0.0))[Place(0, 4)]
    assert label == 1 and pixels.dtype == torch.uint8
    wanted = np.asarray(Image.open(folder / "Bo/1.png"))
    np.testing.assert_array_equal(pixels.permute(1, 2, 0), wanted)
    mirrored, _ = TrainingSet(open_images(folder), _config(flip=1.0))[Place(0, 4)]
    torch.testing.assert_close(mirrored, pixels.flip(2))
    larger, _ = TrainingSet(open_images(folder), _config(size=32))[Place(0, 4)]
    assert larger.shape == (3, 32, 32)


CHANGES = {"flip": 1.0, "low_resolution": 1.0, "blur": 1.0, "hsv": 1.0, "grey": 1.0}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_changes_and_is_the_same_again(folder, name):
    image = Image.open(folder / "Ada/0.png").convert("RGB")
    none = dict.fromkeys(CHANGES, 0.0)
    config = _config(**{**none, name: 1.0})
    found = [np.asarray(change(image, config, np.random.default_rng(seed))) for seed in (1, 1, 2)]
    assert found[0].shape == (20, 20, 3) and (found[0] != np.asarray(image)).any()
    np.testing.assert_array_equal(found[0], found[1])
    if name not in ("flip", "grey"):
        assert (found[0] != found[2]).any()
    np.testing.assert_array_equal(change(image, _config(**none), np.random.default_rng(0)), image)
    if name == "grey":
        assert (found[0][..., :1] == found[0]).all()


def test_a_change_is_made_as_often_as_it_says(folder):
    data = TrainingSet(open_images(folder), _config(flip=0.3))
    image = np.asarray(Image.open(folder / "Ada/0.png"))
    mirrored = [(data[Place(epoch, 0)][0].permute(1, 2, 0).numpy() != image).any() for epoch in range(400)]
    assert 0.3 * 400 - 4 * 9.2 < sum(mirrored) < 0.3 * 400 + 4 * 9.2  # four deviations


def test_an_image_that_cannot_be_read_is_named(folder, capsys):
    (folder / "Ada/1.png").write_bytes(b"nothing")
    images = FolderImages(folder)
    with pytest.raises(RecipeError, match="1.png: no image"):
        TrainingSet(images, _config())[Place(0, 1)]
    pixels, label = TrainingSet(images, _config(), "skip")[Place(0, 1)]
    assert label == IGNORED and pixels.shape == (3, 20, 20)
    assert "skipped" in (heard := capsys.readouterr().err) and "1.png" in heard
    (folder / "Ada/2.png").unlink()
    with pytest.raises(RecipeError, match="2.png"):
        TrainingSet(images, _config())[Place(0, 2)]


def test_a_broken_record_is_named(folder, tmp_path):
    pack_folder(folder, tmp_path / "train.rec")
    images = open_images(tmp_path / "train.rec")
    data = bytearray((tmp_path / "train.rec").read_bytes())
    data[images.records.file.offsets[3]] ^= 0xFF
    (tmp_path / "train.rec").write_bytes(data)
    with pytest.raises(RecipeError, match=r"train.rec, record 3: at byte"):
        TrainingSet(images, _config())[Place(0, 2)]


def test_an_image_of_half_its_bytes_is_bad(folder):
    whole = io.BytesIO()
    Image.open(folder / "Bo/0.png").convert("RGB").resize((200, 200)).save(whole, "JPEG")
    (folder / "Bo/0.png").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(RecipeError, match="0.png: no image"):
        TrainingSet(open_images(folder), _config())[Place(0, 3)]


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_named_settings_are_whole(name):
    CONFIGS[name].check()
    make_loss(CONFIGS[name], 10, device="meta")


def test_insightface_s_numbers():
    config = CONFIGS["ms1mv3_r50"]
    assert (config.lr, config.momentum, config.decay, config.batch, config.epochs) == (0.1, 0.9, 5e-4, 128, 20)
    assert (config.warmup, config.schedule, config.amp, config.growth_interval, config.clip) == (
        0,
        "linear",
        "fp16",
        100,
        5,
    )
    loss = make_loss(config, 10)
    assert (loss.scale, float(loss.margin), loss.extension, loss.margin_gradient) == (
        64,
        0.5,
        "none",
        "straight_through",
    )
    glint = CONFIGS["glint360k_r100"]
    assert (glint.net, glint.decay, float(make_loss(glint, 10).margin)) == ("iresnet100", 1e-4, 0.4)
    assert CONFIGS["wf42m_pfc02_r100"].sample_rate == 0.2


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_by_name(name):
    loss = make_loss(Config(loss=name, features=8), 5)
    assert torch.isfinite(loss(torch.randn(4, 8), torch.tensor([0, 1, 2, 4])))


def test_settings_from_text():
    config = changed(Config(), "epochs", "3")
    config = changed(config, "lr", "1")
    config = changed(config, "sync_bn", "true")
    config = changed(config, "net", "resnet50")
    config = changed(changed(config, "loss.margin", "0.4"), "loss.easy", "none")
    assert (config.epochs, config.lr, config.sync_bn, config.net) == (3, 1.0, True, "resnet50")
    assert isinstance(config.lr, float) and config.loss_options == {"margin": 0.4, "easy": None}
    assert Config().loss_options == {}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("epoch", "3", "there is no setting 'epoch'"),
        ("loss_options", "3", "there is no setting 'loss_options'"),
        ("epochs", "3.5", "epochs to be of type int, but got '3.5'"),
        ("epochs", "true", "epochs to be of type int"),
        ("lr", "fast", "lr to be of type float, but got 'fast'"),
        ("sync_bn", "1", "sync_bn to be of type bool"),
    ],
)
def test_settings_that_there_are_not(name, text, message):
    with pytest.raises(ConfigError, match=message):
        changed(Config(), name, text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs of at least 1, but got 0"),
        ({"lr": -0.1}, "lr of at least 0"),
        ({"lr": float("nan")}, "lr of at least 0, but got nan"),
        ({"lr": float("inf")}, "lr"),
        ({"flip": 1.5}, r"flip in \[0, 1\], but got 1.5"),
        ({"sample_rate": 0.0}, r"sample_rate in \(0, 1\], but got 0.0"),
        ({"center_deviation": 0.0}, "center_deviation in"),
        ({"amp": "fp8"}, "amp to be one of none, bf16, fp16, but got 'fp8'"),
        ({"schedule": "step"}, "schedule to be one of linear, cosine"),
        ({"loss": "arc"}, "loss to be one of arcface"),
        ({"warmup": 20.0}, "warmup to be less than the 20 epochs"),
        ({"ema": -1.0}, r"ema in \[0, 1\]"),
        ({"workers": -1}, "workers of at least 0"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(Config(), **options).check()


def test_what_a_loss_refuses_is_named():
    with pytest.raises(ConfigError, match="arcface: .*margins"):
        make_loss(Config(loss="arcface", loss_options={"margins": 0.5}), 5)
    with pytest.raises(ConfigError, match="cosface: .*scale"):
        make_loss(Config(loss="cosface", loss_options={"scale": -1.0}), 5)
