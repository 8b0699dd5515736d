// The arguments of the ops on given cosines in one struct, its gates, and what the private ops exchange. The linear
// ops' counterpart is problem.h.
#pragma once

#include <ATen/core/Tensor.h>

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

struct CosineProblem {
  at::Tensor cosine; // [B, C], floating
  at::Tensor target; // [B], int64
  Margins margins;

  at::ScalarType acc() const {
    return acc_dtype(cosine.scalar_type());
  }
};

// Checks every argument and packs them; errors name `op`.
CosineProblem make_cosine_problem(std::string_view op, TORCHMARGIN_COSINE_PARAMETERS);
CosineProblem make_cosine_problem(std::string_view op, TORCHMARGIN_PACKED_COSINE_PARAMETERS);
// Of arguments that have been checked, or will be.
CosineProblem unpack_cosine_problem(TORCHMARGIN_PACKED_COSINE_PARAMETERS);
std::vector<double> numbers_of(const CosineProblem& problem);

// The same for margin_transform: a cosine of any shape and no scale.
MarginParameters make_transform(std::string_view op, TORCHMARGIN_TRANSFORM_PARAMETERS);
MarginParameters make_transform(std::string_view op, const at::Tensor& cosine, at::ArrayRef<double> numbers);
MarginParameters unpack_margin(at::ArrayRef<double> numbers);
std::vector<double> numbers_of(const MarginParameters& margin);

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
void check_request(std::string_view op, const CosineProblem& problem, const CosineBackwardRequest& request);

// In the order of CosineBackwardRequest::wanted; what is not wanted is an empty [0] tensor.
using CosineGradients = std::array<at::Tensor, 3>;
using CosineTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The private ops, called through the dispatcher.
CosineResult
call_cosine_forward(const CosineProblem& problem, std::optional<int64_t> ignore_index, bool with_logit_sum);
CosineGradients call_cosine_backward(const CosineProblem& problem, const CosineBackwardRequest& request);
at::Tensor call_transform(const at::Tensor& cosine, at::ArrayRef<double> numbers);
at::Tensor call_transform_backward(const at::Tensor& grad, const at::Tensor& cosine, at::ArrayRef<double> numbers);

} // namespace torchmargin
