"""Builds libtorchmargin.so and torchmargin._C with CMake; everything else is in pyproject.toml.

torch is found by path, not by import, so that pip's build isolation never downloads a second
one. Environment: TORCHMARGIN_BUILD_DIR (a build folder that is kept and used again),
TORCHMARGIN_CMAKE_ARGS (more arguments for CMake), MAX_JOBS.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH = Path(sysconfig.get_paths()["platlib"]) / "torch"


def version() -> str:
    header = (ROOT / "csrc/include/torchmargin/version.h").read_text()
    return re.search(r'TORCHMARGIN_VERSION "([^"]+)"', header).group(1)


def requirements() -> list[str]:
    """With the torch minor that the binaries are for: no other one can load them."""
    version_file = TORCH / "version.py"
    torch = "torch"  # an sdist can be made without it
    if version_file.exists():
        major, minor = re.search(r"__version__ = '(\d+)\.(\d+)", version_file.read_text()).groups()
        torch = f"torch=={major}.{minor}.*"
    return [torch, "typing_extensions>=4.10"]


class CMakeBuild(build_ext):
    """One CMake build stands for all binaries: the library, _C, headers."""

    def run(self):
        if not TORCH.exists():
            raise SystemExit(
                f"torchmargin: torch is not installed in {TORCH.parent}; install it first, then torchmargin"
            )
        build = Path(os.environ.get("TORCHMARGIN_BUILD_DIR", Path(self.build_temp) / "cmake")).resolve()
        prefix = Path(self.build_lib).resolve() / "torchmargin"
        for stale in ("lib", "include"):  # of an earlier build in the same folder
            shutil.rmtree(prefix / stale, ignore_errors=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        subprocess.check_call(
            ["cmake", "-S", str(ROOT), "-B", str(build), *generator]
            + [f"-DTORCHMARGIN_TORCH_DIR={TORCH}", f"-DPython_EXECUTABLE={sys.executable}"]
            + ["-DTORCHMARGIN_BUILD_PYTHON=ON", f"-DCMAKE_INSTALL_PREFIX={prefix}"]
            + shlex.split(os.environ.get("TORCHMARGIN_CMAKE_ARGS", ""))
        )
        subprocess.check_call(["cmake", "--build", str(build), "-j", jobs])
        subprocess.check_call(["cmake", "--install", str(build)])
        if self.editable_mode:
            self.copy_extensions_to_source()

    # setuptools asks these three for an editable install and for the wheel's record.
    def copy_extensions_to_source(self):
        source = Path(self.build_lib).resolve() / "torchmargin"
        shutil.copytree(source, ROOT / "python/torchmargin", dirs_exist_ok=True)

    def get_outputs(self):
        return [str(path) for path in (Path(self.build_lib) / "torchmargin").rglob("*") if path.is_file()]

    def get_output_mapping(self):
        return {}


setup(
    version=version(),
    install_requires=requirements(),
    ext_modules=[Extension("torchmargin._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
