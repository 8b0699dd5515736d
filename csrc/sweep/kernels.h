// The kernels of a device, as a table of functions over raw pointers: what the sweep needs beside the steps on a tile
// (device.h), and what their portable form (tile_steps.cpp) is made of. Matrices here are row-major in acc (float64 for
// float64 inputs, else float32) unless they are described by RawMatrix.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <functional>

#include "torchmargin/margin.h"

namespace torchmargin {

// A caller's matrix: any floating dtype, any strides (in elements).
struct RawMatrix {
  const void* data = nullptr;
  c10::ScalarType dtype = c10::ScalarType::Float;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

// All that a kernel needs to know about the rows and their targets.
struct TargetContext {
  RawMatrix input; // [B, D]
  RawMatrix weight; // [C, D]
  const int64_t* target; // [B]; outside [0, classes): absent from this weight
  int64_t features; // D
  int64_t classes; // C
  MarginParameters margin;
  bool normalize_input;
  bool normalize_weight;
  RawMatrix bias = {}; // [C, 1]; data == nullptr: none
  RawMatrix sample_m2 = {}, sample_m3 = {}, sample_margin_weight = {}; // [B, 1] or data == nullptr
};

// The sums over D from which a row's angle, psi and slopes are rebuilt without reading its features again.
struct RowState {
  double x_squared; // |x|^2
  double w_squared; // |w_y|^2; this and the next two are 0 where the target is absent
  double delta_squared; // |x/|x| - w_y/|w_y||^2; 0 where x or w_y is zero
  double sigma_squared; // |x/|x| + w_y/|w_y||^2
};

// Rows as the products read them, their inverse norms and their sum; whatever is not nullptr is written.
struct LoadRowsArgs {
  RawMatrix rows; // [row_count, D]; on the CPU in acc and contiguous but for the row stride
  int64_t row_count;
  int64_t features; // D
  bool measured; // the rows' norms are taken; false: every inverse norm counts as 1
  // [row_count, D] of out_dtype: rows times row_factor times operand_scale, brought to unit length before if `to_unit`.
  void* out = nullptr; // may be the memory of `rows`; nullptr: not wanted
  c10::ScalarType out_dtype = c10::ScalarType::Undefined; // acc; on a GPU also float16 or bfloat16
  int64_t out_row_stride = 0;
  bool to_unit = false;
  const RowState* state = nullptr; // [row_count] the rows' own, where they are known: it holds their norms
  const double* row_factor = nullptr; // [row_count] or nullptr: 1; a row with 0 counts as 0, whatever it holds
  const double* operand_scale = nullptr; // [1] or nullptr: 1; a row factor below 2^-90 with it is 0
  void* inverse_norms = nullptr; // [row_count] acc, or nullptr
  // [D] += rows times inverse norms times row_factor, or nullptr. NB: if `measured`, it needs inverse_norms.
  double* sum = nullptr;
};

// Raw products A . w, and what makes logits of them: z = scale * row_factor * class_factor * product + bias.
struct ProductsTile {
  const void* products; // [row_count, class_count] acc
  int64_t row_stride;
  int64_t row_count;
  int64_t class_count;
  int64_t first_class; // of all C
  const int64_t* target; // [row_count]
  double scale;
  const void* row_factors = nullptr; // [row_count] acc, or nullptr: 1
  const void* class_factors = nullptr; // [class_count] acc, or nullptr: 1
  const void* bias = nullptr; // [class_count] acc, or nullptr: 0
};

// Of each row of a tile, over the classes so far.
struct RunningSums {
  double* shift; // [row_count] each
  double* sum; // of exp(z - shift)
  double* maximum;
};

// Adds a tile to each row's running sums; the target's own column is left out.
struct AccumulateChunkArgs {
  ProductsTile tile;
  bool bounded; // no sum of exp(z) can overflow: the shift is 0 and no maximum is subtracted
  bool first; // the sums hold nothing yet, and are not read
  RunningSums sums;
};

// out_scale Q, Q = exp(z - other_lse), of a tile; 0 at the target, 0 below exp(-50) (which keeps
// denormal numbers out of the products).
struct SoftmaxChunkArgs {
  ProductsTile tile; // read only; may be the same memory as `out` if that is acc
  const double* other_lse; // [row_count]
  const double* upstream; // [row_count] gradient of other_lse; a row with 0 is written as 0
  bool times_class_factors; // out = Q / |w_j|: the products then need no normalised weights
  void* out; // [row_count, class_count]
  int64_t out_row_stride;
  c10::ScalarType out_dtype; // acc; on a GPU also float16 or bfloat16
  double out_scale; // a power of two
};

// The target of every row, in float64, before the sweep: its state, and what the state says.
struct TargetRowsArgs {
  TargetContext context;
  int64_t rows;
  bool measured; // the state is given, and only read
  RowState* state; // [B]
  double* target_logit; // [B]
  void* target_angle; // [B] acc, or nullptr
};

// The lanes' sums of every row, combined in order after the sweep.
struct CombineRowsArgs {
  TargetContext context;
  int64_t rows;
  const RowState* state; // [B]
  const double* target_logit; // [B]
  int64_t lanes;
  RunningSums sums; // [lanes, B] each
  const double* weight_sum; // [D] sum of the (normalised) weights, or nullptr: logit_sum = 0
  const double* bias_sum; // [1] sum of the bias, or nullptr: 0
  double* other_lse; // [B] each
  double* logit_sum;
  void* max_other_logit; // [B] acc
};

// Upstream gradients of one row of the core op, in float64.
struct Upstream {
  const double* others; // g_o [B]
  const double* own; // T = g_t + g_Z where the target is present, else 0 [B]
  const double* sum; // g_Z [B], or nullptr: all 0
};

// The upstream gradients as the sweep needs them, where a device makes them in one pass: upstream.h has the formulas.
struct WidenUpstreamArgs {
  RawMatrix grad_other_lse, grad_target_logit, grad_logit_sum; // [B, 1] or data == nullptr: 0
  const double* other_lse; // [B]
  const int64_t* target; // [B]
  int64_t rows; // B
  int64_t classes; // C
  double scale;
  double* others; // [B] each
  double* own;
  double* sum; // or nullptr where there is no grad_logit_sum
  double* weight_factor; // scale g_o
  double* operand_scale; // [1] that of acc operands
};

// Turns the products into rows [first_class, first_class + class_count) of grad_weight and
// grad_bias.
struct FinishClassesArgs {
  TargetContext context;
  const RowState* state; // [B]
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
  const RowState* state; // [B]
  Upstream upstream;
  int64_t rows;
  const double* weight_sum; // S [D], or nullptr when upstream.sum is
  void* products; // [B, D] acc: products_scale sum_j Q_ij B_j, becomes grad_input; nullptr: not wanted
  const double* products_scale; // [1] power of two to undo
  double* grad_m2; // [B], or nullptr
  double* grad_m3; // [B], or nullptr
};

struct SweepKernels {
  void (*load_rows)(const LoadRowsArgs&, c10::ScalarType acc);
  void (*target_rows)(const TargetRowsArgs&, c10::ScalarType acc);
  void (*accumulate_chunk)(const AccumulateChunkArgs&, c10::ScalarType acc);
  void (*combine_rows)(const CombineRowsArgs&, c10::ScalarType acc);
  void (*softmax_chunk)(const SoftmaxChunkArgs&, c10::ScalarType acc);
  void (*finish_classes)(const FinishClassesArgs&, c10::ScalarType acc);
  void (*finish_rows)(const FinishRowsArgs&, c10::ScalarType acc);
  // nullptr: ATen's ops do it.
  void (*widen_upstream)(const WidenUpstreamArgs&);
  // Runs body(0) ... body(lanes - 1), side by side where the device can.
  void (*run_lanes)(int64_t lanes, const std::function<void(int64_t)>& body);
  // Is told of a large fresh buffer before it is first written; may do nothing.
  void (*prepare_buffer)(void* data, int64_t bytes);
};

} // namespace torchmargin
