// _margin_loss: from the core's results the loss of each row, reduced.
//
//   loss = softplus(o - t) + eps (t - Z / C)        0 where the row is ignored
//   to o: g p      to t: g (eps - p)      to Z / C: -g eps          p = sigmoid(o - t)
//
// It is an op with a backward of its own because of rows that count for nothing: autograd's would make 0 * NaN of a
// row that holds NaN and has no upstream gradient (a masked loss), and every row of grad_weight would hold it. On the
// CPU both are one loop (cpu/cross_entropy_cpu.cpp), on CUDA a kernel; elsewhere they are made of ATen's ops, which
// stand here.
#include "ops/cross_entropy.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "ops/checks.h"
#include "ops/class_weight.h"
#include "ops/differentiable.h"
#include "ops/find_op.h"
#include "ops/loss_op.h"

namespace torchmargin {
namespace {

Reduction parse_reduction(std::string_view op, std::string_view text) {
  if (text == "none") {
    return Reduction::none;
  }
  if (text == "mean") {
    return Reduction::mean;
  }
  TORCH_CHECK(text == "sum", op, ": expected reduction to be one of 'none', 'mean', 'sum', but got '", text, "'");
  return Reduction::sum;
}

at::Tensor zero_like(const at::Tensor& tensor) {
  return at::zeros({}, tensor.options().requires_grad(false));
}

// Differentiable in every mode.
at::Tensor loss_formula(TORCHMARGIN_LOSS_OP_PARAMETERS) {
  const at::ScalarType dtype = wide ? at::kDouble : at::kFloat;
  // NB: ignored rows are replaced before and after the arithmetic: 0 * NaN once more.
  const at::Tensor valid = target.ne(ignore_index);
  const at::Tensor zero = zero_like(other_lse);
  const at::Tensor own = at::where(valid, target_logit, zero);
  const at::Tensor gap = at::where(valid, other_lse, zero) - own;
  // NB: softplus(o - t) by logaddexp: F.softplus becomes the identity above 20, and lse - t has no digit left where
  // the loss is small. Without another class it is 0, and so are its derivatives, which logaddexp's are not.
  const at::Tensor alone = gap.eq(-std::numeric_limits<double>::infinity());
  at::Tensor loss = at::where(alone, zero, at::logaddexp(zero, at::where(alone, zero, gap)));
  if (mean_logit.has_value()) {
    loss = loss + label_smoothing * (own - at::where(valid, *mean_logit, zero));
  }
  loss = at::where(valid, loss, zero);
  switch (static_cast<Reduction>(reduction)) {
    case Reduction::none:
      return loss.to(dtype);
    case Reduction::sum:
      return loss.sum().to(dtype);
    case Reduction::mean:
      return (loss.sum() / valid.sum()).to(dtype);
  }
  TORCH_CHECK(false, "_margin_loss: expected reduction to be 0, 1 or 2, but got ", reduction);
}

// The gradients of o, t and Z / C, in ATen: their own derivatives are autograd's.
LossGradientTuple loss_gradients(TORCHMARGIN_LOSS_BACKWARD_OP_PARAMETERS) {
  const at::Tensor zero = zero_like(other_lse);
  const at::Tensor valid = target.ne(ignore_index);
  const at::Tensor wide = grad.to(at::kDouble);
  const bool mean = static_cast<Reduction>(reduction) == Reduction::mean;
  const at::Tensor g = at::where(valid, mean ? wide / valid.sum() : wide, zero);
  const at::Tensor gap = other_lse - target_logit;
  // NB: only where p would be NaN. To g it has a derivative, also where g is 0.
  const at::Tensor unused = g.eq(0).logical_and(gap.isnan());
  const at::Tensor p = at::sigmoid(at::where(unused, zero, gap));
  // eps - p, and for a p near 1 the same without its cancellation.
  const at::Tensor rest = at::sigmoid(at::where(unused, zero, -gap));
  const at::Tensor slope = at::where(p < 0.5, label_smoothing - p, rest - (1.0 - label_smoothing));
  return {g * p, g * slope, g * -label_smoothing};
}

at::Tensor call_loss(TORCHMARGIN_LOSS_OP_PARAMETERS) {
  static const auto op = find_op<at::Tensor(TORCHMARGIN_LOSS_OP_PARAMETERS)>("torchmargin::_margin_loss");
  return op.call(TORCHMARGIN_LOSS_OP_ARGUMENTS);
}

// NB: an op, for compiled autograd runs a node's function on gradients of unknown length.
LossGradientTuple call_loss_backward(TORCHMARGIN_LOSS_BACKWARD_OP_PARAMETERS) {
  static const auto op =
      find_op<LossGradientTuple(TORCHMARGIN_LOSS_BACKWARD_OP_PARAMETERS)>("torchmargin::_margin_loss_backward");
  return op.call(TORCHMARGIN_LOSS_BACKWARD_OP_ARGUMENTS);
}

at::Tensor loss_autograd(TORCHMARGIN_LOSS_OP_PARAMETERS) {
  const auto backward = [label_smoothing, ignore_index, reduction](
                            const Tensors& grads, const Tensors& saved, const std::vector<bool>&) {
    auto [other, own, mean] =
        call_loss_backward(grads[0], saved[0], saved[1], saved[3], label_smoothing, ignore_index, reduction);
    return Tensors{other, own, mean};
  };
  return differentiable_forward(
      "MarginLossBackward",
      {{other_lse, target_logit, mean_logit},
       {target},
       {label_smoothing, static_cast<double>(ignore_index), static_cast<double>(reduction)}},
      /*outputs=*/1, /*keep=*/{}, [&] { return Tensors{call_loss(TORCHMARGIN_LOSS_OP_ARGUMENTS)}; },
      [&] { return Tensors{loss_formula(TORCHMARGIN_LOSS_OP_ARGUMENTS)}; }, backward)[0];
}

LossGradientTuple loss_backward_autograd(TORCHMARGIN_LOSS_BACKWARD_OP_PARAMETERS) {
  const OptionalTensors inputs{grad, other_lse, target_logit};
  if (any_has_tangent(inputs) || any_requires_grad(inputs)) {
    return loss_gradients(TORCHMARGIN_LOSS_BACKWARD_OP_ARGUMENTS);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_loss_backward(TORCHMARGIN_LOSS_BACKWARD_OP_ARGUMENTS);
}

LossGradientTuple loss_backward_meta(TORCHMARGIN_LOSS_BACKWARD_OP_PARAMETERS) {
  const auto rows = [&] { return at::empty_symint(other_lse.sym_sizes(), other_lse.options()); };
  return {rows(), rows(), rows()};
}

TORCH_LIBRARY_IMPL(torchmargin, CompositeExplicitAutograd, library) {
  library.impl("_margin_loss", loss_formula);
  library.impl("_margin_loss_backward", loss_gradients);
}

TORCH_LIBRARY_IMPL(torchmargin, Autograd, library) {
  library.impl("_margin_loss", loss_autograd);
  library.impl("_margin_loss_backward", loss_backward_autograd);
}

TORCH_LIBRARY_IMPL(torchmargin, Meta, library) {
  library.impl("_margin_loss_backward", loss_backward_meta);
}

} // namespace

CrossEntropyOptions make_cross_entropy_options(
    std::string_view op,
    double label_smoothing,
    int64_t ignore_index,
    std::string_view reduction,
    const std::optional<at::Tensor>& class_weight) {
  TORCH_CHECK(
      label_smoothing >= 0 && label_smoothing <= 1, op, ": expected label_smoothing in [0, 1], but got ",
      label_smoothing);
  return {label_smoothing, ignore_index, parse_reduction(op, reduction), defined(class_weight)};
}

at::Tensor cross_entropy(
    const at::Tensor& other_lse,
    const at::Tensor& target_logit,
    const at::Tensor& logit_sum,
    const at::Tensor& target,
    const c10::SymInt& classes,
    at::ScalarType acc,
    const CrossEntropyOptions& options) {
  std::optional<at::Tensor> mean_logit;
  if (options.label_smoothing > 0) {
    mean_logit = logit_sum.div(at::Scalar(classes));
  }
  const auto loss_of = [&](Reduction reduction, bool wide) {
    return call_loss(
        other_lse, target_logit, mean_logit, target, options.label_smoothing, options.ignore_index,
        static_cast<int64_t>(reduction), wide);
  };
  if (!options.class_weight.has_value()) {
    return loss_of(options.reduction, /*wide=*/acc == at::kDouble);
  }
  const at::Tensor losses = loss_of(Reduction::none, /*wide=*/true);
  return weighted_loss(losses, *options.class_weight, target, options.ignore_index, options.reduction).to(acc);
}

} // namespace torchmargin
