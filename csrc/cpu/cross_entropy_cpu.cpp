// The private loss op on the CPU: one loop over the rows, in float64; the formulas are those of ops/cross_entropy.cpp.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <string_view>

#include "cpu/loops.h"
#include "ops/cross_entropy.h"
#include "ops/loss_op.h"

namespace torchmargin::cpu {
namespace {

constexpr int64_t kCostOfRow = 64; // elements that take as long as one row's exponentials

// [B] float64 or int64, contiguous.
template <typename T>
class Rows {
 public:
  Rows(std::string_view op, const char* argument, const at::Tensor& tensor, int64_t rows) {
    constexpr c10::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
    TORCH_CHECK(
        tensor.dim() == 1 && tensor.size(0) == rows && tensor.scalar_type() == dtype, op, ": expected ", argument,
        " to have shape [", rows, "] and dtype ", dtype, ", but got ", tensor.sizes(), " and ", tensor.scalar_type());
    tensor_ = tensor.contiguous();
    data_ = tensor_.const_data_ptr<T>();
  }
  T operator[](int64_t row) const {
    return data_[row];
  }

 private:
  at::Tensor tensor_;
  const T* data_;
};

int64_t count_rows(std::string_view op, const at::Tensor& other_lse) {
  TORCH_CHECK(other_lse.dim() == 1, op, ": expected other_lse to have shape [B], but got ", other_lse.sizes());
  return other_lse.size(0);
}

Reduction check_reduction(std::string_view op, int64_t reduction) {
  TORCH_CHECK(reduction >= 0 && reduction <= 2, op, ": expected reduction to be 0, 1 or 2, but got ", reduction);
  return static_cast<Reduction>(reduction);
}

// softplus without a cancellation on either side; 0 without another class.
double softplus(double gap) {
  if (gap == -std::numeric_limits<double>::infinity()) {
    return 0.0;
  }
  return (gap > 0.0 || std::isnan(gap) ? gap : 0.0) + std::log1p(std::exp(-std::fabs(gap)));
}

double sigmoid(double x) {
  return 1.0 / (1.0 + std::exp(-x));
}

template <typename Body>
void for_each_row(int64_t rows, Body body) {
  at::parallel_for(0, rows, grain(kCostOfRow), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      body(i);
    }
  });
}

int64_t count_valid(const Rows<int64_t>& target, int64_t rows, int64_t ignore_index) {
  int64_t count = 0;
  for (int64_t i = 0; i < rows; ++i) {
    count += target[i] != ignore_index;
  }
  return count;
}

at::Tensor margin_loss_cpu(TORCHMARGIN_LOSS_OP_PARAMETERS) {
  constexpr std::string_view op = "_margin_loss";
  const at::ScalarType dtype = wide ? at::kDouble : at::kFloat;
  const Reduction kind = check_reduction(op, reduction);
  const int64_t rows = count_rows(op, other_lse);
  const Rows<double> other(op, "other_lse", other_lse, rows);
  const Rows<double> own(op, "target_logit", target_logit, rows);
  const Rows<double> mean(op, "mean_logit", mean_logit.has_value() ? *mean_logit : other_lse, rows);
  const Rows<int64_t> labels(op, "target", target, rows);
  const at::Tensor losses = at::empty({rows}, other_lse.options().requires_grad(false));
  double* const loss = losses.data_ptr<double>();
  for_each_row(rows, [&](int64_t i) {
    if (labels[i] == ignore_index) {
      loss[i] = 0.0;
      return;
    }
    loss[i] = softplus(other[i] - own[i]);
    if (mean_logit.has_value()) {
      loss[i] += label_smoothing * (own[i] - mean[i]);
    }
  });
  if (kind == Reduction::none) {
    return losses.to(dtype);
  }
  double total = 0.0;
  for (int64_t i = 0; i < rows; ++i) {
    total += loss[i];
  }
  if (kind == Reduction::mean) { // NaN without a row that counts
    total /= static_cast<double>(count_valid(labels, rows, ignore_index));
  }
  return at::full({}, total, losses.options().dtype(dtype));
}

LossGradientTuple margin_loss_backward_cpu(TORCHMARGIN_LOSS_BACKWARD_OP_PARAMETERS) {
  constexpr std::string_view op = "_margin_loss_backward";
  const Reduction kind = check_reduction(op, reduction);
  const int64_t rows = count_rows(op, other_lse);
  const Rows<double> other(op, "other_lse", other_lse, rows);
  const Rows<double> own(op, "target_logit", target_logit, rows);
  const Rows<int64_t> labels(op, "target", target, rows);
  const bool reduced = kind != Reduction::none;
  TORCH_CHECK(
      grad.dim() == (reduced ? 0 : 1) && (reduced || grad.size(0) == rows), op,
      ": expected grad to have the shape of the loss, but got ", grad.sizes());
  const at::Tensor wide = grad.to(at::kDouble).contiguous();
  const double* const upstream = wide.const_data_ptr<double>();
  double whole = reduced ? *upstream : 0.0;
  if (kind == Reduction::mean) {
    whole /= static_cast<double>(count_valid(labels, rows, ignore_index));
  }
  const auto vector = [&] { return at::empty({rows}, other_lse.options().requires_grad(false)); };
  const LossGradientTuple gradients{vector(), vector(), vector()};
  double* const to_other = std::get<0>(gradients).data_ptr<double>();
  double* const to_own = std::get<1>(gradients).data_ptr<double>();
  double* const to_mean = std::get<2>(gradients).data_ptr<double>();
  for_each_row(rows, [&](int64_t i) {
    const double g = labels[i] == ignore_index ? 0.0 : (reduced ? whole : upstream[i]);
    const double gap = other[i] - own[i];
    if (g == 0.0) { // nothing, even if the row holds NaN
      to_other[i] = to_own[i] = to_mean[i] = 0.0;
      return;
    }
    const double p = sigmoid(gap);
    // eps - p, and for a p near 1 the same without its cancellation.
    const double slope = p < 0.5 ? label_smoothing - p : sigmoid(-gap) - (1.0 - label_smoothing);
    to_other[i] = g * p;
    to_own[i] = g * slope;
    to_mean[i] = g * -label_smoothing;
  });
  return gradients;
}

TORCH_LIBRARY_IMPL(torchmargin, CPU, library) {
  library.impl("_margin_loss", margin_loss_cpu);
  library.impl("_margin_loss_backward", margin_loss_backward_cpu);
}

} // namespace
} // namespace torchmargin::cpu
