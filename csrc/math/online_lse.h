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
    if (other.shift > shift) {
      sum = other.sum + rescaled(sum, shift, other.shift);
      shift = other.shift;
    } else {
      sum += rescaled(other.sum, other.shift, shift);
    }
  }

  // A sum relative to a larger shift. An empty or infinite one stays what it is: inf * exp(-1000) would be NaN.
  // NaN passes.
  TORCHMARGIN_HOST_DEVICE static double rescaled(double sum, double from, double to) {
    return sum == 0.0 || std::isinf(sum) || from == to ? sum : sum * std::exp(from - to);
  }

  // The log-sum-exp; -inf for an empty sum.
  TORCHMARGIN_HOST_DEVICE double project() const {
    return shift == -std::numeric_limits<double>::infinity() && sum == 0.0 ? shift : shift + std::log(sum);
  }
};

} // namespace torchmargin
