"""Loads libtorchmargin.so and torchmargin._C, or says in one sentence why it cannot.

TORCHMARGIN_LIBRARY names another build of the library to load instead of the installed one.
"""

import ctypes
import hashlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
import torch.compiler.config

__all__ = ["BINARIES", "_C"]


def _binaries() -> Path:
    """The folder of _C, lib, include and share: the package, or what an editable install keeps in site-packages."""
    package = Path(__file__).resolve().parent
    if not (package / "lib").exists():
        editable = importlib.util.find_spec("_torchmargin_editable")
        if editable is not None and editable.submodule_search_locations:
            return Path(next(iter(editable.submodule_search_locations)))
    return package


BINARIES = _binaries()


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _check_torch(library: Path) -> None:
    """Torch versions are not ABI compatible: compare before loading."""
    note = library.with_suffix(".json")
    if not note.exists():
        return
    facts = json.loads(note.read_text())
    built_for = facts["torch"]
    if _minor(built_for) != _minor(torch.__version__):
        raise ImportError(
            f"torchmargin was built for torch {built_for}, but torch {torch.__version__} is installed: "
            f"install a torchmargin built for torch {_minor(torch.__version__)}, or torch {_minor(built_for)}."
        )
    kernels, runtime = facts.get("cuda"), torch.version.cuda
    if kernels and (runtime is None or runtime.split(".")[0] != kernels.split(".")[0]):
        raise ImportError(
            f"torchmargin was built with kernels for CUDA {kernels}, but torch {torch.__version__} is a build for "
            f"{'CUDA ' + runtime if runtime else 'the CPU only'}: build torchmargin beside this torch (pip install "
            "--no-cache-dir --force-reinstall --no-deps), or install the torch that it was built for."
        )


def _name_in_caches(library: Path) -> None:
    """What torch.compile keeps on disk was traced with one build's ops; another build must not be given it.

    torch tells caches apart by torch.compiler.config.cache_key_tag, but not by the libraries of custom ops.
    """
    tag = "torchmargin-" + hashlib.sha256(library.read_bytes()).hexdigest()[:16]
    config = torch.compiler.config
    if tag not in config.cache_key_tag:
        config.cache_key_tag = "-".join(filter(None, [config.cache_key_tag, tag]))


def _load() -> None:
    library = Path(os.environ.get("TORCHMARGIN_LIBRARY") or BINARIES / "lib" / "libtorchmargin.so")
    if not library.exists():
        raise ImportError(
            f"torchmargin: there is no library at {library}; install the package with pip, or build it with CMake."
        )
    _check_torch(library)
    try:
        torch.ops.load_library(str(library))
        # _C asks for "libtorchmargin.so" by name and gets the one that is loaded already.
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ImportError(f"torchmargin: cannot load {library} with torch {torch.__version__}: {error}") from error
    _name_in_caches(library)
    package = sys.modules["torchmargin"].__path__
    if str(BINARIES) not in package:
        package.append(str(BINARIES))


_load()
import torchmargin._C as _C  # noqa: E402
