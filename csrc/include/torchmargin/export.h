/// @file
/// Marks what libtorchmargin.so exports; everything else in it is hidden.
#pragma once

#include <cstddef> // any header of the standard library: it sets _GLIBCXX_USE_CXX11_ABI

#if defined(_GLIBCXX_DEBUG) || (defined(_GLIBCXX_USE_CXX11_ABI) && _GLIBCXX_USE_CXX11_ABI == 0)
#error "_GLIBCXX_DEBUG and _GLIBCXX_USE_CXX11_ABI=0 give C++ objects another layout than in LibTorch and torchmargin"
#endif

#define TORCHMARGIN_API __attribute__((visibility("default")))
