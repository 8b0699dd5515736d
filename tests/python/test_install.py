"""What setup.py, make and CMake decide before anything is built (scripts/check_install.sh installs for real)."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_cmake = pytest.mark.skipif(not shutil.which("cmake"), reason="there is no cmake")
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
NAMES = ("CUDACXX", "CUDA_HOME", "TORCHMARGIN_CUDA", "TORCHMARGIN_CMAKE_ARGS", "CXX", "MAKEFLAGS", "MAKELEVEL", "TORCH")


def _run(*command, **environment):
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    command = [str(part) for part in command]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**clean, **environment})
    return ran.returncode, " ".join((ran.stdout + ran.stderr).split())


@pytest.fixture
def setup_py(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("torchmargin_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def machine(tmp_path):
    """A torch with CUDA, and an nvcc in each of three folders; choose() asks the rule."""
    (tmp_path / "torch/lib").mkdir(parents=True)
    (tmp_path / "torch/lib/libc10_cuda.so").touch()
    for folder in ("on path", "toolkit/bin", "other"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").write_text("#!/bin/sh\n")
        (tmp_path / folder / "nvcc").chmod(0o755)

    def choose(*arguments, torch="torch", path="", **environment):
        rule = [
            f"-DTORCHMARGIN_TORCH_DIR={tmp_path / torch}",
            *arguments,
            "-P",
            ROOT / "cmake/ChooseCudaCompiler.cmake",
        ]
        status, text = _run(shutil.which("cmake"), *rule, PATH=path, **environment)
        found = re.search(r"CUDA compiler: (.*?) ?-- reason: (.*)", text)
        return (found.group(1).removeprefix(f"{tmp_path}/"), found.group(2)) if status == 0 else text

    choose.folder = tmp_path
    return choose


@needs_cmake
def test_nvcc_is_the_one_that_is_named_else_the_one_on_path(machine):
    folder = machine.folder
    everything = {"path": str(folder / "on path"), "CUDA_HOME": str(folder / "toolkit")}
    everything["CUDACXX"] = str(folder / "other/nvcc")
    given = f"-DCMAKE_CUDA_COMPILER={folder / 'toolkit/bin/nvcc'}"
    assert machine(given, **everything) == ("toolkit/bin/nvcc", "named by CMAKE_CUDA_COMPILER")
    assert machine(**everything) == ("other/nvcc", "named by CUDACXX")
    del everything["CUDACXX"]
    assert machine(**everything) == ("toolkit/bin/nvcc", "named by CUDA_HOME")
    del everything["CUDA_HOME"]
    assert machine(**everything) == ("on path/nvcc", "found on PATH")
    assert machine(CUDACXX="nvcc", **everything) == ("on path/nvcc", "named by CUDACXX")


@needs_cmake
def test_no_nvcc_is_a_build_for_the_cpu_with_a_reason(machine):
    assert machine() == ("", "no nvcc on PATH, in CUDA_HOME or CUDACXX")  # wherever else one may be
    path = str(machine.folder / "on path")
    assert machine("-DTORCHMARGIN_CUDA=OFF", path=path) == ("", "TORCHMARGIN_CUDA is OFF")
    assert machine(torch="on path", path=path) == ("", "torch is a CPU-only build")


@needs_cmake
def test_a_named_compiler_that_is_not_there_is_an_error(machine):
    path = str(machine.folder / "on path")
    assert "CUDACXX names the CUDA compiler '/none/nvcc'" in machine(path=path, CUDACXX="/none/nvcc")
    assert "CUDA_HOME names the CUDA compiler '/none/bin/nvcc'" in machine(path=path, CUDA_HOME="/none")
    assert "TORCHMARGIN_CUDA is ON, but there is no nvcc on PATH" in machine("-DTORCHMARGIN_CUDA=ON")
    assert "is a CPU-only build" in machine("-DTORCHMARGIN_CUDA=ON", torch="on path", path=path)


@needs_cmake
def test_the_version_says_what_is_built(setup_py, monkeypatch, tmp_path):
    torch = tmp_path / "torch"
    (torch / "lib").mkdir(parents=True)
    (torch / "version.py").write_text("__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    (torch / "lib/libc10_cuda.so").touch()
    (tmp_path / "nvcc").touch()
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setattr(setup_py, "torch_folder", lambda: torch)
    monkeypatch.setattr(setup_py, "IN_SDIST", False)
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    for arguments, label in (("", "+pt211cu130"), ("-DTORCHMARGIN_CUDA=OFF", "+pt211cpu"), ("-D X=Y", "+pt211cu130")):
        monkeypatch.setenv("TORCHMARGIN_CMAKE_ARGS", arguments)
        setup_py.cuda_compiler.cache_clear()
        assert setup_py.version().endswith(label)
    monkeypatch.setenv("TORCHMARGIN_CUDA", "OFF")
    setup_py.cuda_compiler.cache_clear()
    assert setup_py.version().endswith("+pt211cpu")
    assert setup_py.requirements()[0] == "torch==2.11.*"


def test_torch_is_looked_for_where_python_imports_from(setup_py, monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.11.0'\n")
    (tmp_path / "torch/__init__.py").touch()
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda kind, **_: str(tmp_path / "none"))
    monkeypatch.setattr(setup_py.sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "torch")
    assert setup_py.torch_folder() == tmp_path / "torch"


def test_a_cache_of_another_tree_generator_or_torch_is_dropped(setup_py, tmp_path):
    cache = tmp_path / "CMakeCache.txt"
    known = {"CMAKE_HOME_DIRECTORY": "/a", "CMAKE_GENERATOR": "Ninja", "TORCHMARGIN_TORCH_DIR": "/t"}

    def kept(**wanted):
        cache.write_text("".join(f"{name}:INTERNAL={value}\n" for name, value in known.items()))
        setup_py.drop_foreign_cache(tmp_path, wanted)
        return cache.exists()

    assert kept(**known)
    assert kept(CMAKE_CUDA_COMPILER="/nvcc")  # none yet
    for name in known:
        assert not kept(**{**known, name: "other"}), name
    setup_py.drop_foreign_cache(tmp_path / "none", known)


def test_the_description_links_nowhere_that_is_not_there(setup_py):
    assert re.findall(r"\]\((?!https?:)", setup_py.description()) == []
    assert "docs/cpp.md" in setup_py.description()


@needs_make
def test_make_lists_its_targets_and_the_torch_versions():
    status, text = _run("make", "help")
    assert status == 0 and "demo" in text and "test" in text and "2.11 2.15" in text
    status, text = _run("make", "-n", "demo", "TORCH=1.13")
    assert status != 0 and "there is no requirements/torch-1.13.txt; TORCH may be one of: 2.11 2.15" in text


@needs_make
def test_make_works_in_a_path_with_a_space(tmp_path):
    """With stand-ins for all tools, each of which writes down its call."""
    tree = tmp_path / "a tree"
    for folder in ("scripts", "bin", ".venv/torch-2.11/bin", "build/torch-2.11-tsan/tests/cpp", "build/torch-2.11"):
        (tree / folder).mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", tree)
    shutil.copytree(ROOT / "requirements", tree / "requirements")
    (tree / "build/torch-2.11/torchmargin-summary.txt").touch()
    tests = [f"build/torch-2.11-tsan/tests/cpp/torchmargin_{name}_tests" for name in ("thread", "device_on_host")]
    tools = [
        "bin/cmake",
        "bin/ctest",
        "scripts/check_tools.sh",
        "scripts/mutants.sh",
        ".venv/torch-2.11/bin/python",
        *tests,
    ]
    for tool in tools:
        (tree / tool).write_text('#!/bin/sh\nprintf "%s " "${0##*/}" "$@" >> "$CALLS"\n')
        (tree / tool).chmod(0o755)
    (tree / ".venv/torch-2.11/.installed").touch()
    os.utime(tree / ".venv/torch-2.11/.installed", (2**31, 2**31))
    calls = tmp_path / "calls"
    targets = ("install", "test", "demo", "test-asan", "test-tsan", "mutants", "bench")
    environment = {"PATH": f"{tree / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls)}
    status, text = _run("make", "-C", tree, *targets, **environment)
    assert status == 0, text
    called = calls.read_text()
    for tool in tools:
        assert f"{Path(tool).name} " in called, tool
    assert f"mutants.sh {tree}/build/torch-2.11 " in called


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_missing_tools_are_named_before_anything_is_downloaded(tmp_path):
    def check(python=sys.executable, **environment):
        return _run("bash", "scripts/check_tools.sh", python, **environment)

    (tmp_path / "old").write_text('#!/bin/sh\n[ "$1" = --version ] && echo "g++ 9.4.0" && exit 0\nexit 1\n')
    (tmp_path / "old").chmod(0o755)
    status, text = check(CXX=str(tmp_path / "old"))
    assert (
        status != 0
        and f"torchmargin needs a C++20 compiler: g++ 11 or clang 14, or newer; {tmp_path}/old is g++ 9.4.0" in text
    )
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "sed", "sort", "head", "df", "awk"):
        (tools / name).symlink_to(shutil.which(name))
    status, text = check(PATH=str(tools))
    assert status != 0 and "torchmargin needs CMake 3.18 or newer" in text and "Debian: apt install g++" in text
    status, text = check(python="/none/python")
    assert status != 0 and "there is no /none/python" in text
