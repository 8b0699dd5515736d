// log sum exp as a small value: a shift and a sum of exponentials relative to it.
// The same combine merges the blocks of a chunk, the chunks of a sweep and, on a
// GPU, the lanes of a warp. Partial sums are kept in float64: one running float32
// sum over ten million classes is wrong by percents.
#pragma once

#include <cmath>
#include <limits>

#include "math/host_device.h"

namespace torchmargin {

struct OnlineLse {
  double shift = -std::numeric_limits<double>::infinity();
  double sum = 0.0; // sum of exp(z - shift)

  TORCHMARGIN_HOST_DEVICE void combine(const OnlineLse& other) {
    // A shift of -inf is an empty sum; exp(-inf - -inf) would make it NaN.
    if (other.shift > shift) {
      sum = other.sum + (sum != 0.0 ? sum * std::exp(shift - other.shift) : 0.0);
      shift = other.shift;
    } else if (other.sum != 0.0) { // NaN passes
      sum += other.shift == shift ? other.sum : other.sum * std::exp(other.shift - shift);
    }
  }

  // The log-sum-exp; -inf for an empty sum.
  TORCHMARGIN_HOST_DEVICE double project() const {
    return shift == -std::numeric_limits<double>::infinity() && sum == 0.0 ? shift : shift + std::log(sum);
  }
};

} // namespace torchmargin
