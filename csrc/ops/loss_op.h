// The arguments of the private loss op and of its backward (cross_entropy.cpp).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <optional>
#include <tuple>

// other_lse, target_logit: [B] float64. mean_logit: Z / C [B] float64, where there is smoothing. target: [B] int64.
// reduction: 0 none, 1 mean, 2 sum. wide: the loss is float64, else float32.
// NB: no ScalarType: AOTInductor hands its own numbers for them to ops.
#define TORCHMARGIN_LOSS_OP_SCHEMA                                                                        \
  "Tensor other_lse, Tensor target_logit, Tensor? mean_logit, Tensor target, float label_smoothing, int " \
  "ignore_index, "                                                                                        \
  "int reduction, bool wide"
#define TORCHMARGIN_LOSS_OP_PARAMETERS                                                                     \
  const at::Tensor &other_lse, const at::Tensor &target_logit, const std::optional<at::Tensor>&mean_logit, \
      const at::Tensor &target, double label_smoothing, int64_t ignore_index, int64_t reduction, bool wide
#define TORCHMARGIN_LOSS_OP_ARGUMENTS \
  other_lse, target_logit, mean_logit, target, label_smoothing, ignore_index, reduction, wide
// grad: like the loss.
#define TORCHMARGIN_LOSS_BACKWARD_OP_SCHEMA                                                                      \
  "Tensor grad, Tensor other_lse, Tensor target_logit, Tensor target, float label_smoothing, int ignore_index, " \
  "int reduction"
#define TORCHMARGIN_LOSS_BACKWARD_OP_PARAMETERS                                                   \
  [[maybe_unused]] const at::Tensor &grad, const at::Tensor &other_lse,                           \
      [[maybe_unused]] const at::Tensor &target_logit, [[maybe_unused]] const at::Tensor &target, \
      [[maybe_unused]] double label_smoothing, [[maybe_unused]] int64_t ignore_index,             \
      [[maybe_unused]] int64_t reduction
#define TORCHMARGIN_LOSS_BACKWARD_OP_ARGUMENTS \
  grad, other_lse, target_logit, target, label_smoothing, ignore_index, reduction

namespace torchmargin {

using LossGradientTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor>; // of other_lse, target_logit, mean_logit

} // namespace torchmargin
