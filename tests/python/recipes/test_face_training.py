"""`train`: stopped, killed and resumed bit for bit, on one rank and two, and what it refuses."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("torchvision")
from drawn import SMALL, pairs, records  # noqa: E402

from recipes.face import training  # noqa: E402
from recipes.face.__main__ import main  # noqa: E402
from recipes.face.config import Config  # noqa: E402
from recipes.face.embedders import load_embedder, save_whole  # noqa: E402
from recipes.face.networks import make_network  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*", "ignore::FutureWarning:torch.*")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    path = records(folder)
    pairs(folder, folder / "faces")
    return path


def _train(data, out, *more):
    return ["train", *SMALL, "--data", str(data), "--epochs", "2", "--batch", "8", "--out", str(out), *map(str, more)]


def _lines(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _state(out):
    return torch.load(out / "last.pt", weights_only=True)


def _assert_same(first, second, but=("config",), name="state"):
    """Dicts and lists of tensors and numbers, bit for bit."""
    if isinstance(first, dict):
        assert set(first) == set(second), name
        for key in first:
            if key not in but:
                _assert_same(first[key], second[key], but, f"{name}/{key}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), name
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), name
        for place, (a, b) in enumerate(zip(first, second)):
            _assert_same(a, b, but, f"{name}/{place}")
    else:
        assert first == second, name


def _stop_after(monkeypatch, steps, number=signal.SIGINT):
    real = training.Trainer.run_step

    def run_step(self, batches):
        found = real(self, batches)
        if self.step == steps:
            os.kill(os.getpid(), number)
        return found

    monkeypatch.setattr(training.Trainer, "run_step", run_step)


def test_a_run_and_its_files(data, tmp_path, capsys):
    out, val = tmp_path / "run", data.with_name("pairs.bin")
    assert main(_train(data, out, "--val", val)) == 0
    heard = capsys.readouterr()
    assert "48 images of 6 classes, 1 rank(s) on cpu, 12 steps from step 0" in heard.out
    assert "images/s" in heard.err and "accuracy" in heard.err
    written = {each.name for each in out.iterdir()}
    assert {"config.json", "log.csv", "val.csv", "last.pt", "best.pt", "embedder.pt", "tensorboard"} <= written
    config = json.loads((out / "config.json").read_text())
    assert (config["classes"], config["images"], config["width"], config["batch"]) == (6, 48, 2, 8)
    lines = _lines(out / "log.csv")
    assert [int(line["step"]) for line in lines] == list(range(1, 13))
    assert float(lines[0]["lr"]) == pytest.approx(0.1 / 6, rel=1e-5) and float(lines[5]["lr"]) == pytest.approx(0.1)
    assert [int(line["step"]) for line in _lines(out / "val.csv")] == [6, 12]
    assert list((out / "tensorboard").glob("events*"))
    embedder, best = load_embedder(out / "embedder.pt"), load_embedder(out / "best.pt")
    assert embedder.trained["step"] == 12 and best.trained["step"] in (6, 12) and best.thresholds
    assert not list(out.glob("*.partial"))


def test_the_first_loss_is_that_of_the_library(data, tmp_path):
    """Of the images that the first step is given, by hand."""
    import torchmargin
    from recipes.face.data import EpochPlaces, Place, TrainingSet, open_images

    out = tmp_path / "run"
    assert main(_train(data, out, "--set", "clip=0")) == 0
    images = open_images(data)
    config = Config(**{**_state(out)["config"]})
    places = list(EpochPlaces(len(images), 8, 0, 1, config.seed))[:8]
    assert isinstance(places[0], Place)
    pixels, labels = zip(*(TrainingSet(images, config)[place] for place in places))
    torch.manual_seed(config.seed)
    network = make_network(config.net, config.features, config.size, config.width).train()
    with training.ranks("cpu") as mesh:
        torch.manual_seed(config.seed)
        trainer = training.Trainer(config, images, mesh)
        weight = trainer.head.weight[0].full_tensor().detach()
    assert weight.std() == pytest.approx(config.center_deviation, rel=0.2)
    loss = torchmargin.ArcFaceLoss(config.features, 6, **config.loss_options)
    with torch.no_grad():
        loss.weight.copy_(weight)
        embeddings = network(torch.stack(pixels).float().sub(127.5).div(127.5))
        expected = loss(embeddings, torch.tensor(labels))
    assert float(_lines(out / "log.csv")[0]["loss"]) == pytest.approx(float(expected), rel=1e-4)


VARIANTS = {
    "plain": [],
    "sampled": ["--sample-rate", "0.5"],
    "mean and accumulated": ["--ema", "0.9", "--accumulate", "2", "--batch", "4", "--set", "dropout=0.2"],
    "fp16": ["--amp", "fp16", "--grad-checkpointing"],
    "bf16": ["--amp", "bf16", "--loss", "adaface", "--set", "loss.h=0.333"],
    "random margins": ["--loss", "elasticface", "--set", "schedule=cosine", "--set", "hsv=0.5", "--set", "blur=0.5"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stopped_run_goes_on_bit_for_bit(data, tmp_path, monkeypatch, capsys, name):
    more = [*VARIANTS[name], "--val", data.with_name("pairs.bin"), "--set", "log_every=3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(_train(data, whole, *more)) == 0
    with monkeypatch.context() as patch:
        _stop_after(patch, 8)  # in the second epoch, between two lines of the log
        assert main(_train(data, cut, *more)) == 130
    assert "stopped after step 8" in capsys.readouterr().out
    assert _state(cut)["step"] == 8
    assert main(_train(data, cut, *more)) == 0
    _assert_same(_state(whole), _state(cut), but=())
    for file in ("embedder.pt", "best.pt"):
        first, second = (torch.load(out / file, weights_only=True) for out in (whole, cut))
        _assert_same(first, second)
    for file in ("log.csv", "val.csv"):
        drop = lambda lines: [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
        assert drop(_lines(whole / file)) == drop(_lines(cut / file))


def test_a_finished_run_is_finished(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(_train(data, out)) == 0
    before = (out / "log.csv").read_text()
    assert main(_train(data, out)) == 0
    assert "12 steps from step 12" in capsys.readouterr().out
    assert (out / "log.csv").read_text() == before
    assert main(_train(data, out, "--resume", "never")) == 0
    assert len(_lines(out / "log.csv")) == 12


def test_a_new_run_leaves_nothing_of_an_old_one(data, tmp_path, monkeypatch):
    out, val = tmp_path / "run", data.with_name("pairs.bin")
    assert main(_train(data, out, "--val", val)) == 0
    events = set((out / "tensorboard").iterdir())
    elsewhere = tmp_path / "elsewhere"
    state = _state(out)
    state["step"] = 6
    save_whole(state, tmp_path / "half.pt")
    assert main(_train(data, elsewhere, "--val", val, "--resume", tmp_path / "half.pt")) == 0
    assert load_embedder(elsewhere / "best.pt").trained["step"] == 12  # its folder had none

    def killed(self, batches):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Trainer, "run_step", killed)
    assert main(_train(data, out, "--resume", "never")) == 130
    assert not any((out / name).exists() for name in ("last.pt", "best.pt", "embedder.pt", "log.csv", "val.csv"))
    assert not events & set((out / "tensorboard").iterdir())


def test_being_asked_to_end_is_as_ctrl_c(data, tmp_path, monkeypatch):
    _stop_after(monkeypatch, 2, signal.SIGTERM)
    assert main(_train(data, tmp_path / "run")) == 130
    assert _state(tmp_path / "run")["step"] == 2


def _command(*arguments, ranks=0):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    return [sys.executable, *launch, "-m", "recipes.face", *arguments]


_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _done(command):
    found = subprocess.run(command, cwd=ROOT, env=_ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


def test_killed_and_resumed(data, tmp_path):
    """By the operating system, at any moment: last.pt is of a step that was saved, and the run ends as if alone."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ["--set", "save_every=1", "--workers", "1"]
    _done(_command(*_train(data, whole, *more)))
    process = subprocess.Popen(
        _command(*_train(data, cut, *more)),
        cwd=ROOT,
        env=_ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while not (cut / "last.pt").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert 1 <= _state(cut)["step"] <= 12
    said = _done(_command(*_train(data, cut, *more)))
    assert f"from step {0}," not in said
    _assert_same(_state(whole), _state(cut))
    assert [line["loss"] for line in _lines(whole / "log.csv")] == [line["loss"] for line in _lines(cut / "log.csv")]


def test_two_ranks_and_then_one(data, tmp_path, capsys):
    """Under torchrun; one rank goes on with what two have saved, and the other way round."""
    two, val = tmp_path / "two", data.with_name("pairs.bin")
    more = ["--val", val, "--batch", 4]
    said = _done(_command(*_train(data, two, *more), ranks=2))
    assert "48 images of 6 classes, 2 rank(s) on cpu, 12 steps from step 0" in said
    assert len(_lines(two / "log.csv")) == 12 and len(_lines(two / "val.csv")) == 2
    state = _state(two)
    assert state["ranks"] == 2 and state["head"]["weight.0"].shape == (6, 16)

    # The same images in the same steps: with one rank, whose batch norms see both halves.
    one = tmp_path / "one"
    assert main(_train(data, one, "--val", val)) == 0
    first = [float(_lines(out / "log.csv")[0]["loss"]) for out in (one, two)]
    assert first[0] == pytest.approx(first[1], rel=0.2) and first[0] != first[1]
    state["step"] = 6
    save_whole(state, two / "last.pt")
    assert main(_train(data, two, "--val", val)) == 0  # as many images a step
    assert "1 rank(s) on cpu, 12 steps from step 6" in capsys.readouterr().out
    state = _state(one)
    state["step"] = 6
    save_whole(state, one / "last.pt")
    assert "2 rank(s) on cpu, 12 steps from step 6" in _done(_command(*_train(data, one, *more), ranks=2))
    assert _state(one)["step"] == 12


def test_two_ranks_with_sampled_classes_are_resumed(data, tmp_path):
    out = tmp_path / "run"
    more = ["--batch", 4, "--sample-rate", "0.5", "--amp", "fp16", "--ema", "0.9"]
    _done(_command(*_train(data, out, *more), ranks=2))
    whole = _state(out)
    assert "12 steps from step 12" in _done(_command(*_train(data, out, *more), ranks=2))
    _assert_same(whole, _state(out))
    # What rank 0 read is what rank 1 has: saved again by both, it is the same.
    whole["step"] = 11
    save_whole(whole, out / "last.pt")
    _done(_command(*_train(data, out, *more), ranks=2))
    moved = _state(out)["head"]["weight.0"] - whole["head"]["weight.0"]
    assert moved.abs().amax(1).gt(0).any()


def test_a_loss_that_is_none_is_named(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(_train(data, out, "--lr", "1e30", "--set", "clip=0")) == 2
    heard = capsys.readouterr().err
    assert "the loss of step" in heard and "last.pt is of a step before it" in heard
    assert not (out / "last.pt").exists() or _state(out)["step"] < 12


def test_a_bad_image_fails_or_is_skipped(data, tmp_path, capfd):
    folder = tmp_path / "set"
    for face in data.parent.joinpath("faces").rglob("*.jpg"):
        to = folder / face.parent.name / face.name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(face.read_bytes())
    bad = sorted(folder.rglob("*.jpg"))[0]
    bad.write_bytes(bad.read_bytes()[:200])
    assert main(_train(folder, tmp_path / "out")) == 2
    assert f"{bad}: no image" in capfd.readouterr().err
    assert main(_train(folder, tmp_path / "out", "--workers", "1")) == 2
    assert bad.name in capfd.readouterr().err
    assert main(_train(folder, tmp_path / "out", "--on-bad", "skip", "--workers", "1")) == 0
    assert f"skipped {bad}" in capfd.readouterr().err


def test_weights_to_begin_from(data, tmp_path, capsys):
    """InsightFace's names, bare or under a wrapper's; an embedder; others are refused by name."""
    torch.manual_seed(7)
    network = make_network("iresnet18", 16, 32, 2)
    bare = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    files = {"bare": bare, "wrapped": {f"module.{name}": value for name, value in network.state_dict().items()}}
    losses = []
    for name, state in files.items():
        torch.save(state, tmp_path / f"{name}.pt")
        assert main(_train(data, tmp_path / name, "--init", tmp_path / f"{name}.pt")) == 0
        losses.append(_lines(tmp_path / name / "log.csv")[0]["loss"])
    assert main(_train(data, tmp_path / "again", "--init", tmp_path / "bare/embedder.pt")) == 0
    assert main(_train(data, tmp_path / "fresh")) == 0
    assert losses[0] == losses[1] != _lines(tmp_path / "fresh/log.csv")[0]["loss"]
    assert float(_lines(tmp_path / "again/log.csv")[0]["loss"]) < float(losses[0])
    other = make_network("iresnet18", 8, 32, 2).state_dict()
    torch.save(other, tmp_path / "other.pt")
    torch.save({**bare, "head.weight": torch.zeros(1)}, tmp_path / "more.pt")
    torch.save({name: bare[name] for name in list(bare)[1:]}, tmp_path / "less.pt")
    (tmp_path / "text.pt").write_text("no weights")
    for name, text in [
        ("other", r"fc.weight is \[8, 64\] in the file, but \[16, 64\] in the network"),
        ("more", "the file has head.weight (and 0 more), which the network has not"),
        ("less", "the network has conv1.weight (and 0 more), which the file has not"),
        ("text", "no weights alone"),
        ("nowhere", "is no file"),
    ]:
        assert main(_train(data, tmp_path / "out", "--init", tmp_path / f"{name}.pt")) == 2
        assert text.replace("\\", "") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_networks(data, tmp_path):
    pytest.importorskip("timm")
    for net in ("resnet50", "timm:resnet18"):
        more = ["--net", net, "--set", "width=64", "--epochs", "1", "--set", "warmup=0", "--batch", "24"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert main(_train(data, tmp_path / net.replace(":", ""), *more)) == 0
        assert load_embedder(tmp_path / net.replace(":", "") / "embedder.pt").network.name == net


def test_what_a_resumed_run_may_not_change(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(_train(data, out)) == 0
    capsys.readouterr()
    assert main(_train(data, out, "--lr", "0.2")) == 2
    assert "was begun with lr 0.1, not 0.2; choose another --out, or --resume never" in capsys.readouterr().err
    assert main(_train(data, out, "--batch", "4", "--accumulate", "2")) == 0  # as many images a step
    assert main(_train(data, out, "--set", "log_every=5", "--workers", "1")) == 0
    capsys.readouterr()
    assert main(_train(data, tmp_path / "new", "--resume", str(tmp_path / "run/embedder.pt"))) == 2
    assert "is not the state of a training run" in capsys.readouterr().err
    assert main(_train(data, tmp_path / "new", "--resume", str(tmp_path / "none.pt"))) == 2
    assert "none.pt is no file" in capsys.readouterr().err
    assert main(_train(data, tmp_path / "new", "--resume", str(out / "last.pt"))) == 0


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--set", "speed=9"], "there is no setting 'speed'"),
        (["--set", "epochs"], "expected --set KEY=VALUE, but got 'epochs'"),
        (["--set", "loss.radius=3"], "arcface: "),
        (["--batch", "49"], "a step takes 49 images, but there are 48"),
        (["--net", "resnet51"], "expected one of iresnet18"),
        (["--net", "resnet50"], "resnet50 takes no width, but got 2"),
        (["--net", "timm:nothing_like_it", "--set", "width=64"], "timm:nothing_like_it: "),
        (["--set", "size=33"], "expected size to be a multiple of 16, but got 33"),
        (["--sample-rate", "0.5", "--set", "loss.label_smoothing=0.1"], "label_smoothing"),
        (["--val", "nowhere.bin"], "nowhere.bin"),
        (["--device", "gpu"], "expected --device cpu, cuda or cuda:N, but got 'gpu'"),
        (["--device", "cuda:99"], "there is no device cuda:99 here"),
        (["--device", "meta"], "there is no device meta here"),
    ],
)
def test_refusals(data, tmp_path, capsys, more, text):
    if "timm" in str(more):
        pytest.importorskip("timm")
    assert main(_train(data, tmp_path / "run", *more)) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_batch_norms_over_ranks_want_gpus(data, tmp_path):
    found = subprocess.run(
        _command(*_train(data, tmp_path / "run", "--batch", 4, "--sync-bn"), ranks=2),
        **{"cwd": ROOT, "env": _ENVIRONMENT, "capture_output": True, "text": True, "timeout": 300},
    )
    assert found.returncode != 0 and "sync_bn: torch has batch norms over ranks on GPUs alone" in found.stderr


def test_rates():
    config = Config(lr=0.4)
    linear = [training.rate_at(config, step, 10, 4) for step in range(10)]
    assert linear == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4 * 5 / 6, 0.4 * 4 / 6, 0.2, 0.4 * 2 / 6, 0.4 / 6])
    cosine = [training.rate_at(Config(lr=1.0, schedule="cosine"), step, 4, 0) for step in range(4)]
    assert cosine == pytest.approx([1.0, 0.85355339, 0.5, 0.14644661])
