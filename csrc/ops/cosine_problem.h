// The arguments of margin_cross_entropy, checked once and packed into one struct, and what
// its private ops exchange. The linear ops' counterpart is problem.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

#include "ops/checks.h"
#include "torchmargin/margin.h"

#define TORCHMARGIN_MARGIN_SCHEMA                                                               \
  "float m1=1.0, float m2=0.0, float m3=0.0, str extension=\"none\", float margin_weight=1.0, " \
  "str margin_gradient=\"exact\""
#define TORCHMARGIN_COSINE_SCHEMA                                                                \
  "Tensor cosine, Tensor target, *, float scale=1.0, float m1=1.0, float m2=0.0, float m3=0.0, " \
  "Tensor? sample_m2=None, Tensor? sample_m3=None, Tensor? sample_margin_weight=None, "          \
  "str extension=\"none\", float margin_weight=1.0, str margin_gradient=\"exact\""
#define TORCHMARGIN_COSINE_PARAMETERS                                                                         \
  const at::Tensor &cosine, const at::Tensor &target, double scale, double m1, double m2, double m3,          \
      const std::optional<at::Tensor>&sample_m2, const std::optional<at::Tensor>&sample_m3,                   \
      const std::optional<at::Tensor>&sample_margin_weight, std::string_view extension, double margin_weight, \
      std::string_view margin_gradient
#define TORCHMARGIN_COSINE_ARGUMENTS                                                                       \
  cosine, target, scale, m1, m2, m3, sample_m2, sample_m3, sample_margin_weight, extension, margin_weight, \
      margin_gradient
#define TORCHMARGIN_COSINE_BACKWARD_PARAMETERS                                                           \
  TORCHMARGIN_COSINE_PARAMETERS, const std::optional<at::Tensor>&grad_other_lse,                         \
      const std::optional<at::Tensor>&grad_target_logit, const std::optional<at::Tensor>&grad_logit_sum, \
      const at::Tensor &other_lse, std::array<bool, 3> wanted

#define TORCHMARGIN_MARGIN_PARAMETERS \
  double m1, double m2, double m3, std::string_view extension, double margin_weight, std::string_view margin_gradient
#define TORCHMARGIN_MARGIN_ARGUMENTS m1, m2, m3, extension, margin_weight, margin_gradient

namespace torchmargin {

struct CosineProblem {
  at::Tensor cosine; // [B, C], floating
  at::Tensor target; // [B], int64
  std::optional<at::Tensor> sample_m2; // [B], float64, acc or like cosine
  std::optional<at::Tensor> sample_m3; // [B], float64, acc or like cosine
  std::optional<at::Tensor> sample_margin_weight; // 0-dim or [B], floating, no gradient
  MarginParameters margin;

  at::ScalarType acc() const {
    return acc_dtype(cosine.scalar_type());
  }
};

// Checks every argument and packs them; errors name `op`.
CosineProblem make_cosine_problem(std::string_view op, TORCHMARGIN_COSINE_PARAMETERS);
// The same for margin_transform: a cosine of any shape and no scale.
MarginParameters check_transform(std::string_view op, const at::Tensor& cosine, TORCHMARGIN_MARGIN_PARAMETERS);

// [B] float64 each: linear_margin_lse's first three.
struct CosineResult {
  at::Tensor other_lse;
  at::Tensor target_logit;
  at::Tensor logit_sum; // 0 unless asked for
};

struct CosineBackwardRequest {
  // Undefined means zero. [B] each, any floating dtype.
  std::optional<at::Tensor> grad_other_lse;
  std::optional<at::Tensor> grad_target_logit;
  std::optional<at::Tensor> grad_logit_sum;
  at::Tensor other_lse; // as the forward returned it
  std::array<bool, 3> wanted{}; // cosine, sample_m2, sample_m3
};

// In the order of CosineBackwardRequest::wanted; what is not wanted is an empty [0] tensor.
using CosineGradients = std::array<at::Tensor, 3>;
using CosineTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The private ops, called through the dispatcher.
CosineResult
call_cosine_forward(const CosineProblem& problem, std::optional<int64_t> ignore_index, bool with_logit_sum);
CosineGradients call_cosine_backward(const CosineProblem& problem, const CosineBackwardRequest& request);
at::Tensor call_transform(const at::Tensor& cosine, const MarginParameters& margin);
at::Tensor call_transform_backward(const at::Tensor& grad, const at::Tensor& cosine, const MarginParameters& margin);

} // namespace torchmargin
