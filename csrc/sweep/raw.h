// Tensors as the kernels' raw descriptions.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "ops/problem.h"
#include "sweep/kernels.h"

namespace torchmargin {

// The elements of a tensor; nullptr where there are none.
template <typename T = void>
T* pointer(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.defined() && tensor.numel() > 0 ? tensor.data_ptr() : nullptr);
}

// [B, 5] float64, contiguous.
inline RowState* row_state(const at::Tensor& state) {
  static_assert(sizeof(RowState) == kRowStateSize * sizeof(double));
  return reinterpret_cast<RowState*>(pointer<double>(state));
}

// Of [B, 6] float64, from a row on; nullptr where there is none.
inline const HardRow* hard_row(const at::Tensor& hard, int64_t row) {
  const double* const begin = pointer<double>(hard);
  return begin == nullptr ? nullptr : reinterpret_cast<const HardRow*>(begin) + row;
}

inline RawMatrix raw_matrix(const at::Tensor& matrix) {
  return {matrix.data_ptr(), matrix.scalar_type(), matrix.stride(0), matrix.stride(1)};
}

// A vector, or a 0-dim tensor that stands for every row.
inline RawMatrix raw_vector(const std::optional<at::Tensor>& vector) {
  if (!vector.has_value()) {
    return {};
  }
  return {vector->data_ptr(), vector->scalar_type(), vector->dim() == 0 ? 0 : vector->stride(0), 0};
}

} // namespace torchmargin
