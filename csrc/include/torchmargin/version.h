/// @file
/// The version of torchmargin. This file is its only source: CMake, setup.py
/// and the Python package read it from here.
#pragma once

#include "torchmargin/export.h"

#define TORCHMARGIN_VERSION_MAJOR 0
#define TORCHMARGIN_VERSION_MINOR 2
#define TORCHMARGIN_VERSION_PATCH 0
#define TORCHMARGIN_VERSION "0.2.0"

namespace torchmargin {

/// The version of the library that runs, and of the torch that it was built for.
TORCHMARGIN_API const char* version();
TORCHMARGIN_API const char* built_for_torch();

} // namespace torchmargin
