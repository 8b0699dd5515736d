// One against all, from the sums of the sweep: what the op of one process and the one over ranks share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>

#include "ops/arguments.h"
#include "ops/problem.h"

namespace torchmargin {

// Checks every argument and packs those of the sweep; errors name `op`.
LinearProblem make_binary_problem(std::string_view op, TORCHMARGIN_BINARY_PARAMETERS);

struct BinaryLossOptions {
  double positive_weight;
  double negative_weight;
  int64_t ignore_index;
};

// The loss of each row, [B] float64, from other_sum and target_logit, [B] float64; 0 where the row is ignored.
at::Tensor binary_losses(
    const at::Tensor& other_sum,
    const at::Tensor& target_logit,
    const at::Tensor& target,
    const c10::SymInt& classes,
    const BinaryLossOptions& options);

} // namespace torchmargin
