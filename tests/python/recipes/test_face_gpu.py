"""The recipe on a GPU: training in 16 bits, resumed; evaluation and detection beside the CPU's."""

import csv
import json

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("torchvision")
from drawn import SMALL, embedder, faces, pairs, records  # noqa: E402

from recipes.face.__main__ import main  # noqa: E402
from recipes.face.detection import Detector, DetectorError, find_weights  # noqa: E402

from photographs import astronaut, group  # noqa: E402

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*", "ignore::FutureWarning:torch.*"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    path = records(folder, people=12, views=8)
    pairs(folder, folder / "faces")
    return path


def _lines(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "more", [["--amp", "fp16"], ["--amp", "bf16", "--sample-rate", "0.5"], ["--ema", "0.9", "--grad-checkpointing"]]
)
def test_training_on_a_gpu(data, tmp_path, more):
    arguments = ["train", *SMALL, "--device", "cuda", "--data", str(data), "--val", str(data.with_name("pairs.bin"))]
    arguments += [
        "--set",
        "width=16",
        "--set",
        "features=64",
        "--epochs",
        "6",
        "--batch",
        "32",
        "--workers",
        "2",
        *more,
    ]
    out = tmp_path / "run"
    assert main([*arguments, "--out", str(out)]) == 0
    lines = _lines(out / "log.csv")
    assert [int(line["step"]) for line in lines] == list(range(1, 19))
    assert float(lines[-1]["loss"]) < float(lines[0]["loss"])
    state = torch.load(out / "last.pt", weights_only=True)
    state["step"] = 15
    torch.save(state, out / "last.pt")
    assert main([*arguments, "--out", str(out)]) == 0
    assert [int(line["step"]) for line in _lines(out / "log.csv")] == list(range(1, 19))
    # What a GPU made is used anywhere.
    assert main(["eval", str(out / "embedder.pt"), "--bin", str(data.with_name("pairs.bin")), "--device", "cpu"]) == 0


def test_evaluation_is_the_cpus(tmp_path):
    of = faces(tmp_path, people=6, views=6)
    found = pairs(tmp_path, of)
    embedder(tmp_path / "e.pt")
    scores = {}
    for device in ("cpu", "cuda"):
        arguments = ["eval", str(tmp_path / "e.pt"), "--bin", str(found), "--device", device]
        assert main([*arguments, "--out", str(tmp_path / device)]) == 0
        scores[device] = json.loads((tmp_path / device / "report.json").read_text())["sets"]["pairs"]
    assert scores["cpu"]["eer"] == pytest.approx(scores["cuda"]["eer"], abs=0.04)


@pytest.mark.parametrize("photo", [astronaut, group])
def test_detection_is_the_cpus(photo):
    try:
        find_weights()
    except DetectorError as error:
        pytest.skip(str(error))
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = [Detector(device=device)(photo()) for device in ("cpu", "cuda")]
    assert len(found[0]) == len(found[1]) > 0
    for mine, theirs in zip(*found):
        torch.testing.assert_close(torch.tensor(mine.landmarks), torch.tensor(theirs.landmarks), rtol=0, atol=0.05)
        assert mine.score == pytest.approx(theirs.score, abs=1e-3)
