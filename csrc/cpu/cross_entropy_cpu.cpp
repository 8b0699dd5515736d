// The private loss op on the CPU: one loop over the rows, in float64; the formulas are those of ops/cross_entropy.cpp.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <string_view>

#include "cpu/loops.h"
#include "math/row_loss.h"
#include "ops/loss_op.h"
#include "ops/loss_rows.h"

namespace torchmargin::cpu {
namespace {

constexpr int64_t kCostOfRow = 64; // elements that take as long as one row's exponentials

template <typename Body>
void for_each_row(int64_t rows, Body body) {
  at::parallel_for(0, rows, grain(kCostOfRow), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      body(i);
    }
  });
}

int64_t count_valid(const LossRows<int64_t>& target, int64_t rows, int64_t ignore_index) {
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
  const int64_t rows = count_loss_rows(op, other_lse);
  const LossRows<double> other(op, "other_lse", other_lse, rows);
  const LossRows<double> own(op, "target_logit", target_logit, rows);
  const LossRows<double> mean(op, "mean_logit", mean_logit.has_value() ? *mean_logit : other_lse, rows);
  const LossRows<int64_t> labels(op, "target", target, rows);
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
  const int64_t rows = count_loss_rows(op, other_lse);
  const LossRows<double> other(op, "other_lse", other_lse, rows);
  const LossRows<double> own(op, "target_logit", target_logit, rows);
  const LossRows<int64_t> labels(op, "target", target, rows);
  const bool reduced = kind != Reduction::none;
  check_loss_grad(op, grad, reduced, rows);
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
    const RowLossGradient row = row_loss_gradient(g, other[i] - own[i], label_smoothing);
    to_other[i] = row.other;
    to_own[i] = row.own;
    to_mean[i] = row.mean;
  });
  return gradients;
}

TORCH_LIBRARY_IMPL(torchmargin, CPU, library) {
  library.impl("_margin_loss", margin_loss_cpu);
  library.impl("_margin_loss_backward", margin_loss_backward_cpu);
}

} // namespace
} // namespace torchmargin::cpu
