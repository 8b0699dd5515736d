"""Builds libtorchmargin.so and torchmargin._C with CMake; everything else is in pyproject.toml.

torch is found by path, not by import, so that pip's build isolation never downloads a second
one. Environment: TORCHMARGIN_BUILD_DIR (a build folder that is kept and used again),
TORCHMARGIN_CUDA (ON, OFF, AUTO), TORCHMARGIN_CMAKE_ARGS (more arguments for CMake), MAX_JOBS,
TORCHMARGIN_LOCAL_VERSION (a wheel from a source distribution gets the local version too).
"""

import atexit
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MAKES_SDIST = "sdist" in sys.argv  # which is for every torch
# pip takes only a wheel of the source distribution's own version.
IN_SDIST = (ROOT / "PKG-INFO").exists() and "TORCHMARGIN_LOCAL_VERSION" not in os.environ


def torch_places() -> list[Path]:
    """Where this Python's torch may be. A build in isolation sees only some of them by importing."""
    places = [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    spec = importlib.util.find_spec("torch")
    places += map(Path, (spec and spec.submodule_search_locations) or ())
    settings = Path(sys.prefix, "pyvenv.cfg")
    is_venv = settings.exists()
    if not is_venv or re.search(r"(?mi)^include-system-site-packages\s*=\s*true", settings.read_text()):
        places.append(Path(site.getusersitepackages()) / "torch")
    if is_venv and len(places) > 2:
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        places += [Path(sysconfig.get_path(kind, vars=base)) / "torch" for kind in ("platlib", "purelib")]
    return list(dict.fromkeys(places))


@functools.cache
def torch_folder() -> Path | None:
    return next((place for place in torch_places() if (place / "version.py").exists()), None)


def torch_version() -> tuple[str, str, str]:
    """The torch that is built for: major, minor, and "cu130" or ""."""
    text = (torch_folder() / "version.py").read_text()
    major, minor = re.search(r"__version__ = '(\d+)\.(\d+)", text).groups()
    cuda = re.search(r"^cuda(?:: [^=]*)? = '([\d.]+)'", text, re.MULTILINE)
    return major, minor, "cu" + cuda.group(1).replace(".", "") if cuda else ""


def cmake_arguments() -> list[str]:
    """What the environment asks for."""
    chosen = os.environ.get("TORCHMARGIN_CUDA")
    return shlex.split(os.environ.get("TORCHMARGIN_CMAKE_ARGS", "")) + (
        [f"-DTORCHMARGIN_CUDA={chosen}"] if chosen else []
    )


@functools.cache
def cuda_compiler() -> str:
    """The nvcc that CMake will use; empty for a CPU-only build."""
    if not shutil.which("cmake"):
        raise SystemExit(
            "torchmargin: there is no cmake on PATH: install CMake 3.18 or newer (Debian: apt install cmake)"
        )
    arguments = iter(cmake_arguments())
    definitions = [a if a != "-D" else a + next(arguments, "") for a in arguments if a.startswith("-D")]
    rule = ROOT / "cmake/ChooseCudaCompiler.cmake"
    ran = subprocess.run(
        ["cmake", *definitions, f"-DTORCHMARGIN_TORCH_DIR={torch_folder()}", "-P", str(rule)],
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return re.search(r"CUDA compiler: (.*)", ran.stdout).group(1)


def version() -> str:
    """The header's, and of wheels what the binaries are for: 0.2.0+pt211cu130."""
    header = (ROOT / "csrc/include/torchmargin/version.h").read_text()
    public = re.search(r'TORCHMARGIN_VERSION "([^"]+)"', header).group(1)
    if torch_folder() is None or MAKES_SDIST or IN_SDIST:
        return public
    return f"{public}+{build_tag()}"


def build_tag() -> str:
    major, minor, cuda = torch_version()
    return f"pt{major}{minor}{cuda if cuda_compiler() else 'cpu'}"


def requirements() -> list[str]:
    """With the torch minor that the binaries are for: no other one can load them."""
    needs = "torch"
    if torch_folder() is not None and not MAKES_SDIST:
        major, minor, _ = torch_version()
        needs = f"torch=={major}.{minor}.*"
    return [needs, "typing_extensions>=4.10"]


def description() -> str:
    """The README, its links into the tree as plain words: elsewhere they would lead nowhere."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", text)


@functools.cache
def scratch() -> str:
    """A folder that is gone when this process ends."""
    folder = tempfile.mkdtemp(prefix="torchmargin-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def folders() -> dict:
    """Where setuptools writes: metadata never into the tree's python/, nothing into a tree that is read-only."""
    options = {} if MAKES_SDIST else {"egg_info": {"egg_base": scratch()}}
    if not os.access(ROOT, os.W_OK):
        options["build"] = {"build_base": scratch()}
    return options


def generator() -> str:
    arguments = iter(cmake_arguments())
    for argument in arguments:
        if argument.startswith("-G"):
            return argument[2:] or next(arguments, "")
    return os.environ.get("CMAKE_GENERATOR") or ("Ninja" if shutil.which("ninja") else "Unix Makefiles")


def drop_foreign_cache(build: Path, wanted: dict[str, str]) -> None:
    """CMake refuses a folder that was configured for another tree or generator, and would mix two torches."""
    cache = build / "CMakeCache.txt"
    if not cache.exists():
        return
    known = dict(re.findall(r"^([\w.-]+):\w+=(.*)$", cache.read_text(), re.MULTILINE))
    for name, value in wanted.items():
        if value and known.get(name) and os.path.realpath(known[name]) != os.path.realpath(value):
            print(f"torchmargin: {build} was configured with {name} {known[name]}, not {value}: it begins anew")
            cache.unlink()
            shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
            return


def compile_library() -> Path:
    """Configures and compiles; the folder it was done in."""
    torch = torch_folder()
    if torch is None:
        looked = "\n  ".join(str(place) for place in torch_places())
        raise SystemExit(
            f"torchmargin: there is no torch for {sys.executable}, looked for in\n  {looked}\n"
            "Install torch first. A build in an environment of its own (uv, python -m build) does not see it: build "
            "beside it, with\n  pip install 'setuptools>=77' pybind11 ninja\n  pip install --no-build-isolation .    "
            "(uv pip install --no-build-isolation . / python -m build --wheel --no-isolation)"
        )
    if importlib.util.find_spec("pybind11") is None:
        raise SystemExit(
            "torchmargin: without build isolation its build needs pip install 'setuptools>=77' pybind11 ninja"
        )
    import pybind11

    default = ROOT / "build" if os.access(ROOT, os.W_OK) else Path(scratch())
    default = default / f"{sys.implementation.cache_tag}-{build_tag()}"
    build = Path(os.environ.get("TORCHMARGIN_BUILD_DIR") or default).resolve()
    nvcc = cuda_compiler()
    # The tools' paths each time: those of an isolated build are gone when the next one comes.
    tools = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    tools += [f"-DTORCHMARGIN_CUDA={'ON' if nvcc else 'OFF'}"] + ([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else [])
    if generator().startswith("Ninja") and shutil.which("ninja"):
        tools.append(f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}")
    same = {"CMAKE_HOME_DIRECTORY": ROOT, "CMAKE_CACHEFILE_DIR": build, "CMAKE_GENERATOR": generator()}
    same |= {"TORCHMARGIN_TORCH_DIR": torch, "CMAKE_CUDA_COMPILER": nvcc}
    drop_foreign_cache(build, {name: str(value) for name, value in same.items()})
    subprocess.check_call(
        ["cmake", "-S", str(ROOT), "-B", str(build), "-G", generator(), "-DTORCHMARGIN_BUILD_PYTHON=ON"]
        + [*cmake_arguments(), f"-DTORCHMARGIN_TORCH_DIR={torch}", *tools]
    )
    has_cuda = bool(json.loads((build / "libtorchmargin.json").read_text())["cuda"])
    if has_cuda != bool(nvcc):
        raise SystemExit(
            f"torchmargin: CMake's build {'has' if has_cuda else 'has no'} CUDA kernels, unlike {version()}"
        )
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    subprocess.check_call(["cmake", "--build", str(build), "-j", jobs, "--target", "torchmargin", "_C"])
    return build


class Compile(Command):
    """`python setup.py compile`: what an installation would compile, with the compiler's progress on the screen."""

    user_options = []

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        compile_library()


class Build(build):
    def run(self):
        # What an earlier build left there would go into the wheel.
        shutil.rmtree(Path(self.build_lib) / "torchmargin", ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """One CMake build stands for all binaries: the library, _C, headers.

    An editable install has them in a folder of its own in site-packages, which pip removes again:
    nothing is written into the tree, and environments do not share binaries.
    """

    def run(self):
        build = compile_library()
        prefix = Path(self.build_lib).resolve() / "torchmargin"
        if self.editable_mode:
            for name in ("lib", "include", "share", "_C.*.so"):  # which version 0.1.0 left there
                for left in (ROOT / "python/torchmargin").glob(name):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            prefix = Path(self.get_finalized_command("install").install_platlib).resolve() / "_torchmargin_editable"
        subprocess.check_call(["cmake", "--install", str(build), "--prefix", str(prefix)])
        print((build / "torchmargin-summary.txt").read_text(), end="")

    # setuptools asks these three for an editable install and for the wheel's record.
    def copy_extensions_to_source(self):
        pass

    def get_outputs(self):
        return [str(path) for path in (Path(self.build_lib) / "torchmargin").rglob("*") if path.is_file()]

    def get_output_mapping(self):
        return {}


if __name__ == "__main__":
    setup(
        version=version(),
        install_requires=requirements(),
        long_description=description(),
        long_description_content_type="text/markdown",
        ext_modules=[Extension("torchmargin._C", sources=[])],
        cmdclass={"build": Build, "build_ext": CMakeBuild, "compile": Compile},
        options=folders(),
    )
