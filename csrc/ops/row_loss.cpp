// _margin_row_loss: from the core's results the loss of each row, [B] float64.
//
//   loss = softplus(o - t) + eps (t - Z / C)        0 where the row is ignored
//   to o: g p      to t: g (eps - p)      to Z / C: -g eps          p = sigmoid(o - t)
//
// It is an op with a backward of its own because of rows that count for nothing: autograd's would make 0 * NaN of a
// row that holds NaN and has no upstream gradient (a masked loss), and every row of grad_weight would hold it.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "ops/cross_entropy.h"
#include "ops/differentiable.h"
#include "ops/find_op.h"

// The arguments of both ops, as C++ parameters and as a call's arguments.
#define TORCHMARGIN_ROW_LOSS_PARAMETERS                                                                    \
  const at::Tensor &other_lse, const at::Tensor &target_logit, const std::optional<at::Tensor>&mean_logit, \
      const at::Tensor &target, double label_smoothing, int64_t ignore_index
#define TORCHMARGIN_ROW_LOSS_ARGUMENTS other_lse, target_logit, mean_logit, target, label_smoothing, ignore_index
#define TORCHMARGIN_ROW_LOSS_BACKWARD_PARAMETERS                                                  \
  [[maybe_unused]] const at::Tensor &grad, const at::Tensor &other_lse,                           \
      [[maybe_unused]] const at::Tensor &target_logit, [[maybe_unused]] const at::Tensor &target, \
      [[maybe_unused]] double label_smoothing, [[maybe_unused]] int64_t ignore_index
#define TORCHMARGIN_ROW_LOSS_BACKWARD_ARGUMENTS grad, other_lse, target_logit, target, label_smoothing, ignore_index

namespace torchmargin {
namespace {

at::Tensor zero_like(const at::Tensor& tensor) {
  return at::zeros({}, tensor.options().requires_grad(false));
}

// Differentiable in every mode, and what the op is made of.
at::Tensor row_loss_formula(TORCHMARGIN_ROW_LOSS_PARAMETERS) {
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
  return at::where(valid, loss, zero);
}

using GradientTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The gradients of o, t and Z / C, in ATen: their own derivatives are autograd's.
GradientTuple row_loss_gradients(TORCHMARGIN_ROW_LOSS_BACKWARD_PARAMETERS) {
  const at::Tensor zero = zero_like(other_lse);
  const at::Tensor g = at::where(target.ne(ignore_index), grad, zero);
  const at::Tensor gap = other_lse - target_logit;
  // NB: only where p would be NaN. To g it has a derivative, also where g is 0.
  const at::Tensor unused = g.eq(0).logical_and(gap.isnan());
  const at::Tensor p = at::sigmoid(at::where(unused, zero, gap));
  // eps - p, and for a p near 1 the same without its cancellation.
  const at::Tensor rest = at::sigmoid(at::where(unused, zero, -gap));
  const at::Tensor slope = at::where(p < 0.5, label_smoothing - p, rest - (1.0 - label_smoothing));
  return {g * p, g * slope, g * -label_smoothing};
}

// NB: an op, for compiled autograd runs a node's function on gradients of unknown length.
GradientTuple call_row_loss_backward(TORCHMARGIN_ROW_LOSS_BACKWARD_PARAMETERS) {
  static const auto op =
      find_op<GradientTuple(TORCHMARGIN_ROW_LOSS_BACKWARD_PARAMETERS)>("torchmargin::_margin_row_loss_backward");
  return op.call(TORCHMARGIN_ROW_LOSS_BACKWARD_ARGUMENTS);
}

at::Tensor row_loss_autograd(TORCHMARGIN_ROW_LOSS_PARAMETERS) {
  const auto backward = [label_smoothing, ignore_index](
                            const Tensors& grads, const Tensors& saved, const std::vector<bool>&) {
    auto [other, own, mean] =
        call_row_loss_backward(grads[0], saved[0], saved[1], saved[3], label_smoothing, ignore_index);
    return Tensors{other, own, mean};
  };
  return differentiable_forward(
      "MarginRowLossBackward",
      {{other_lse, target_logit, mean_logit}, {target}, {label_smoothing, static_cast<double>(ignore_index)}},
      /*outputs=*/1, /*keep=*/{}, [&] { return Tensors{call_row_loss(TORCHMARGIN_ROW_LOSS_ARGUMENTS)}; },
      [&] { return Tensors{row_loss_formula(TORCHMARGIN_ROW_LOSS_ARGUMENTS)}; }, backward)[0];
}

GradientTuple row_loss_backward_autograd(TORCHMARGIN_ROW_LOSS_BACKWARD_PARAMETERS) {
  const OptionalTensors inputs{grad, other_lse, target_logit};
  if (any_has_tangent(inputs) || any_requires_grad(inputs)) {
    return row_loss_gradients(TORCHMARGIN_ROW_LOSS_BACKWARD_ARGUMENTS);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_row_loss_backward(TORCHMARGIN_ROW_LOSS_BACKWARD_ARGUMENTS);
}

GradientTuple row_loss_backward_meta(TORCHMARGIN_ROW_LOSS_BACKWARD_PARAMETERS) {
  const auto rows = [&] { return at::empty_symint(other_lse.sym_sizes(), other_lse.options()); };
  return {rows(), rows(), rows()};
}

TORCH_LIBRARY_IMPL(torchmargin, CompositeExplicitAutograd, library) {
  library.impl("_margin_row_loss", row_loss_formula);
  library.impl("_margin_row_loss_backward", row_loss_gradients);
}

TORCH_LIBRARY_IMPL(torchmargin, Autograd, library) {
  library.impl("_margin_row_loss", row_loss_autograd);
  library.impl("_margin_row_loss_backward", row_loss_backward_autograd);
}

TORCH_LIBRARY_IMPL(torchmargin, Meta, library) {
  library.impl("_margin_row_loss_backward", row_loss_backward_meta);
}

} // namespace

at::Tensor call_row_loss(TORCHMARGIN_ROW_LOSS_PARAMETERS) {
  static const auto op = find_op<at::Tensor(TORCHMARGIN_ROW_LOSS_PARAMETERS)>("torchmargin::_margin_row_loss");
  return op.call(TORCHMARGIN_ROW_LOSS_ARGUMENTS);
}

} // namespace torchmargin
