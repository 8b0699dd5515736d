// log sum exp and maximum of one row of logits by a block, one class left out.
#pragma once

#include "kernels/device.cuh"
#include "math/online_lse.h"

namespace torchmargin::device {

constexpr int64_t kTerms = 1024; // that are summed in T before float64 takes over

struct RowLse {
  OnlineLse lse;
  double maximum;
};

// `logit(j)` for j in [0, count), without j = skip. bounded: the shift is 0. Every thread returns the result.
template <typename T, typename Logit>
__device__ RowLse row_lse(const Logit& logit, int64_t count, int64_t skip, bool bounded, const BlockTeam& team) {
  const double infinity = INFINITY;
  double largest = -infinity;
  for (int64_t j = team.rank; j < count; j += team.size) {
    if (j != skip) {
      const double z = static_cast<double>(logit(j));
      largest = z > largest ? z : largest;
    }
  }
  largest = team.max(largest);
  // NB: an infinite shift would make inf - inf of the largest term.
  const T shift = bounded || isinf(largest) ? T(0) : static_cast<T>(largest);
  double sum = 0.0;
  int64_t j = team.rank;
  while (j < count) {
    T partial = T(0);
    for (int64_t terms = 0; terms < kTerms && j < count; ++terms, j += team.size) {
      if (j != skip) {
        partial += exp(logit(j) - shift);
      }
    }
    sum += static_cast<double>(partial);
  }
  RowLse result;
  result.lse.shift = static_cast<double>(shift);
  result.lse.sum = team.sum(sum);
  result.maximum = largest;
  return result;
}

} // namespace torchmargin::device
