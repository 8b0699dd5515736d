// From a raw product to its logit, and what is too small to count. Read by host and device compilers, and once for each
// instruction set: everything has internal linkage, or the linker would merge it and an old CPU could meet AVX512 in
// it.
#pragma once

#include "math/host_device.h"

namespace torchmargin {

// A softmax weight below exp(kFlush) is exactly 0, and so is a row of an operand whose factor is below kSmallestFactor:
// such numbers only make products denormal, and those are ten to a hundred times slower on a CPU.
constexpr int kFlush = -50;
constexpr double kSmallestFactor = 0x1p-90;

// z = product * (class_factor * row_scale), where row_scale = scale * row_factor; a bias is added after it.
template <typename Number, typename Scale>
TORCHMARGIN_HOST_DEVICE static inline Number scaled_product(Number product, Number class_factor, Scale row_scale) {
  return product * (class_factor * row_scale);
}

} // namespace torchmargin
