"""How the package is put together: loading, versions, and the arrows between folders."""

import hashlib
import json
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
LIBRARY = torchmargin._extension.BINARIES / "lib" / "libtorchmargin.so"


def _import_with(**environment):
    return subprocess.run(
        [sys.executable, "-c", "import torchmargin; print(torchmargin.plan(4, 5, 6).path)"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd="/",
    )


def test_versions_agree():
    header = (ROOT / "csrc/include/torchmargin/version.h").read_text()
    assert f'"{torchmargin.__version__}"' in header
    assert torchmargin.config.built_for_torch().split("+")[0] == torch.__version__.split("+")[0]


def test_a_build_with_nvcc_names_its_architectures():
    loaded = Path(os.environ.get("TORCHMARGIN_LIBRARY") or LIBRARY)
    with_kernels = bool(json.loads(loaded.with_suffix(".json").read_text())["cuda"])
    architectures = torchmargin.config.cuda_architectures()
    assert with_kernels == (len(architectures) > 0)
    for name in architectures:
        assert re.fullmatch(r"\d+\.\d+a?(\+PTX)?", name)


def test_another_library_can_be_named(tmp_path):
    for suffix in (".so", ".json"):
        shutil.copy(LIBRARY.with_suffix(suffix), tmp_path)
    # The copy is not beside torch, which is loaded already when it is asked for.
    ran = _import_with(TORCHMARGIN_LIBRARY=str(tmp_path / "libtorchmargin.so"))
    assert ran.returncode == 0 and ran.stdout.strip() == "cpu-sweep", ran.stderr


def test_another_torch_gives_one_sentence(tmp_path):
    shutil.copy(LIBRARY, tmp_path)
    (tmp_path / "libtorchmargin.json").write_text(json.dumps({"version": "0.2.0", "torch": "1.13.0"}))
    ran = _import_with(TORCHMARGIN_LIBRARY=str(tmp_path / "libtorchmargin.so"))
    last = ran.stderr.strip().splitlines()[-1]
    assert last == (
        f"ImportError: torchmargin was built for torch 1.13.0, but torch {torch.__version__} is installed: install "
        f"a torchmargin built for torch {'.'.join(torch.__version__.split('.')[:2])}, or torch 1.13."
    )


@pytest.mark.parametrize("kernels", ["1.2", None])
def test_another_cuda_gives_one_sentence(tmp_path, kernels):
    shutil.copy(LIBRARY, tmp_path)
    facts = {"version": "0.2.0", "torch": torch.__version__, "cuda": kernels or ""}
    (tmp_path / "libtorchmargin.json").write_text(json.dumps(facts))
    ran = _import_with(TORCHMARGIN_LIBRARY=str(tmp_path / "libtorchmargin.so"))
    if kernels is None:  # a library for the CPU works beside any build of its torch
        assert ran.returncode == 0, ran.stderr
        return
    last = ran.stderr.strip().splitlines()[-1]
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
    assert last.startswith(
        "ImportError: torchmargin was built with kernels for CUDA 1.2, "
        f"but torch {torch.__version__} is a build for {runtime}:"
    )


def test_a_missing_library_is_named(tmp_path):
    ran = _import_with(TORCHMARGIN_LIBRARY=str(tmp_path / "none.so"))
    assert "ImportError: torchmargin: there is no library at" in ran.stderr


def test_compiled_code_is_kept_for_this_library_only():
    """torch.compile's caches on disk know no versions of custom ops: another build's dtypes would be misread."""
    ran = subprocess.run(
        [sys.executable, "-c", "import torch, torchmargin; print(torch.compiler.config.cache_key_tag)"],
        env={**os.environ, "TORCH_COMPILE_CACHE_KEY_TAG": "mine"},
        capture_output=True,
        text=True,
        cwd="/",
    )
    digest = hashlib.sha256(LIBRARY.read_bytes()).hexdigest()[:16]
    assert ran.stdout.strip() == f"mine-torchmargin-{digest}", ran.stderr


def test_the_library_links_no_python():
    needed = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"NEEDED.*\[(.*)\]", needed)
    assert "libtorch_cpu.so" in libraries
    assert not any("python" in name for name in libraries)


# Which folders a folder may include beside itself, as the map in docs/design.md draws it: from the top downwards.
ARROWS = {
    "csrc/include": set(),
    "csrc/math": {"include"},
    "csrc/plan": {"include"},
    "csrc/ops": {"include", "math", "plan"},
    "csrc/distributed": {"include", "ops"},
    "csrc/sweep": {"include", "math", "plan", "ops"},
    "csrc/cpu": {"include", "math", "plan", "ops", "sweep"},
    "cuda": {"include", "math", "plan", "ops", "sweep"},
    "csrc/api": {"include", "ops", "distributed"},
    "csrc/bindings": {"include", "plan", "ops"},
}
# How a folder's own files are named by its includes.
OWN_NAMES = {"cuda": {"cuda", "kernels", "hopper", "fused_tile.h", "target_values.h"}}
STAND_IN = "device_on_host.h"  # the tests' stand-in for CUDA's headers


def _included(file):
    """The folders of ours that a file includes, but for its own."""
    folder = next(name for name in ARROWS if file.is_relative_to(ROOT / name))
    own = OWN_NAMES.get(folder, {Path(folder).name})
    for include in re.findall(r'^#include "([^"]+)"', file.read_text(), re.MULTILINE):
        first = include.split("/")[0]
        if first == "torchmargin":
            first = "include"
        if first not in own and include != STAND_IN:
            yield first


@pytest.mark.parametrize("folder", ARROWS)
def test_includes_follow_the_arrows(folder):
    files = [f for f in sorted((ROOT / folder).rglob("*")) if f.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert files
    for file in files:
        for included in _included(file):
            assert included in ARROWS[folder], f"{file.relative_to(ROOT)} includes {included}"


def test_arrows_go_downwards_only():
    """No two folders include each other, by whatever way round."""
    left = dict(ARROWS)
    while left:
        free = [folder for folder, below in left.items() if all(f"csrc/{name}" not in left for name in below)]
        assert free, f"these folders go round in a circle: {sorted(left)}"
        for folder in free:
            del left[folder]


def test_the_map_names_every_folder_and_arrow():
    """docs/design.md draws the same arrows, one line each: `folder -> what it includes`."""
    text = (ROOT / "docs/design.md").read_text()
    drawn = {
        source: set(filter(None, re.split(r",\s*", targets.strip())))
        for source, targets in re.findall(r"^    ([a-z]+) +-> ?([a-z, ]*)$", text, re.MULTILINE)
    }
    assert drawn == {Path(folder).name: below for folder, below in ARROWS.items()}


def test_the_margin_is_written_once_in_the_library():
    """psi's own words appear in csrc/math/margin.h and nowhere else; ops/formula.cpp has them for ATen tensors."""
    files = [file for file in (ROOT / "csrc").rglob("*") if file.is_file()]
    having = {file.name for file in files if "std::cos(phi)" in file.read_text()}
    assert having == {"margin.h"}


def test_no_cuda_words_in_csrc():
    files = sorted((ROOT / "csrc").rglob("*.cpp"))
    assert files
    for file in files:
        assert not re.search(r"#if.*(USE_CUDA|WITH_CUDA|__CUDACC__)", file.read_text()), file
