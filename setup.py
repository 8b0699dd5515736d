"""Builds libtorchmargin.so and torchmargin._C with CMake; everything else is in pyproject.toml.

torch is found by path, not by import, so that pip's build isolation never downloads a second
one. Environment: TORCHMARGIN_BUILD_DIR (a build folder that is kept and used again),
TORCHMARGIN_CMAKE_ARGS (more arguments for CMake), MAX_JOBS, TORCHMARGIN_LOCAL_VERSION (a wheel from a source
distribution gets the local version too).
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


def torch_version() -> tuple[str, str, str] | None:
    """The torch that is built for: major, minor, and "cu130" or "cpu"; None where an sdist is made without it."""
    version_file = TORCH / "version.py"
    if not version_file.exists():
        return None
    text = version_file.read_text()
    major, minor = re.search(r"__version__ = '(\d+)\.(\d+)", text).groups()
    cuda = re.search(r"^cuda(?:: [^=]*)? = '([\d.]+)'", text, re.MULTILINE)
    return major, minor, "cu" + cuda.group(1).replace(".", "") if cuda else "cpu"


MAKES_SDIST = "sdist" in sys.argv  # which is for every torch
# pip takes only a wheel of the source distribution's own version.
IN_SDIST = (ROOT / "PKG-INFO").exists() and "TORCHMARGIN_LOCAL_VERSION" not in os.environ


def version() -> str:
    """The header's, and of wheels what the binaries are for: 0.1.0+pt211cu130."""
    header = (ROOT / "csrc/include/torchmargin/version.h").read_text()
    public = re.search(r'TORCHMARGIN_VERSION "([^"]+)"', header).group(1)
    torch = torch_version()
    if torch is None or MAKES_SDIST or IN_SDIST:
        return public
    return f"{public}+pt{torch[0]}{torch[1]}{torch[2]}"


def requirements() -> list[str]:
    """With the torch minor that the binaries are for: no other one can load them."""
    torch = None if MAKES_SDIST else torch_version()
    return [f"torch=={torch[0]}.{torch[1]}.*" if torch else "torch", "typing_extensions>=4.10"]


class CMakeBuild(build_ext):
    """One CMake build stands for all binaries: the library, _C, headers."""

    def run(self):
        if not TORCH.exists():
            raise SystemExit(
                f"torchmargin: torch is not installed in {TORCH.parent}; install it first, then torchmargin"
            )
        build = Path(os.environ.get("TORCHMARGIN_BUILD_DIR", Path(self.build_temp) / "cmake")).resolve()
        prefix = Path(self.build_lib).resolve() / "torchmargin"
        for stale in ("lib", "include", "share"):  # of an earlier build in the same folder
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
