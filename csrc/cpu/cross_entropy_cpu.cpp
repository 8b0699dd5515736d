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
  const LossInputs in(op, other_lse, target_logit, target, reduction);
  const LossRows<double> mean(op, "mean_logit", mean_logit.has_value() ? *mean_logit : other_lse, in.rows);
  const at::Tensor losses = at::empty({in.rows}, other_lse.options().requires_grad(false));
  double* const loss = losses.data_ptr<double>();
  for_each_row(in.rows, [&](int64_t i) {
    if (in.labels[i] == ignore_index) {
      loss[i] = 0.0;
      return;
    }
    loss[i] = softplus(in.other[i] - in.own[i]);
    if (mean_logit.has_value()) {
      loss[i] += label_smoothing * (in.own[i] - mean[i]);
    }
  });
  if (in.kind == Reduction::none) {
    return losses.to(dtype);
  }
  double total = 0.0;
  for (int64_t i = 0; i < in.rows; ++i) {
    total += loss[i];
  }
  if (in.kind == Reduction::mean) { // NaN without a row that counts
    total /= static_cast<double>(count_valid(in.labels, in.rows, ignore_index));
  }
  return at::full({}, total, losses.options().dtype(dtype));
}

LossGradientTuple margin_loss_backward_cpu(TORCHMARGIN_LOSS_BACKWARD_OP_PARAMETERS) {
  constexpr std::string_view op = "_margin_loss_backward";
  const LossInputs in(op, other_lse, target_logit, target, reduction);
  in.check_grad(op, grad);
  const at::Tensor wide = grad.to(at::kDouble).contiguous();
  const double* const upstream = wide.const_data_ptr<double>();
  double whole = in.reduced ? *upstream : 0.0;
  if (in.kind == Reduction::mean) {
    whole /= static_cast<double>(count_valid(in.labels, in.rows, ignore_index));
  }
  const LossGradientTuple gradients = empty_loss_gradients(other_lse);
  double* const to_other = std::get<0>(gradients).data_ptr<double>();
  double* const to_own = std::get<1>(gradients).data_ptr<double>();
  double* const to_mean = std::get<2>(gradients).data_ptr<double>();
  for_each_row(in.rows, [&](int64_t i) {
    const double g = in.labels[i] == ignore_index ? 0.0 : (in.reduced ? whole : upstream[i]);
    const RowLossGradient row = row_loss_gradient(g, in.other[i] - in.own[i], label_smoothing);
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
