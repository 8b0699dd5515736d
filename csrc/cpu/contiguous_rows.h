// Rows that the row kernels can read where they are: contiguous, in acc.
#pragma once

#include <type_traits>

#include "sweep/kernels.h"

namespace torchmargin::cpu {

template <typename T>
bool has_contiguous_rows(const RawMatrix& matrix) {
  return matrix.column_stride == 1 &&
      matrix.dtype == (std::is_same_v<T, double> ? c10::ScalarType::Double : c10::ScalarType::Float);
}

template <typename T>
bool has_contiguous_rows(const TargetContext& context) {
  return has_contiguous_rows<T>(context.input) && has_contiguous_rows<T>(context.weight);
}

template <typename T>
const T* contiguous_row(const RawMatrix& matrix, int64_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.row_stride;
}

// S - B_y of a row, whose target is `target`; b is the factor of its weights. NB: 0 where there is no other class, for
// here the product is rounded as S was, which the row kernels do not promise.
template <typename T>
void subtract_own_weight(
    const double* weight_sum,
    const RawMatrix& weight,
    int64_t target,
    double b,
    int64_t features,
    double* to) {
  const T* const w = contiguous_row<T>(weight, target);
  for (int64_t k = 0; k < features; ++k) {
    to[k] = weight_sum[k] - b * static_cast<double>(w[k]);
  }
}

} // namespace torchmargin::cpu
