// The arguments of the linear ops, checked once and packed into one struct. Every
// path (public op, autograd, Meta, CPU, CUDA) passes this gate before any work.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

#include "ops/checks.h"
#include "torchmargin/margin.h"

// The arguments that all linear ops share, as the schema, as C++ parameters and as
// a call's arguments. They are written down here and nowhere else.
#define TORCHMARGIN_LINEAR_OPTIONS_SCHEMA                                                      \
  "Tensor? bias=None, *, float scale=1.0, "                                                    \
  "float m1=1.0, float m2=0.0, float m3=0.0, Tensor? sample_m2=None, Tensor? sample_m3=None, " \
  "Tensor? sample_margin_weight=None, str extension=\"none\", float margin_weight=1.0, "       \
  "str margin_gradient=\"exact\", bool normalize_input=True, bool normalize_weight=True, "     \
  "ScalarType? compute_dtype=None"
#define TORCHMARGIN_LINEAR_SCHEMA "Tensor input, Tensor weight, Tensor target, " TORCHMARGIN_LINEAR_OPTIONS_SCHEMA
#define TORCHMARGIN_LINEAR_OPTION_PARAMETERS                                                                  \
  const std::optional<at::Tensor>&bias, double scale, double m1, double m2, double m3,                        \
      const std::optional<at::Tensor>&sample_m2, const std::optional<at::Tensor>&sample_m3,                   \
      const std::optional<at::Tensor>&sample_margin_weight, std::string_view extension, double margin_weight, \
      std::string_view margin_gradient, bool normalize_input, bool normalize_weight,                          \
      std::optional<at::ScalarType> compute_dtype
#define TORCHMARGIN_LINEAR_PARAMETERS \
  const at::Tensor &input, const at::Tensor &weight, const at::Tensor &target, TORCHMARGIN_LINEAR_OPTION_PARAMETERS
#define TORCHMARGIN_LINEAR_ARGUMENTS                                                                     \
  input, weight, target, bias, scale, m1, m2, m3, sample_m2, sample_m3, sample_margin_weight, extension, \
      margin_weight, margin_gradient, normalize_input, normalize_weight, compute_dtype

// What the losses take beyond them.
#define TORCHMARGIN_LOSS_SCHEMA ", float label_smoothing=0.0, int ignore_index=-100, str reduction=\"mean\""
#define TORCHMARGIN_LOSS_PARAMETERS \
  TORCHMARGIN_LINEAR_PARAMETERS, double label_smoothing, int64_t ignore_index, std::string_view reduction
#define TORCHMARGIN_LOSS_ARGUMENTS TORCHMARGIN_LINEAR_ARGUMENTS, label_smoothing, ignore_index, reduction

// What the private backward op takes beyond them.
#define TORCHMARGIN_LINEAR_BACKWARD_PARAMETERS                                                                       \
  TORCHMARGIN_LINEAR_PARAMETERS, [[maybe_unused]] const std::optional<at::Tensor>&grad_other_lse,                    \
      [[maybe_unused]] const std::optional<at::Tensor>&grad_target_logit,                                            \
      [[maybe_unused]] const std::optional<at::Tensor>&grad_logit_sum, [[maybe_unused]] const at::Tensor &other_lse, \
      [[maybe_unused]] const at::Tensor &kept, [[maybe_unused]] const at::Tensor &inverse_norms,                     \
      [[maybe_unused]] const at::Tensor &weight_sum, std::array<bool, 5> wanted
#define TORCHMARGIN_LOGITS_BACKWARD_PARAMETERS                                   \
  TORCHMARGIN_LINEAR_PARAMETERS, [[maybe_unused]] const at::Tensor &grad_logits, \
      [[maybe_unused]] const at::Tensor &inverse_norms, std::array<bool, 5> wanted

namespace torchmargin {

struct LinearProblem {
  at::Tensor input; // [B, D], floating
  at::Tensor weight; // [C, D], like input
  at::Tensor target; // [B], int64
  std::optional<at::Tensor> bias; // [C], like input
  std::optional<at::Tensor> sample_m2; // [B], float64, acc or like input
  std::optional<at::Tensor> sample_m3; // [B], float64, acc or like input
  std::optional<at::Tensor> sample_margin_weight; // 0-dim or [B], floating, no gradient
  MarginParameters margin;
  bool normalize_input = true;
  bool normalize_weight = true;
  std::optional<at::ScalarType> compute_dtype;

  // The dtype of sums, logits and losses.
  at::ScalarType acc() const;
};

// Checks every argument and packs them; errors name `op`.
LinearProblem make_linear_problem(std::string_view op, TORCHMARGIN_LINEAR_PARAMETERS);

// What the private forward op adds to the problem.
struct ForwardRequest {
  // None: a target outside [0, C) is absent from this weight. A value: such a target is
  // an error unless it is this one.
  std::optional<int64_t> ignore_index;
  bool with_logit_sum = true; // false: logit_sum is not needed and returned as 0
  int64_t kept_classes = 0; // leading classes whose products are kept for the backward
};

struct ForwardResult {
  // [B] float64: rounded, other_lse would be wrong in every softmax weight of its row.
  at::Tensor other_lse;
  at::Tensor target_logit;
  at::Tensor logit_sum;
  at::Tensor target_angle; // [B] acc
  at::Tensor max_other_logit; // [B]
  at::Tensor kept; // [B, kept_classes] acc: raw products, chunk after chunk
  at::Tensor inverse_norms; // [C] acc, or [0] if weights are taken as they are
  at::Tensor weight_sum; // [D] float64 sum of the weights' rows, or [0] without logit_sum
};

struct BackwardRequest {
  // Undefined means zero. [B] each, any floating dtype.
  std::optional<at::Tensor> grad_other_lse;
  std::optional<at::Tensor> grad_target_logit;
  std::optional<at::Tensor> grad_logit_sum;
  at::Tensor other_lse, kept, inverse_norms, weight_sum; // as the forward returned them
  std::array<bool, 5> wanted{}; // input, weight, bias, sample_m2, sample_m3
};

// Gradients in the order of BackwardRequest::wanted; what is not wanted is an empty [0] tensor.
using Gradients = std::array<at::Tensor, 5>;

// margin_logits' private ops.
struct LogitsResult {
  at::Tensor logits; // [B, C] acc
  at::Tensor inverse_norms; // as ForwardResult has them
};

struct LogitsBackwardRequest {
  at::Tensor grad_logits; // [B, C] acc
  at::Tensor inverse_norms; // as the forward returned them
  std::array<bool, 5> wanted{}; // as BackwardRequest::wanted
};

// What the operators return to the dispatcher.
using ForwardTuple =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using BackwardTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
ForwardTuple to_tuple(const ForwardResult& result);
BackwardTuple to_tuple(const Gradients& gradients);

// The private ops, called through the dispatcher.
ForwardResult call_linear_forward(const LinearProblem& problem, const ForwardRequest& request);
Gradients call_linear_backward(const LinearProblem& problem, const BackwardRequest& request);
LogitsResult call_logits_forward(const LinearProblem& problem);
Gradients call_logits_backward(const LinearProblem& problem, const LogitsBackwardRequest& request);

} // namespace torchmargin
