/// @file
/// Marks what libtorchmargin.so exports; everything else in it is hidden.
#pragma once

#define TORCHMARGIN_API __attribute__((visibility("default")))
