"""Where C++ programs find the package."""

from pathlib import Path

import torch

__all__ = ["cmake_prefix_path"]

_PACKAGE = Path(__file__).resolve().parent
_TORCH = Path(torch.__file__).resolve().parent

cmake_prefix_path: str = str(_PACKAGE / "share" / "cmake")
"""For ``cmake -DCMAKE_PREFIX_PATH=...``: ``find_package(TorchMargin CONFIG REQUIRED)`` then finds this package, and
LibTorch in the torch beside it. An editable install is not beside torch: torch's own path follows after a semicolon."""
if _TORCH.parent != _PACKAGE.parent:
    cmake_prefix_path += ";" + torch.utils.cmake_prefix_path
