// The arguments of the linear ops in one struct, and the only gates to it: of a public op's arguments, and of a
// private op's, which any caller may call too. Autograd between them unpacks and does not check again.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "ops/arguments.h"
#include "ops/checks.h"
#include "ops/margins.h"

namespace torchmargin {

constexpr int64_t kRowStateSize = 4; // numbers in a row of row_state

struct LinearProblem {
  at::Tensor input; // [B, D], floating
  at::Tensor weight; // [C, D], like input
  at::Tensor target; // [B], int64
  std::optional<at::Tensor> bias; // [C], like input
  Margins margins;
  bool normalize_input = true;
  bool normalize_weight = true;
  std::optional<at::ScalarType> compute_dtype;

  // The dtype of sums, logits and losses.
  at::ScalarType acc() const {
    return acc_dtype(input.scalar_type());
  }
};

// Checks every argument and packs them; errors name `op`.
LinearProblem make_linear_problem(std::string_view op, TORCHMARGIN_LINEAR_PARAMETERS);
LinearProblem make_linear_problem(std::string_view op, TORCHMARGIN_PACKED_LINEAR_PARAMETERS);
// linear_margin_lse takes a weight without classes (a shard that holds none); what makes losses or logits does not.
void refuse_no_classes(std::string_view op, const LinearProblem& problem);
// Of arguments that have been checked, or will be.
LinearProblem unpack_linear_problem(TORCHMARGIN_PACKED_LINEAR_PARAMETERS);
std::vector<double> numbers_of(const LinearProblem& problem);

// What the private forward op adds to the problem.
struct ForwardRequest {
  // None: a target outside [0, C) is absent from this weight. A value: such a target is
  // an error unless it is this one.
  std::optional<int64_t> ignore_index;
  bool with_logit_sum = true; // false: logit_sum is not needed and returned as 0
  int64_t kept_classes = 0; // leading classes whose products are kept for the backward
  // [B, 4] float64 as a forward returned it, of the weight that holds the targets; none: made of this one.
  std::optional<at::Tensor> row_state = std::nullopt;
};

// What a backward needs of its forward beside other_lse.
struct ForwardRecord {
  at::Tensor kept; // [B, kept_classes] acc: raw products, chunk after chunk
  at::Tensor inverse_norms; // [C] acc, or [0] if weights are taken as they are
  at::Tensor weight_sum; // [D] float64 sum of the weights' rows, or [0] without logit_sum
  at::Tensor row_state; // [B, 4] float64: see RowState in sweep/kernels.h
  at::Tensor weight_scale; // [1] float64: the power of two in the operands of weights that are not normalised, or [0]
};

struct ForwardResult {
  // [B] float64: rounded, other_lse would be wrong in every softmax weight of its row.
  at::Tensor other_lse;
  at::Tensor target_logit;
  at::Tensor logit_sum;
  at::Tensor target_angle; // [B] acc
  at::Tensor max_other_logit; // [B]
  ForwardRecord record;
};

struct BackwardRequest {
  // Undefined means zero. [B] each, any floating dtype.
  std::optional<at::Tensor> grad_other_lse;
  std::optional<at::Tensor> grad_target_logit;
  std::optional<at::Tensor> grad_logit_sum;
  at::Tensor other_lse; // as the forward returned it
  ForwardRecord record;
  std::array<bool, 5> wanted{}; // input, weight, bias, sample_m2, sample_m3
};

// Gradients in the order of BackwardRequest::wanted; what is not wanted is an empty [0] tensor.
using Gradients = std::array<at::Tensor, 5>;

// margin_logits' private ops.
struct LogitsResult {
  at::Tensor logits; // [B, C] acc
  at::Tensor inverse_norms; // as ForwardRecord has them
  at::Tensor row_state;
};

struct LogitsBackwardRequest {
  at::Tensor grad_logits; // [B, C] acc
  at::Tensor inverse_norms; // as the forward returned them
  at::Tensor row_state;
  std::array<bool, 5> wanted{}; // as BackwardRequest::wanted
};

// The gates of what the private ops are given beside the problem.
void check_request(std::string_view op, const LinearProblem& problem, const ForwardRequest& request);
void check_request(std::string_view op, const LinearProblem& problem, const BackwardRequest& request);
void check_request(std::string_view op, const LinearProblem& problem, const LogitsBackwardRequest& request);

// What the operators return to the dispatcher.
using ForwardTuple = std::tuple<
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor>;
// other_lse, target_logit, logit_sum (float64, differentiable), target_angle, max_other_logit, and the target's logit
// without its margin (acc).
using PartialsTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using BackwardTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using LogitsTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
ForwardTuple to_tuple(const ForwardResult& result);
BackwardTuple to_tuple(const Gradients& gradients);
LogitsTuple to_tuple(const LogitsResult& result);

// The private ops, called through the dispatcher.
ForwardResult call_linear_forward(const LinearProblem& problem, const ForwardRequest& request);
Gradients call_linear_backward(const LinearProblem& problem, const BackwardRequest& request);
LogitsResult call_logits_forward(const LinearProblem& problem);
Gradients call_logits_backward(const LinearProblem& problem, const LogitsBackwardRequest& request);

} // namespace torchmargin
