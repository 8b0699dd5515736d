// The portable form of a device's steps on a tile: ATen's products, with 16-bit operands accumulated and returned in
// float32, and a kernel before or after them.
#pragma once

#include <ATen/core/Tensor.h>

#include "sweep/device.h"

namespace torchmargin {

// out [M, N] = a [M, K] b [K, N], added to it if `accumulate`. a and b are of out's dtype, or of 16 bits for a float32
// `out`.
void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate = false);

extern const TileSteps kPortableSteps;

} // namespace torchmargin
