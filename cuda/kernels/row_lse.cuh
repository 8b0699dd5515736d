// log sum exp and maximum of one row of logits by a block, one class left out: one pass over the row.
#pragma once

#include "kernels/device.cuh"
#include "math/online_lse.h"

namespace torchmargin::device {

struct RowLse {
  OnlineLse lse;
  double maximum;
};

// A sum relative to a shift that is larger by -gap. An empty or infinite one stays what it is: inf * 0 would be NaN.
template <typename T>
__device__ double rescaled(double sum, T gap) {
  return sum == 0.0 || isinf(sum) ? sum : sum * static_cast<double>(exp(gap));
}

// What the warps of a block tell each other.
constexpr int kRowLseScratch = 3 * kWarps;

// `logits(j)` gives kCount logits from j on, anything past `count`; j = skip is left out. bounded: the shift is 0.
// Only thread 0 returns the result. At most kCount terms are summed in T before float64 takes over.
template <typename T, int kCount, typename Logits>
__device__ RowLse row_lse(const Logits& logits, int64_t count, int64_t skip, bool bounded, double* scratch) {
  const T nothing = static_cast<T>(-INFINITY);
  T shift = T(0);
  T largest = nothing;
  double sum = 0.0;
  for (int64_t j = static_cast<int64_t>(threadIdx.x) * kCount; j < count; j += kThreads * kCount) {
    Elements<T, kCount> z = logits(j);
    T of_group = nothing;
    TORCHMARGIN_UNROLL
    for (int e = 0; e < kCount; ++e) {
      z.values[e] = j + e == skip || j + e >= count ? nothing : z.values[e];
      of_group = z.values[e] > of_group ? z.values[e] : of_group;
    }
    largest = of_group > largest ? of_group : largest;
    // NB: an infinite shift would make inf - inf of the largest term.
    if (!bounded && isfinite(of_group) && (of_group > shift || sum == 0.0)) {
      sum = rescaled(sum, shift - of_group);
      shift = of_group;
    }
    T partial = T(0);
    TORCHMARGIN_UNROLL
    for (int e = 0; e < kCount; ++e) {
      partial += exp(z.values[e] - shift);
    }
    sum += static_cast<double>(partial);
  }
  if (!bounded) { // to the largest shift of the warp
    const T common = warp_max(sum != 0.0 ? shift : nothing);
    sum = rescaled(sum, shift - common);
    shift = common;
  }
  sum = warp_sum(sum);
  largest = warp_max(largest);
  if (threadIdx.x % kWarp == 0) {
    const int warp = static_cast<int>(threadIdx.x / kWarp);
    scratch[warp] = static_cast<double>(shift);
    scratch[kWarps + warp] = sum;
    scratch[2 * kWarps + warp] = static_cast<double>(largest);
  }
  __syncthreads();
  RowLse result{OnlineLse{}, -INFINITY};
  for (int warp = 0; threadIdx.x == 0 && warp < kWarps; ++warp) {
    const double of_warp = scratch[2 * kWarps + warp];
    result.lse.combine({scratch[warp], scratch[kWarps + warp]});
    result.maximum = of_warp > result.maximum ? of_warp : result.maximum;
  }
  return result;
}

} // namespace torchmargin::device
