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

#include "math/one_against_all.h"
#include "ops/arguments.h"
#include "ops/checks.h"
#include "ops/margins.h"

namespace torchmargin {

constexpr int64_t kMostCenters = 255; // which of them wins is a byte
constexpr int64_t kRowStateSize = 5; // numbers in a row of row_state

struct LinearProblem {
  at::Tensor input; // [B, D], floating
  at::Tensor weight; // [C K, D], like input: class j has the rows j K ... j K + K - 1
  at::Tensor target; // [B], int64
  std::optional<at::Tensor> bias; // [C], like input
  Margins margins;
  bool normalize_input = true;
  bool normalize_weight = true;
  std::optional<at::ScalarType> compute_dtype;
  int64_t sub_centers = 1; // K: a class's cosine is the largest of its centers'
  // Another class with a cosine c > hard_threshold gets a c^2 + b c + d in its place.
  std::optional<at::Tensor> hard_threshold; // [B] or 0-dim, float64 or acc; none: the row's own, see HardRowsArgs
  std::optional<at::Tensor> hard_coefficients; // [3] or [B, 3]: a, b, d, float64 or acc; none: nothing is hard
  int64_t hardest = 0; // so many other classes of each row, the largest, are returned and left out of other_lse
  // One against all: other_lse is the sum of log(1 + exp(z)) of the other classes, logit_sum that of its slopes (to the
  // bias), z = scale N(c) + bias; bias is 0-dim.
  BinaryForm binary = {};

  // C.
  c10::SymInt classes() const {
    return sub_centers == 1 ? weight.sym_size(0) : weight.sym_size(0) / sub_centers;
  }
  bool one_against_all() const {
    return binary.kind != BinaryKind::none;
  }
  // Is every logit of another class a product of its own, and nothing else?
  bool plain() const {
    return sub_centers == 1 && hardest == 0 && !hard_coefficients.has_value() && !one_against_all();
  }

  // The dtype of sums, logits and losses.
  at::ScalarType acc() const {
    return acc_dtype(input.scalar_type());
  }
};

// Checks every argument and packs them; errors name `op`.
LinearProblem make_linear_problem(std::string_view op, TORCHMARGIN_LINEAR_PARAMETERS, int64_t hardest = 0);
LinearProblem make_linear_problem(std::string_view op, TORCHMARGIN_PACKED_LINEAR_PARAMETERS);
void check_problem(std::string_view op, const LinearProblem& problem);
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
  // [B, 5] float64 as a forward returned it, of the weight that holds the targets; none: made of this one.
  std::optional<at::Tensor> row_state = std::nullopt;
};

// The size of its weight_sum.
c10::SymInt weight_sum_size(const LinearProblem& problem, bool with_logit_sum);

// What a backward needs of its forward beside other_lse.
struct ForwardRecord {
  at::Tensor kept; // [B, kept_classes] acc: raw products, chunk after chunk; with sub-centers the largest cosines
  at::Tensor winners; // like kept, uint8: which center has the largest; [B, 0] without sub-centers
  at::Tensor inverse_norms; // [C K] acc, or [0] if weights are taken as they are
  // [D] float64 sum of the weights' rows, or [0] without logit_sum or with sub-centers. One against all: [B],
  // logit_sum.
  at::Tensor weight_sum;
  at::Tensor row_state; // [B, 5] float64: see RowState in sweep/kernels.h
  at::Tensor weight_scale; // [1] float64: the power of two in the operands of weights that are not normalised, or [0]
};

struct ForwardResult {
  // [B] float64: rounded, other_lse would be wrong in every softmax weight of its row.
  at::Tensor other_lse;
  at::Tensor target_logit;
  at::Tensor logit_sum;
  at::Tensor hardest_logit; // [B, hardest] float64, -inf where there is no class
  at::Tensor target_angle; // [B] acc
  at::Tensor max_other_logit; // [B]
  at::Tensor hardest_class; // [B, hardest] int64, -1 where there is none
  ForwardRecord record;
};

struct BackwardRequest {
  // Undefined means zero. [B] each, any floating dtype.
  std::optional<at::Tensor> grad_other_lse;
  std::optional<at::Tensor> grad_target_logit;
  std::optional<at::Tensor> grad_logit_sum;
  std::optional<at::Tensor> grad_hardest_logit; // [B, hardest]
  at::Tensor other_lse; // as the forward returned it
  at::Tensor hardest_class; // as well
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
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor>;
// other_lse, target_logit, logit_sum (float64, differentiable), target_angle, max_other_logit, the target's logit
// without its margin (acc), and the hardest classes' logits (float64, differentiable) and indices.
using PartialsTuple =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using BackwardTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using LogitsTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
// target_angle [B] float64, row_state.
using TargetTuple = std::tuple<at::Tensor, at::Tensor>;
ForwardTuple to_tuple(const ForwardResult& result);
BackwardTuple to_tuple(const Gradients& gradients);
LogitsTuple to_tuple(const LogitsResult& result);

// The private ops, called through the dispatcher.
ForwardResult call_linear_forward(const LinearProblem& problem, const ForwardRequest& request);
Gradients call_linear_backward(const LinearProblem& problem, const BackwardRequest& request);
LogitsResult call_logits_forward(const LinearProblem& problem);
// Each row's angle to its own class, [B] float64, 0 where it is absent, and row_state.
TargetTuple call_target_rows(const LinearProblem& problem);
Gradients call_logits_backward(const LinearProblem& problem, const LogitsBackwardRequest& request);

} // namespace torchmargin
