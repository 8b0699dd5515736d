"""Where C++ programs find the package."""

from pathlib import Path

import torch

from torchmargin._extension import BINARIES

__all__ = ["cmake_prefix_path"]

_TORCH = Path(torch.__file__).resolve().parent

cmake_prefix_path: str = str(BINARIES / "share" / "cmake")
"""For ``cmake -DCMAKE_PREFIX_PATH=...``: ``find_package(TorchMargin CONFIG REQUIRED)`` then finds this package, and
LibTorch in the torch beside it. Where torch is elsewhere, its own path follows after a semicolon."""
if _TORCH.parent != BINARIES.parent:
    cmake_prefix_path += ";" + torch.utils.cmake_prefix_path
