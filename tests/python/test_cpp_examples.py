"""The C++ examples, built out of the tree against the installed package and tried as a user would."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchmargin

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples/data/digits.csv"

pytestmark = [
    pytest.mark.skipif(not shutil.which("cmake"), reason="there is no cmake"),
    pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="programs would want sanitizers too"),
]


def _run(*command, cwd=None):
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd)
    return ran.returncode, ran.stdout + ran.stderr


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    build = tmp_path_factory.mktemp("examples")
    prefix = f"-DCMAKE_PREFIX_PATH={torchmargin.utils.cmake_prefix_path}"
    quickly = "-DCMAKE_CXX_FLAGS_RELEASE=-O0"  # to compile: what takes their time is torch's and the library's
    for command in (["-S", ROOT / "examples/cpp", "-B", build, prefix, quickly], ["--build", build, "-j", "2"]):
        status, text = _run("cmake", *command)
        assert status == 0, text
    return build


LOSSES = "softmax modified-softmax normalized-softmax sphereface sphereface-r l-softmax cosface arcface combined"
LOSSES += " adaface magface elasticface sub-center curricularface mv-softmax inter-top-k sphereface2 uniface"
LOSSES = LOSSES.split()


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_on_digits(examples, tmp_path, loss):
    network = "mlp" if loss in ("softmax", "cosface") else "conv"
    status, text = _run(
        examples / "train_digits", "--data", DATA, "--loss", loss, "--network", network, "--epochs", 4, cwd=tmp_path
    )
    assert status == 0, text
    assert "47092 pairs of one digit, 94686 of two" in text and "loaded again: the same AUC" in text
    assert (tmp_path / "digits.pt").stat().st_size > 0
    assert float(re.search(r"AUC ([\d.]+)", text).group(1)) > 0.55  # of digits that it has not seen; 0.5 is chance


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--loss", "arcfase"], "there is no loss 'arcfase': adaface arcface"),
        (["--network", "vgg"], "there is no network 'vgg': mlp or conv"),
        (["--data", "none.csv"], "cannot read 'none.csv'"),
        (["--data", ROOT / "README.md"], "columns"),
        (["--epochs", "many"], "--epochs wants a number, but got 'many'"),
        (["--epoch", "3"], "there is no option --epoch"),
        (["--epochs", "nan"], "--epochs wants a number, but got 'nan'"),
        (["--seed"], "--seed wants a value"),
        (["--data", "nan.csv"], "nan.csv: 'nan' is not a finite number"),
        (["--data", "inf.csv"], "inf.csv: '-inf' is not a finite number"),
        (["--data", "large.csv"], "large.csv: '1e39' is not a finite number"),
        (["--data", "label.csv"], "label.csv: '2.5' is not a digit"),
    ],
)
def test_training_refuses_bad_arguments(examples, tmp_path, arguments, text):
    header, *rows = DATA.read_text().splitlines()
    unseen = next(row for row in rows if row.endswith(",7"))
    pixels = unseen.split(",")[1:-1]
    rows.remove(unseen)
    for name, row in {
        "nan.csv": ["nan", *pixels, "7"],
        "inf.csv": ["-inf", *pixels, "7"],
        "large.csv": ["1e39", *pixels, "7"],
        "label.csv": ["0", *pixels, "2.5"],
    }.items():
        (tmp_path / name).write_text("\n".join([header, ",".join(row), *rows]))
    status, output = _run(examples / "train_digits", "--data", DATA, *arguments, cwd=tmp_path)
    assert status == 1 and "train_digits: " in output and text in output, output


VERIFY = """
#include "common/verification.h"
#include <iostream>
int main() {
  const auto labels = torch::tensor({0, 0, 1, 1});
  const auto rows = torch::eye(4);
  auto broken = rows.clone();
  broken[1][0] = NAN;
  broken[3][2] = -INFINITY;
  const std::pair<torch::Tensor, torch::Tensor> calls[] = {
      {broken, labels}, {rows, labels.slice(0, 1)}, {rows[0], labels}, {rows, torch::zeros(4)}};
  for (const auto& [embeddings, own] : calls) {
    try {
      verify_pairs(embeddings, own);
    } catch (const c10::Error& error) {
      std::cout << error.what_without_backtrace() << std::endl;
    }
  }
}
"""


def test_verification_refuses_what_has_no_cosine(tmp_path):
    """Such as the embeddings of a network that has diverged."""
    (tmp_path / "check.cpp").write_text(VERIFY)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(check CXX)\nfind_package(TorchMargin CONFIG REQUIRED)\n"
        "add_executable(check check.cpp)\ntarget_link_libraries(check TorchMargin::TorchMargin)\n"
        f'target_include_directories(check PRIVATE "{ROOT / "examples/cpp"}")\n'
    )
    prefix = f"-DCMAKE_PREFIX_PATH={torchmargin.utils.cmake_prefix_path}"
    for command in (["-S", tmp_path, "-B", tmp_path / "build", prefix], ["--build", tmp_path / "build"]):
        status, text = _run("cmake", *command)
        assert status == 0, text
    assert _run(tmp_path / "build/check")[1].splitlines() == [
        "verification wants finite embeddings, but 2 of 4 rows hold NaN or infinity; the first is row 1",
        "verification wants embeddings [N, D] and labels [N], but got [4, 4] and [3]",
        "verification wants embeddings [N, D] and labels [N], but got [4] and [4]",
        "verification needs pairs of one class and of two",
    ]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A packaged network and a folder of images of digits that it has not seen."""
    folder = tmp_path_factory.mktemp("model")
    export = ROOT / "examples/python/export_embedder.py"
    arguments = ["--output", folder / "embedder.pt2", "--images", folder / "unseen"]
    status, text = _run(sys.executable, export, *arguments)
    assert status == 0, text
    return folder / "embedder.pt2", folder / "unseen"


def test_the_embedder_verifies_and_identifies(examples, model, tmp_path):
    network, images = model
    embedder = examples / "embedder"
    status, text = _run(embedder, "verify", network, images / "7_0.pgm", images / "7_0.pgm")
    assert status == 0 and text == "same\tcosine 1.0000\n"
    status, text = _run(embedder, "verify", network, images / "7_0.pgm", images / "8_1.pgm", "--threshold", "0.99")
    assert status == 0 and text.startswith("different\tcosine ")

    gallery = tmp_path / "gallery.csv"
    status, text = _run(embedder, "enroll", network, images, "--output", gallery)
    assert status == 0 and text.startswith("30 embeddings in ")
    rows = [line.split(",") for line in gallery.read_text().splitlines()]
    assert [row[0] for row in rows] == sorted(path.name for path in images.iterdir())
    unit = torch.tensor([[float(cell) for cell in row[1:]] for row in rows])
    # Six digits are written: half of the last is 5e-6 of a number at most. A length and its quotients round in float32.
    assert unit.norm(dim=1).sub(1).abs().max() < 5e-6 + (unit.shape[1] + 4) * 2.0**-24

    # By the feature file and by the folder of images: the same answer, the probe itself first.
    answers = []
    for source in (gallery, images):
        status, text = _run(embedder, "identify", network, images / "9_3.pgm", "--gallery", source, "--top", "3")
        assert status == 0, text
        answers.append([line.split("\t") for line in text.splitlines()])
    assert answers[0] == answers[1] and len(answers[0]) == 3
    assert answers[0][0] == ["9_3.pgm", "1", "9_3.pgm", "cosine 1.0000"]
    probe = [row[0] for row in rows].index("9_3.pgm")
    nearest = (unit @ unit[probe]).topk(3).indices.tolist()
    assert [answer[2] for answer in answers[0]] == [rows[index][0] for index in nearest]

    # Feature files alone need no model.
    status, text = _run(embedder, "identify", "-", gallery, "--gallery", gallery, "--top", "1")
    assert status == 0 and all(line.split("\t")[0] == line.split("\t")[2] for line in text.splitlines())


def test_the_embedder_reads_every_kind_of_pnm(examples, model, tmp_path):
    network, images = model
    lines = (images / "7_0.pgm").read_text().split()[4:]
    pixels = [int(value) for value in lines]
    (tmp_path / "raw.pgm").write_bytes(b"P5\n# a comment\n8 8\n16\n" + bytes(pixels))
    wide = b"".join((value * 4095).to_bytes(2, "big") for value in pixels)
    (tmp_path / "wide.pgm").write_bytes(b"P5 8 8 65520\n" + wide)
    (tmp_path / "raw.ppm").write_bytes(b"P6\n8 8\n16\n" + bytes(v for value in pixels for v in (value,) * 3))
    (tmp_path / "plain.ppm").write_text("P3\n8 8\n16\n" + " ".join(f"{v} {v} {v}" for v in pixels))
    large = [[pixels[8 * (i // 2) + j // 2] for j in range(16)] for i in range(16)]
    (tmp_path / "large.pgm").write_bytes(b"P5 16 16 16\n" + bytes(v for row in large for v in row))
    for path in sorted(tmp_path.iterdir()):
        status, text = _run(examples / "embedder", "verify", network, images / "7_0.pgm", path)
        assert status == 0, text
        cosine = float(text.split()[-1])
        assert cosine > (0.9 if path.name == "large.pgm" else 0.9999), (path, cosine)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "expected verify, identify or enroll"),
        (["verify", "MODEL", "IMAGE"], "verify wants MODEL A B"),
        (["verify", "none.pt2", "IMAGE", "IMAGE"], "cannot read 'none.pt2'"),
        (["verify", "MODEL", "IMAGE", "none.pgm"], "cannot read 'none.pgm'"),
        (["verify", "MODEL", "IMAGE", "short.pgm"], "short.pgm is cut short"),
        (["verify", "MODEL", "IMAGE", "header.pgm"], "header.pgm has an impossible header"),
        (["verify", "MODEL", "IMAGE", "text.pgm"], "text.pgm is"),
        (["verify", "-", "IMAGE", "IMAGE"], "is an image: give a model to embed it, not '-'"),
        (["verify", "-", "two.csv", "two.csv"], "verify compares single embeddings, but two.csv holds 2"),
        (["verify", "-", "one.csv", "other.csv"], "a has 2 features, b 3"),
        (["verify", "-", "one.csv", "word.csv"], "word.csv: 'x' is not a number"),
        (["verify", "-", "one.csv", "one.csv", "--threshold", "nan"], "--threshold wants a number, but got 'nan'"),
        (["verify", "-", "one.csv", "nan.csv"], "nan.csv: 'nan' is not a finite number"),
        (["verify", "-", "one.csv", "long.csv"], "the embedding of 'b' in long.csv is not finite"),
        (["verify", "-", "bare.csv", "bare.csv"], "the embedding of 'b' in bare.csv has no numbers"),
        (["identify", "-", "one.csv", "--gallery", "nan.csv"], "nan.csv: 'nan' is not a finite number"),
        (["identify", "-", "inf.csv", "--gallery", "one.csv"], "inf.csv: 'inf' is not a finite number"),
        (["enroll", "-", "nan.csv", "--output", "all.csv"], "nan.csv: 'nan' is not a finite number"),
        (["identify", "-", "one.csv"], "identify wants MODEL PROBE... --gallery"),
        (["identify", "-", "one.csv", "--gallery", "one.csv", "--top", "0"], "--top wants at least 1"),
        (["identify", "-", "one.csv", "--gallery", "ragged.csv"], "ragged.csv: row 2 has 2 columns, the first has 3"),
        (["enroll", "-", "one.csv", "--output", "/nowhere/at/all.csv"], "cannot write '/nowhere/at/all.csv'"),
    ],
)
def test_the_embedder_refuses_what_it_cannot_use(examples, model, tmp_path, arguments, text):
    network, images = model
    files = {
        "short.pgm": "P5\n8 8\n16\nabc",
        "header.pgm": "P5\n0 8\n16\n",
        "text.pgm": "hello",
        "one.csv": "a,1,2\n",
        "two.csv": "a,1,2\nb,3,4\n",
        "other.csv": "b,1,2,3\n",
        "word.csv": "b,1,x\n",
        "ragged.csv": "a,1,2\nb,1\n",
        "nan.csv": "b,1,nan\n",
        "inf.csv": "b,inf,1\n",
        "long.csv": "b,3e38,3e38\n",
        "bare.csv": "b\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    named = {"MODEL": network, "IMAGE": images / "7_0.pgm"}
    status, output = _run(examples / "embedder", *(named.get(a, a) for a in arguments), cwd=tmp_path)
    assert status == 1 and "embedder: " in output and text in output, output


RANK = """
import ctypes, sys
import torch, torch.distributed as dist
import torchmargin  # the ops

library, data, store, loss, rank = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
train = ctypes.CDLL(library).train_class_parallel_digits
train.restype = ctypes.c_double
print(train(data.encode(), dist.group.WORLD.group_name.encode(), loss.encode(), 4))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("loss", ["arcface", "inter-top-k", "sphereface2"])
def test_classes_over_ranks_train_in_cpp(examples, tmp_path, loss):
    """C++ on two gloo ranks; the process groups are made by Python, whose LibTorch has no headers for that."""
    (library,) = examples.glob("libclass_parallel_digits.*")
    commands = [[sys.executable, "-c", RANK, library, DATA, tmp_path / "store", loss, rank] for rank in (0, 1)]
    ranks = [
        subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        outputs = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    first, second = (float(out.split()[-1]) for out, _ in outputs)
    assert first == second > 0.9  # ten digits; chance is 0.1


def test_a_libtorch_that_makes_no_process_group_is_named(examples):
    status, text = _run(examples / "train_class_parallel")
    if status != 77:
        pytest.skip("this LibTorch came with gloo's headers")
    assert "not run, this LibTorch came without gloo's headers" in text
