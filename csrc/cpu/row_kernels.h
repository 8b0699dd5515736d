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

// How the logits of a row's hard negatives change: where the cosine is above the threshold; see changed_logit().
template <typename T>
struct HardMap {
  T row_factor; // cosine = product * (class_factor * row_factor)
  T threshold;
  T a;
  T b;
  T scaled_d;
};

// z = scale N(c) + bias, c = product * (class_factor * row_factor); see math/one_against_all.h.
template <typename T>
struct BinaryMap {
  T row_factor;
  T scale;
  T bias;
  double power;
  T added; // to g(c): the margin where it is the cosine's
  bool of_angle; // the margin is the angle's:
  T cosine_of_margin;
  T sine_of_margin;
};

struct BinarySum {
  double softplus;
  double slope;
  double maximum;
};

// What a class weighs: (of_lse Q + of_sum) n', or of_lse Q n' + of_sum (n' - 1) if sum_of_changes; see
// SoftmaxChunkArgs.
template <typename T>
struct WeightMap {
  double lse;
  bool times_class_factors;
  T of_lse;
  T of_sum;
  bool sum_of_changes;
  bool slopes; // false: n' = 1
};

// What an angular margin adds to the gradient of one of the two vectors `self` and `other`, component by component:
//   factor (radial s - dtheta ((o + sign s) - sign half s) inverse_sine),   s = inverse_self self_k, o = inverse_other
//   other_k
// The tangent in it is that of math/angle.h.
struct TangentTerm {
  double inverse_self;
  double inverse_other;
  double sign;
  double half;
  double inverse_sine;
  double factor;
  double radial;
  double dtheta;
};

// A row of grad_input beside that term: outer (others_k - along s + term_k), where
//   others_k = unscale products_k + smoothing sum_k,   along = sum of others_k s
struct RowGradient {
  double outer;
  double unscale;
  double smoothing;
  const double* sum; // S - B_y; not read where smoothing is 0
  bool project; // false: along is 0
};

template <typename T>
struct RowKernels {
  // sum x_k^2 in float64.
  double (*squared_norm)(const T* row, int64_t size);
  // Squared lengths of the difference and of the sum of inverse_x x and inverse_w w, in float64.
  void (*distances)(
      const T* x,
      const T* w,
      int64_t size,
      double inverse_x,
      double inverse_w,
      double* difference,
      double* sum);
  // to_k = factor * from_k, rounded once. `to` may be `from`.
  void (*scale_row)(const T* from, T* to, int64_t size, double factor);
  // The same in float64.
  void (*widen_row)(const T* from, double* to, int64_t size, double factor);
  void (*narrow_row)(const double* from, T* to, int64_t size);
  // sum_k += factor * row_k.
  void (*add_row)(double* sum, const T* row, int64_t size, double factor);
  // sum a_k b_k in float64.
  double (*dot)(const double* a, const T* b, int64_t size);
  // sum_k += the term.
  void (*add_tangent)(double* sum, const T* self, const T* other, int64_t size, const TangentTerm& term);
  // products become grad_input. `other` may be nullptr where term.factor is 0.
  void (*finish_row)(
      T* products,
      const T* self,
      const T* other,
      int64_t size,
      const RowGradient& gradient,
      const TangentTerm& term);
  // `bounded`: the shift is 0, else the largest z. size <= kBlock.
  BlockSum (*sum_block)(const T* products, int64_t size, LogitMap<T> map, bool bounded);
  // The same of changed logits, but for the maximum, which is that of the logits before they change. The shift is
  // `shift`, or the largest if it is NaN. logit_sum (or nullptr) += the changed logits without bias, or what they
  // changed by.
  BlockSum (*sum_hard_block)(
      const T* products,
      int64_t size,
      LogitMap<T> map,
      const HardMap<T>& hard,
      double shift,
      double* logit_sum,
      bool sum_of_changes);
  // out_j = z_j.
  void (*logits_row)(const T* products, T* out, int64_t size, LogitMap<T> map);
  // out_j = exp(z_j - lse) (times class_factor_j), exactly 0 below exp(-50). The lse is not rounded to T: near the
  // largest logit z - lse is exact, and so is the factor that all of the row share.
  void (*softmax_row)(const T* products, T* out, int64_t size, LogitMap<T> map, double lse, bool times_class_factors);
  // out_j = what class j weighs, with Q as above.
  void (*weigh_row)(
      const T* products,
      T* out,
      int64_t size,
      LogitMap<T> map,
      const HardMap<T>& hard,
      const WeightMap<T>& weights);
  // One against all, see BinaryMap: sums of softplus and its slope, and the largest z without curve, margin and bias.
  BinarySum (*sum_binary_block)(const T* products, int64_t size, LogitMap<T> map, const BinaryMap<T>& binary);
  // out_j = factor N'(c_j) / (1 + exp(-z_j)), times class_factor_j.
  void (*weigh_binary_row)(
      const T* products,
      T* out,
      int64_t size,
      LogitMap<T> map,
      const BinaryMap<T>& binary,
      T factor,
      bool times_class_factors);
  // Of planes that lie plane_stride apart, with factors [centers, size] or nullptr: the largest, and of which plane
  // (unless winner is nullptr). `out` may be the first plane. See FoldCentersArgs.
  void (*fold_row)(
      const T* products,
      int64_t plane_stride,
      int64_t size,
      int64_t centers,
      const T* factors,
      T* out,
      uint8_t* winner);
  // The other way, in place.
  void (*spread_row)(
      T* weights,
      int64_t plane_stride,
      int64_t size,
      int64_t centers,
      const T* factors,
      const uint8_t* winner);
  // out = unscale (row - (row . w) inverse_norm^2 w): takes the part along w away; with
  // inverse_norm 0 nothing. `out` may be `row`.
  void (*project_row)(const T* row, const T* w, T* out, int64_t size, T inverse_norm, T unscale);
};

// The kernels for the running CPU.
template <typename T>
const RowKernels<T>& row_kernels();

} // namespace torchmargin::cpu
