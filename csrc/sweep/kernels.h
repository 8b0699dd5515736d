// The seam between the class sweep and a device: six kernels, as a table of
// functions over raw pointers. class_sweep.cpp says when each runs; the device says
// how. Matrices here are row-major in acc (float64 for float64 inputs, else float32)
// unless they are described by RawMatrix.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <functional>

#include "plan/device_traits.h"
#include "torchmargin/margin.h"

namespace torchmargin {

// A caller's matrix: any floating dtype, any strides (in elements).
struct RawMatrix {
  const void* data;
  c10::ScalarType dtype;
  int64_t row_stride;
  int64_t column_stride;
};

// All that a kernel needs to know about one row and its target.
struct TargetContext {
  RawMatrix input; // [B, D]
  RawMatrix weight; // [C, D]
  const int64_t* target; // [B]; outside [0, classes): absent from this weight
  int64_t features; // D
  int64_t classes; // C
  MarginParameters margin;
  bool normalize_input;
  bool normalize_weight;
  RawMatrix bias; // [C, 1]; data == nullptr: none
  RawMatrix sample_m2, sample_m3, sample_margin_weight; // [B, 1] or data == nullptr
};

// Rows as the products read them, their inverse norms and their sum; whatever is not nullptr is written.
struct LoadRowsArgs {
  RawMatrix rows; // [row_count, D]; on the CPU in acc and contiguous but for the row stride
  int64_t row_count;
  int64_t features; // D
  bool normalize; // false: every inverse norm counts as 1
  // [row_count, D] of out_dtype: rows times their inverse norms (if `unit`) times row_factor times operand_scale.
  void* out; // may be the memory of `rows`; nullptr: not wanted
  c10::ScalarType out_dtype; // acc; on a GPU also float16 or bfloat16
  int64_t out_row_stride;
  bool unit;
  const double* row_factor; // [row_count] or nullptr: 1; a row with 0 counts as 0, whatever it holds
  const double* operand_scale; // [1] or nullptr: 1; a factor of a row that is below 2^-90 with it is 0
  void* inverse_norms; // [row_count] acc, or nullptr
  double* sum; // [D] += rows times inverse norms times row_factor, or nullptr; with `normalize` it needs inverse_norms
};

// Raw products A . w, and what makes logits of them: z = scale * row_factor * class_factor * product + bias.
struct LogitsTile {
  const void* logits; // [row_count, class_count] acc
  int64_t row_stride;
  int64_t row_count;
  int64_t class_count;
  int64_t first_class; // of all C
  const int64_t* target; // [row_count]
  double scale;
  const void* row_factors; // [row_count] acc, or nullptr: 1
  const void* class_factors; // [class_count] acc, or nullptr: 1
  const void* bias; // [class_count] acc, or nullptr: 0
};

// Adds a tile to each row's running (shift, sum) and maximum; the target's own
// column is left out.
struct AccumulateChunkArgs {
  LogitsTile tile;
  bool bounded; // no sum of exp(z) can overflow: the shift is 0 and no maximum is subtracted
  double* shift; // [row_count]
  double* sum; // [row_count]
  double* maximum; // [row_count]
};

// out_scale Q, Q = exp(z - other_lse), of a tile; 0 at the target, 0 below exp(-50) (which keeps
// denormal numbers out of the products).
struct SoftmaxChunkArgs {
  LogitsTile tile; // read only; may be the same memory as `out` if that is acc
  const double* other_lse; // [row_count]
  const double* upstream; // [row_count] gradient of other_lse; a row with 0 is written as 0
  bool times_class_factors; // out = Q / |w_j|: the products then need no normalised weights
  void* out; // [row_count, class_count]
  int64_t out_row_stride;
  c10::ScalarType out_dtype; // acc; on a GPU also float16 or bfloat16
  double out_scale; // a power of two
};

// norms, angle, psi of every row and its target, in float64; ends the forward pass.
struct TargetPassArgs {
  TargetContext context;
  int64_t rows;
  int64_t lanes; // partial results of each row, combined in order
  const double* shift; // [lanes, B] each: what accumulate_chunk left
  const double* sum;
  const double* maximum;
  const double* weight_sum; // [D] sum of the (normalised) weights, or nullptr: logit_sum = 0
  const double* bias_sum; // [1] sum of the bias, or nullptr: 0
  double* other_lse; // [B] each
  double* target_logit;
  double* logit_sum;
  void* target_angle; // [B] acc each
  void* max_other_logit;
};

// Upstream gradients of one row of the core op, in float64.
struct Upstream {
  const double* other_lse; // g_o [B]
  const double* target_logit; // g_t + g_Z where the target is present: T [B]
  const double* logit_sum; // g_Z [B], or nullptr: all 0
};

// Turns the products into rows [first_class, first_class + class_count) of grad_weight and
// grad_bias.
struct FinishClassesArgs {
  TargetContext context;
  Upstream upstream;
  int64_t first_class;
  int64_t class_count;
  // [class_count, D] acc: products_scale sum_i Q_ij / |w_j| scale g_o,i A_i; nullptr: not wanted
  const void* products;
  int64_t products_row_stride;
  bool products_lack_norms; // the factor 1 / |w_j| is not in them yet
  // [class_count, D] contiguous. On the CPU acc, and it may be the products' memory; on a GPU the weight's dtype.
  void* grad_weight;
  RawMatrix weight; // [class_count, D] as given; on the CPU in acc
  const void* inverse_norms; // [class_count] acc, or nullptr
  void* bias_products; // [class_count] acc: products_scale sum_i Q_ij g_o,i; becomes grad_bias; or nullptr
  const double* products_scale; // [1] power of two to undo
  const double* input_sum; // R [D] = sum_i g_Z,i A_i, or nullptr
  const double* logit_sum_total; // [1] sum_i g_Z,i, or nullptr
  const int64_t* sorted_target; // [B] targets in rising order
  const int64_t* sorted_row; // [B] their rows
  int64_t rows; // B
};

// Turns V into grad_input, and gives the gradients of sample_m2 and sample_m3.
struct FinishRowsArgs {
  TargetContext context;
  Upstream upstream;
  int64_t rows;
  const double* weight_sum; // S [D], or nullptr when upstream.logit_sum is
  void* products; // [B, D] acc: products_scale sum_j Q_ij B_j, becomes grad_input; nullptr: not wanted
  const double* products_scale; // [1] power of two to undo
  double* grad_m2; // [B], or nullptr
  double* grad_m3; // [B], or nullptr
};

struct SweepKernels {
  DeviceTraits traits;
  void (*load_rows)(const LoadRowsArgs&, c10::ScalarType acc);
  void (*accumulate_chunk)(const AccumulateChunkArgs&, c10::ScalarType acc);
  void (*softmax_chunk)(const SoftmaxChunkArgs&, c10::ScalarType acc);
  void (*target_pass)(const TargetPassArgs&, c10::ScalarType acc);
  void (*finish_classes)(const FinishClassesArgs&, c10::ScalarType acc);
  void (*finish_rows)(const FinishRowsArgs&, c10::ScalarType acc);
  // Runs body(0) ... body(lanes - 1), side by side where the device can.
  void (*run_lanes)(int64_t lanes, const std::function<void(int64_t)>& body);
  // Is told of a large fresh buffer before it is first written; may do nothing.
  void (*prepare_buffer)(void* data, int64_t bytes);
};

} // namespace torchmargin
