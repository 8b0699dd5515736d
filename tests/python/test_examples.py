"""The Python examples for other trainers, run as a user would. What is trained is checked against what is not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples/python"

pytestmark = pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="slow: whole trainings")


def _run(name, *arguments, launcher=()):
    """The numbers of the last line that an example prints, by the word before each."""
    command = [sys.executable, *launcher, EXAMPLES / name, *arguments]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    last = ran.stdout.strip().splitlines()[-1]
    return {word: float(number) for word, number in re.findall(r"(\w+) (\d+(?:\.\d+)?)", last)}


@pytest.fixture(scope="module")
def whole():
    """What a run in one piece has learnt."""
    pytest.importorskip("lightning")
    return _run("train_lightning.py", "--epochs", 3)


def test_lightning(whole):
    assert whole["rate"] < 0.14 < 0.18 < whole["untrained"]  # equal error rates


def test_lightning_goes_on_where_it_was_saved(whole, tmp_path):
    _run("train_lightning.py", "--epochs", 1, "--save", tmp_path / "first.ckpt")
    assert _run("train_lightning.py", "--epochs", 3, "--resume", tmp_path / "first.ckpt") == whole


def test_lightning_trains_in_bfloat16():
    pytest.importorskip("lightning")
    found = _run("train_lightning.py", "--precision", "bf16-mixed")
    assert found["rate"] < 0.12 < 0.18 < found["untrained"]


@pytest.mark.parametrize("arguments", [(), ("--precision", "bf16", "--accumulate", 2)], ids=["float32", "bf16"])
def test_accelerate(arguments):
    pytest.importorskip("accelerate")
    found = _run("train_accelerate.py", *arguments)
    assert found["processes"] == 1
    assert found["accuracy"] > 0.85 and found["untrained"] < 0.25


def test_accelerate_with_two_processes():
    pytest.importorskip("accelerate")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    found = _run("train_accelerate.py", launcher=torchrun)
    assert found["processes"] == 2  # and not each on its own
    assert found["accuracy"] > 0.85 and found["untrained"] < 0.25


def test_timm():
    pytest.importorskip("timm")
    found = _run("train_timm.py")
    assert found["accuracy"] > 0.85 and found["untrained"] < 0.25
