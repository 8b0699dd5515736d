// From a raw product to its logit, how the logit of a hard negative changes, and what is too small to count. Read by
// host and device compilers, and once for each instruction set: everything has internal linkage, or the linker would
// merge it and an old CPU could meet AVX512 in it.
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

// With n(c) = a c^2 + b c + d in the place of c: z = scale c becomes scale n(c). scaled_d = scale d. NB: n(c) = c
// leaves z as it is, bit for bit.
template <typename Number, typename Coefficient>
TORCHMARGIN_HOST_DEVICE static inline Number
changed_logit(Number z, Number cosine, Coefficient a, Coefficient b, Coefficient scaled_d) {
  return z * b + (cosine * z * a + scaled_d);
}

// n'(c).
template <typename Number, typename Coefficient>
TORCHMARGIN_HOST_DEVICE static inline Number slope_of_change(Number cosine, Coefficient a, Coefficient b) {
  return cosine * (a + a) + b;
}

} // namespace torchmargin
