// The hot loops of the CPU sweep over one row of a chunk: plain functions over raw
// pointers, compiled once per instruction set and chosen at run time. No ATen.
#pragma once

#include <cstdint>

namespace torchmargin::cpu {

constexpr int64_t kBlock = 1024; // terms that are summed in T before float64 takes over

// log sum exp of at most kBlock logits: sum of exp(z - shift), and the largest z.
struct BlockSum {
  double shift;
  double sum;
  double maximum;
};

// The affine map from raw products to logits: z_j = scale * class_factor_j * product_j + bias_j.
// Pointers may be nullptr: 1 and 0.
template <typename T>
struct LogitMap {
  T scale;
  const T* class_factors;
  const T* bias;
};

template <typename T>
struct RowKernels {
  // sum x_k^2 in float64.
  double (*squared_norm)(const T* row, int64_t size);
  // row_k *= factor, rounded once.
  void (*scale_row)(T* row, int64_t size, double factor);
  // sum_k += factor * row_k.
  void (*add_row)(double* sum, const T* row, int64_t size, double factor);
  // `bounded`: the shift is 0, else the largest z. size <= kBlock.
  BlockSum (*sum_block)(const T* products, int64_t size, LogitMap<T> map, bool bounded);
  // out_j = exp(z_j - lse) (times class_factor_j), exactly 0 below exp(-50). The lse is not rounded to T: near the
  // largest logit z - lse is exact, and so is the factor that all of the row share.
  void (*softmax_row)(const T* products, T* out, int64_t size, LogitMap<T> map, double lse, bool times_class_factors);
  // out = unscale (row - (row . w) inverse_norm^2 w): takes the part along w away; with
  // inverse_norm 0 nothing. `out` may be `row`.
  void (*project_row)(const T* row, const T* w, T* out, int64_t size, T inverse_norm, T unscale);
};

// The kernels for the running CPU.
template <typename T>
const RowKernels<T>& row_kernels();

} // namespace torchmargin::cpu
