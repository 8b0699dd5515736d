// The kernels of a device, as a table of functions over raw pointers: what the sweep needs beside the steps on a tile
// (device.h), and what their portable form (tile_steps.cpp) is made of. Matrices here are row-major in acc (float64 for
// float64 inputs, else float32) unless they are described by RawMatrix.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <functional>

#include "math/one_against_all.h"
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
  RawMatrix weight; // [C K, D]
  const int64_t* target; // [B]; outside [0, classes): absent from this weight
  int64_t features; // D
  int64_t classes; // C
  MarginParameters margin;
  bool normalize_input;
  bool normalize_weight;
  int64_t centers = 1; // K: class j has the weights j K ... j K + K - 1
  RawMatrix bias = {}; // [C, 1], row_stride 0: the same for all; data == nullptr: none
  RawMatrix sample_m2 = {}, sample_m3 = {}, sample_margin_weight = {}; // [B, 1] or data == nullptr
  BinaryForm binary = {}; // one against all: psi is the curve through the cosine with its margin
};

// The sums over D from which a row's angle, psi and slopes are rebuilt without reading its features again.
struct RowState {
  double x_squared; // |x|^2
  double w_squared; // |w_y|^2; this and the next two are 0 where the target is absent
  double delta_squared; // |x/|x| - w_y/|w_y||^2; 0 where x or w_y is zero
  double sigma_squared; // |x/|x| + w_y/|w_y||^2
  double center; // which of its class's centers w_y is: the nearest, the first of several; 0 where the target is absent
};

// How the logits of a row's other classes change: where the cosine c is above the threshold, c becomes a c^2 + b c + d.
struct HardRow {
  double threshold; // +infinity: nowhere
  double a, b, d; // d = -infinity takes such classes out of the sum
  double shift; // that suits the row's sums whatever its cosines are; NaN: the largest logit so far
  double growth; // a power of two: |n'| and |n' - 1| of its slopes n' are not above it, and it is 1 at least
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
  const void* given_norms = nullptr; // [row_count] acc, or nullptr: inverse norms that were taken before, on a GPU
  // [sum_sets, D] += rows times inverse norms times row_factor, or nullptr: every sum_sets-th row to a set. NB: if
  // `measured`, it needs inverse_norms.
  double* sum = nullptr;
  int64_t sum_sets = 1; // on a GPU more: so many more blocks read rows
};

// Products of K centers of each class, a plane [row_count, class_count] for each, as cosines: the largest of each
// class, and whose it is. As torch.max: the first of several that are equal, and NaN is the largest.
struct FoldCentersArgs {
  const void* products; // acc
  int64_t row_stride;
  int64_t plane_stride;
  int64_t row_count;
  int64_t class_count;
  int64_t centers; // K
  const void* factors; // [K, class_count] acc: what the products lack of the centers' lengths; nullptr: 1
  void* out; // [row_count, class_count] acc; may be the first plane
  int64_t out_row_stride;
  uint8_t* winner; // [row_count, class_count], or nullptr
  int64_t winner_row_stride;
};

// The other way: what stands in the first plane goes, times its factor, to the winner's plane; the others are 0.
struct SpreadCentersArgs {
  void* weights;
  c10::ScalarType dtype; // acc; on a GPU also float16 or bfloat16
  int64_t row_stride;
  int64_t plane_stride;
  int64_t row_count;
  int64_t class_count;
  int64_t centers;
  const void* factors; // [K, class_count] acc; nullptr: 1
  const uint8_t* winner; // [row_count, class_count]
  int64_t winner_row_stride;
};

// Raw products A . w, and what makes logits of them: z = scale * row_factor * class_factor * product + bias. With
// sub-centers they are those of the nearest centers, folded, and there are no factors.
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
  RunningSums sums; // NB: the maximum is that of the logits as they are without `hard`
  const HardRow* hard = nullptr; // [row_count], or nullptr: no logit changes
  // [row_count] the sum of the logits without bias, or of what they change by; or nullptr. Begun at 0 by `first`.
  double* logit_sum = nullptr;
  bool sum_of_changes = false;
  // The largest `hardest` logits, the larger and then the lower class first, with their classes (of all C); they are
  // left out of the sum, and what they displace joins it. NaN and -infinity are none of them.
  int64_t hardest = 0;
  void* top_logit = nullptr; // [row_count, hardest] acc, -infinity where there is none
  int64_t* top_class = nullptr; // -1 where there is none
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
  // Where logits change, or gradients of all logits cannot be told from those of their sum, more than Q is written:
  //   (of_lse Q + of_sum) n'           n' = 2 a c + b where c is above the threshold, else 1
  //   of_lse Q n' + of_sum (n' - 1)    if sum_of_changes
  const double* of_lse = nullptr; // [row_count]; nullptr: it is Q that is written, and the rest of this is not read
  const double* of_sum = nullptr; // [row_count], or nullptr: 0
  bool sum_of_changes = false;
  const HardRow* hard = nullptr; // [row_count], or nullptr: n' = 1
  bool slopes = true; // false: n' = 1 (for the gradient of a bias), though the logits change
};

// A tile's product and what is made of it in one kernel: the logits are never written. The tile has no bias, and its
// products are not read.
//
// out == nullptr: exp(z) is added to sums, as AccumulateChunkArgs has it if `bounded` and plain, with a scale above 0
// and without row factors where there are no class factors. Else the weights are written, as SoftmaxChunkArgs has Q.
struct FusedTileArgs {
  ProductsTile tile;
  c10::ScalarType dtype; // of both operands: float16 or bfloat16
  // [row_count, features] and [class_count, features]: rows begin at 16 bytes
  const void* row_operand;
  int64_t row_operand_stride;
  const void* class_operand;
  int64_t class_operand_stride;
  int64_t features;
  // [sets, set_stride] each, added to: sums of exp(z), and the largest logits. Which set a tile's part goes to is the
  // device's choice, the same every time.
  double* sum = nullptr;
  double* maximum = nullptr;
  int64_t set_stride = 0;
  const double* other_lse = nullptr; // these as SoftmaxChunkArgs has them
  const double* upstream = nullptr;
  bool times_class_factors = false;
  void* out = nullptr; // of dtype; rows begin at 16 bytes, and padding to 16 bytes at their end is written
  int64_t out_row_stride = 0;
  double out_scale = 1.0;
};

// Adds the sets of FusedTileArgs, in order, to a row's running sums.
struct FoldSetsArgs {
  int64_t rows;
  int64_t sets;
  const double* sum; // [sets, rows]
  const double* maximum;
  bool first; // the running sums hold nothing yet, and are not read
  RunningSums sums;
};

// One against all: adds log(1 + exp(z)) of a tile to each row's sums, z = scale N(c) + bias with cosines c; the
// target's own column is left out.
struct AddBinaryArgs {
  ProductsTile tile; // bias: see below
  BinaryForm form;
  const void* bias; // [1] acc, or nullptr: 0
  bool first; // the sums hold nothing yet, and are not read
  double* softplus_sum; // [row_count] each
  double* slope_sum; // of the slopes 1 / (1 + exp(-z)): to the bias
  double* maximum; // of scale c: of the logits as they are without a curve, a margin and a bias
};

// out_scale factor N'(c) / (1 + exp(-z)) of a tile; 0 at the target.
struct WeighBinaryArgs {
  ProductsTile tile;
  BinaryForm form;
  const void* bias;
  const double* upstream; // [row_count]; a row with 0 is written as 0
  double factor;
  bool times_class_factors;
  void* out;
  int64_t out_row_stride;
  c10::ScalarType out_dtype;
  double out_scale;
};

// Weights of the hardest classes into a tile of weights, where they are 0 or a class is not in the tile.
struct WriteHardestArgs {
  const int64_t* classes; // [row_count, hardest] of all C, or -1
  const double* values; // [row_count, hardest]
  int64_t hardest;
  int64_t row_count;
  int64_t first_class;
  int64_t class_count;
  const void* class_factors; // [class_count] acc, or nullptr: 1
  void* out;
  int64_t out_row_stride;
  c10::ScalarType out_dtype;
  double out_scale;
};

// How each row's hard negatives change, from what the caller gave: see HardRow.
struct HardRowsArgs {
  TargetContext context;
  int64_t rows;
  const RowState* state; // [B]
  // [B, 1], or data == nullptr: the row's own cos(m1 theta + m2) - m3, and +infinity where its target is absent. From 1
  // on nothing is hard, though a rounded cosine may be above it.
  RawMatrix threshold;
  RawMatrix coefficients; // [B, 3]; row_stride 0: the same for all
  bool with_bias; // logits have no bounds
  HardRow* hard; // [B]
};

// The lanes' hardest classes of every row as one list, their logits again in float64, and those that the list has no
// place for into the first lane's sums.
struct MergeHardestArgs {
  TargetContext context;
  int64_t rows;
  const RowState* state; // [B]
  int64_t lanes;
  int64_t hardest;
  const void* top_logit; // [lanes, B, hardest] acc
  const int64_t* top_class; // [lanes, B, hardest]
  RunningSums sums; // [B] of the first lane
  double* hardest_logit; // [B, hardest], -infinity where there is none
  int64_t* hardest_class; // [B, hardest], -1 where there is none
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
  const double* weight_sum; // [D] sum of the (normalised) weights, or nullptr: 0
  const double* bias_sum; // [1] sum of the bias, or nullptr: 0
  double* other_lse; // [B] each
  double* logit_sum;
  void* max_other_logit; // [B] acc
  // [lanes, B] added to logit_sum, or nullptr: 0. Without this and weight_sum logit_sum is 0.
  const double* more_logit_sum = nullptr;
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
  // [1] the power of two that brings the largest |g_o| to [least / 2, least); 1 where there is none
  double* operand_scale;
  double least = 1.0;
  bool of_weight_factor = false; // the largest |weight_factor|, in place of |g_o|
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
  // [B, D] acc, on a GPU where there are products: of a class that has rows the products go here, to the place of its
  // first one among the sorted, and finish_own_classes does the rest for all chunks at once.
  void* own_products = nullptr;
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
  void (*hard_rows)(const HardRowsArgs&, c10::ScalarType acc);
  void (*merge_hardest)(const MergeHardestArgs&, c10::ScalarType acc);
  void (*fold_centers)(const FoldCentersArgs&, c10::ScalarType acc);
  void (*spread_centers)(const SpreadCentersArgs&, c10::ScalarType acc);
  void (*write_hardest)(const WriteHardestArgs&, c10::ScalarType acc);
  void (*add_binary)(const AddBinaryArgs&, c10::ScalarType acc);
  void (*weigh_binary)(const WeighBinaryArgs&, c10::ScalarType acc);
  void (*softmax_chunk)(const SoftmaxChunkArgs&, c10::ScalarType acc);
  // nullptr: there are none, see DeviceTraits::fused_tiles.
  void (*fused_tile)(const FusedTileArgs&);
  void (*fold_sets)(const FoldSetsArgs&);
  void (*finish_classes)(const FinishClassesArgs&, c10::ScalarType acc);
  // The classes that have rows, once for all chunks: products = own_products, all else of the whole weight. nullptr:
  // finish_classes does them too.
  void (*finish_own_classes)(const FinishClassesArgs&, c10::ScalarType acc);
  void (*finish_rows)(const FinishRowsArgs&, c10::ScalarType acc);
  // nullptr: ATen's ops do it.
  void (*widen_upstream)(const WidenUpstreamArgs&);
  // Runs body(0) ... body(lanes - 1), side by side where the device can.
  void (*run_lanes)(int64_t lanes, const std::function<void(int64_t)>& body);
  // Is told of a large fresh buffer before it is first written; may do nothing.
  void (*prepare_buffer)(void* data, int64_t bytes);
};

} // namespace torchmargin
