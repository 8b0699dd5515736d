"""Loads libtorchmargin.so and torchmargin._C, or says in one sentence why it cannot.

TORCHMARGIN_LIBRARY names another build of the library to load instead of the installed one.
"""

import ctypes
import json
import os
from pathlib import Path

import torch

_INSTALLED = Path(__file__).resolve().parent / "lib" / "libtorchmargin.so"


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _check_torch(library: Path) -> None:
    """Torch versions are not ABI compatible: compare before loading."""
    note = library.with_suffix(".json")
    if not note.exists():
        return
    built_for = json.loads(note.read_text())["torch"]
    if _minor(built_for) != _minor(torch.__version__):
        raise ImportError(
            f"torchmargin was built for torch {built_for}, but torch {torch.__version__} is installed: "
            f"install a torchmargin built for torch {_minor(torch.__version__)}, or torch {_minor(built_for)}."
        )


def _load():
    library = Path(os.environ.get("TORCHMARGIN_LIBRARY") or _INSTALLED)
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
    from torchmargin import _C

    return _C


_C = _load()
