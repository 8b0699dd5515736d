"""Where C++ programs find the package."""

from pathlib import Path

__all__ = ["cmake_prefix_path"]

cmake_prefix_path: str = str(Path(__file__).resolve().parent / "share" / "cmake")
"""For ``cmake -DCMAKE_PREFIX_PATH=...``: ``find_package(TorchMargin CONFIG REQUIRED)`` then finds this package, and
LibTorch in the torch beside it."""
