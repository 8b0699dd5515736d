// What rounding may do to results and gradients of the linear ops: tests/python/rounding.py for C++, where products may
// read 16 bits. First order and worst case; gradients by the 2-norm of their rows, which no projection makes longer.
#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/problem.h"
#include "plan/operands.h"

namespace torchmargin::testing {

inline double unit_roundoff_of(at::ScalarType dtype) {
  return dtype == at::kDouble ? 0x1p-53 : dtype == at::kFloat ? 0x1p-24 : dtype == at::kHalf ? 0x1p-11 : 0x1p-8;
}

inline at::Tensor widened(const at::Tensor& tensor) {
  return tensor.detach().to(at::kCPU, at::kDouble);
}

// Every element is nearer to what is expected than its bound; NaN is near nothing.
inline void expect_below(const at::Tensor& error, const at::Tensor& bound, const std::string& what) {
  const at::Tensor far = error.le(bound).logical_not();
  EXPECT_FALSE(far.any().item<bool>()) << what << ": " << far.sum().item<int64_t>() << " of " << far.numel()
                                       << " are off, by up to " << (error / bound).max().item<double>() << " bounds";
}

inline void
expect_vector(const at::Tensor& got, const at::Tensor& expected, const at::Tensor& bound, const char* what) {
  const at::Tensor a = widened(got);
  const at::Tensor b = widened(expected);
  expect_below(at::where(a.eq(b), at::zeros_like(b), (a - b).abs()), bound, what);
}

// `roundings`: to got's dtype; two where what is expected has it, too.
inline void expect_gradient(
    const at::Tensor& got,
    const at::Tensor& expected,
    const at::Tensor& bound,
    int64_t index,
    int roundings = 1) {
  const auto lengths = [](const at::Tensor& rows) { return rows.dim() == 2 ? rows.norm(2, 1) : rows.abs(); };
  const at::ScalarType dtype = got.scalar_type();
  const double smallest = dtype == at::kHalf ? 0x1p-25 : 0.0; // half a subnormal number; other dtypes have none here
  const double width = expected.dim() == 2 ? std::sqrt(static_cast<double>(expected.size(1))) : 1.0;
  // To what products have, and then to the parameters' dtype.
  const double stored =
      roundings * (unit_roundoff_of(dtype) + (dtype == at::kDouble ? 0.0 : unit_roundoff_of(at::kFloat)));
  const at::Tensor a = widened(got);
  const at::Tensor b = widened(expected);
  expect_below(
      lengths(a - b), bound + stored * (lengths(b) + bound) + roundings * smallest * width,
      "gradient " + std::to_string(index));
}

class LinearRounding {
 public:
  // Of a result of products in float32 against the same in float64; both round in float64.
  LinearRounding(const LinearProblem& problem, const OperandFormat& operands)
      : operands_(operands),
        margins_(problem.margins.parameters),
        rows_(problem.input.size(0)),
        classes_(problem.weight.size(0)) {
    const bool wide = problem.input.scalar_type() == at::kDouble;
    const bool narrow = at::isReducedFloatingType(operands.dtype);
    const double u = wide ? 0x1p-52 : 0x1p-24;
    const at::Tensor x = widened(problem.input);
    const at::Tensor w = widened(problem.weight);
    const auto features = static_cast<double>(x.size(1));
    const auto inverse = [](const at::Tensor& norm) {
      return at::where(norm > 0, norm.reciprocal(), at::zeros_like(norm));
    };
    const at::Tensor x_norm = x.norm(2, 1);
    const at::Tensor w_norm = w.norm(2, 1);
    alpha_ = problem.normalize_input ? at::ones_like(x_norm) : x_norm;
    beta_ = problem.normalize_weight ? at::ones_like(w_norm) : w_norm;
    largest_beta_ = beta_.max().item<double>();
    const double scale = margins_.scale;
    of_input_ = problem.normalize_input ? scale * inverse(x_norm) : scale * at::ones_like(x_norm);
    of_weight_ = problem.normalize_weight ? scale * inverse(w_norm) : scale * at::ones_like(w_norm);
    const at::Tensor unit_x = x * inverse(x_norm).unsqueeze(1);
    const at::Tensor unit_w = w * inverse(w_norm).unsqueeze(1);
    const at::Tensor bias = problem.bias.has_value() ? widened(*problem.bias) : at::zeros({classes_}, at::kDouble);
    const at::Tensor lengths = alpha_.unsqueeze(1) * beta_;
    const at::Tensor target = widened(problem.target).to(at::kLong);
    is_own_ = at::arange(classes_).eq(target.unsqueeze(1)).to(at::kDouble);

    // A component of a unit vector: its sum of squares, root, reciprocal and product; in float32 the last two.
    const double unit = wide ? features + 8 : 2;
    const at::Tensor sizes = scale * lengths + bias.abs(); // of logits
    const at::Tensor largest = sizes.amax(1);
    // A product, both unit vectors, and factors and bias.
    at::Tensor logit = u * (features + 2 * unit + 8) * sizes;
    narrow_ = narrow ? unit_roundoff_of(operands.dtype) : 0.0;
    if (operands.unit_vectors) { // float16: both are rounded, or off by half a subnormal number in each component
      subnormal_ = 2 * std::sqrt(features) * 0x1p-25 * largest_beta_; // a power of two has brought weights below 1
      logit =
          logit + scale * alpha_.unsqueeze(1) * (lengths_of_products(unit_x, unit_w) * 2 * narrow_ + 2 * subnormal_);
    }
    const at::Tensor logits = scale * lengths * unit_x.matmul(unit_w.t()) + bias;
    softmax_ = at::nan_to_num(
        at::softmax(logits.masked_fill(is_own_.to(at::kBool), -std::numeric_limits<double>::infinity()), 1));
    // A log-sum-exp moves as softmax weighs the logits' errors. At most 1024 float32 terms are added in float32.
    const auto terms = static_cast<double>(wide ? classes_ : std::min<int64_t>(classes_, 1024));
    lse_ = (softmax_ * logit).sum(1) + u * (terms + 8 * (1 + largest));
    // Relative, of softmax weights: z - o, its exponential and factors, and the rounding to 16 bits.
    weight_error_ = logit + lse_.unsqueeze(1) + u * (6 + 4 * largest).unsqueeze(1) + narrow_;
    // float32 sums over rows and classes go by tiles, of 128 or more where there are thousands.
    const auto added = [&](int64_t count) {
      const auto number = static_cast<double>(count);
      return wide ? number : std::min(number, 256 + number / 128);
    };
    sum_error_ = u * (added(classes_) + added(rows_) + features + 2 * unit);

    // The target is float64 whatever the dtype: an angle, its cosine and psi, and lengths.
    margin_ = 2 + 2 * margins_.m1 + 2 * std::fabs(margins_.m2) + std::fabs(margins_.m3);
    target_ = 0x1p-52 * margin_ * (4 * (features + 8) + 16 + features + 8) * largest;
    const at::Tensor own = unit_w.index_select(0, target.clamp(0, classes_ - 1));
    const at::Tensor delta = (unit_x - own).norm(2, 1);
    const at::Tensor sigma = (unit_x + own).norm(2, 1);
    const at::Tensor parallel = at::minimum(delta, sigma).le(0x1p-50).logical_or(is_own_.sum(1).eq(0));
    const at::Tensor sine = at::where(parallel, at::ones_like(delta), delta * sigma / 2);
    own_error_ = margin_ * (0x1p-52 * ((2 * (features + 8) + 16) / sine + rows_) + (wide ? 0.0 : 2 * u));
    // A class has its norm in acc; all else is float64.
    total_ = (2 * u + 0x1p-52 * static_cast<double>(classes_ + 2 * x.size(1) + 20)) * sizes.sum(1) + target_;
  }

  const at::Tensor& lse() const { // [B] each
    return lse_;
  }
  const at::Tensor& target() const {
    return target_;
  }
  const at::Tensor& total() const {
    return total_;
  }

  // Of input, weight and bias, of the sizes [B] of upstream gradients, and a relative error of these themselves.
  std::array<at::Tensor, 3> gradients(
      const at::Tensor& others,
      const at::Tensor& own,
      const at::Tensor& total,
      const at::Tensor& factor_error) const {
    const at::Tensor of_own = margin_ * own * (own_error_ + factor_error) + total * own_error_;
    const at::Tensor of_total = total * (sum_error_ + factor_error);
    const at::Tensor weights = softmax_ * (weight_error_ + (sum_error_ + factor_error).unsqueeze(1));
    // The other operand's rounding, and what float16 loses of a softmax weight times 2^15, and of a row up to 2^9.
    const double row_operand =
        operands_.unit_vectors ? narrow_ : 0.0; // of the weights; bfloat16 ones go in as they are
    const double lost = operands_.unit_vectors ? 0x1p-40 : 0.0;
    const double lost_row = subnormal_ / std::max(largest_beta_, 1e-300) * 0x1p-9;
    const double classes = static_cast<double>(classes_);
    const at::Tensor of_others =
        ((weights + softmax_ * row_operand) * beta_).sum(1) + subnormal_ + lost * classes * largest_beta_;
    const at::Tensor of_input = of_input_ * (others * of_others + largest_beta_ * (of_own + classes * of_total));
    const at::Tensor scaled = others * alpha_;
    const double flushed = std::exp(-50.0) + lost; // smaller softmax weights are 0
    const auto by_class = [&](const at::Tensor& factor, double operand) {
      const at::Tensor g = others * factor;
      return (weights + softmax_ * operand).t().matmul(g) + is_own_.t().matmul((of_own + of_total) * factor) +
          (of_total * factor).sum() + flushed * g.sum();
    };
    const at::Tensor rows_lost = softmax_.sum(0) * lost_row * (rows_ == 0 ? 0.0 : scaled.max().item<double>());
    return {of_input, of_weight_ * (by_class(alpha_, narrow_) + rows_lost), by_class(at::ones_like(alpha_), narrow_)};
  }

  // softplus(o - t) + label_smoothing (t - Z / C) of each row [B].
  at::Tensor loss(double label_smoothing) const {
    return lse_ + target_ + label_smoothing * (target_ + total_ / static_cast<double>(classes_)) + 0x1p-50;
  }

  // Of input, weight and bias, from the size [B] of each loss' upstream gradient: sigmoid(o - t) multiplies all of them
  // and has the error of its argument.
  std::array<at::Tensor, 3> loss_gradients(const at::Tensor& upstream, double label_smoothing) const {
    return gradients(
        upstream, (1 + label_smoothing) * upstream, upstream * (label_smoothing / static_cast<double>(classes_)),
        lse_ + target_);
  }

  // Of input, weight and bias, from the sizes [B, C] of margin_logits' upstream gradient.
  std::array<at::Tensor, 3> logits_gradients(const at::Tensor& upstream) const {
    const at::Tensor error = upstream * (sum_error_ + is_own_ * (margin_ * own_error_).unsqueeze(1));
    return {of_input_ * (error * largest_beta_).sum(1), of_weight_ * error.t().matmul(alpha_), error.sum(0)};
  }

 private:
  // sum_k |a_k| |b_k|, which products of rounded vectors are off by, times the size of the other's length.
  at::Tensor lengths_of_products(const at::Tensor& unit_x, const at::Tensor& unit_w) const {
    return unit_x.abs().matmul(unit_w.abs().t()) * beta_;
  }

  OperandFormat operands_;
  MarginParameters margins_;
  int64_t rows_, classes_;
  double largest_beta_, margin_, sum_error_;
  double narrow_ = 0.0; // an operand's unit roundoff, if it is of 16 bits
  double subnormal_ = 0.0;
  at::Tensor alpha_, beta_, of_input_, of_weight_, is_own_, softmax_; // softmax: of the other classes
  at::Tensor lse_, target_, total_, weight_error_, own_error_;
};

} // namespace torchmargin::testing
