/// @file
/// The version of torchmargin. This file is its only source: CMake, setup.py
/// and the Python package read it from here.
#pragma once

#define TORCHMARGIN_VERSION_MAJOR 0
#define TORCHMARGIN_VERSION_MINOR 2
#define TORCHMARGIN_VERSION_PATCH 0
#define TORCHMARGIN_VERSION "0.2.0"
