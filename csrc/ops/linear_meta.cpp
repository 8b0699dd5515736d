// Shapes and dtypes of the private linear ops, for fake tensors, torch.compile and
// export. Sizes may be symbolic.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "ops/problem.h"
#include "plan/chunk_plan.h"

namespace torchmargin {
namespace {

ForwardTuple linear_margin_forward_meta(TORCHMARGIN_PACKED_LINEAR_PARAMETERS, TORCHMARGIN_FORWARD_REQUEST_PARAMETERS) {
  constexpr std::string_view op = "_linear_margin_forward";
  const LinearProblem problem = make_linear_problem(op, TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
  check_request(op, problem, ForwardRequest{TORCHMARGIN_FORWARD_REQUEST_ARGUMENTS});
  const auto options = input.options().dtype(problem.acc());
  const auto wide = input.options().dtype(at::kDouble);
  const c10::SymInt rows = input.sym_size(0);
  const c10::SymInt kept = kept_classes == 0 ? 0 : kept_columns(c10::SymInt(kept_classes), problem.classes());
  const auto matrix = [&](c10::SymInt columns, at::TensorOptions opts) {
    return at::empty_symint({rows, std::move(columns)}, opts);
  };
  const auto vector = [&](c10::SymInt size, at::TensorOptions opts) {
    return at::empty_symint({std::move(size)}, opts);
  };
  return to_tuple(ForwardResult{
      vector(rows, wide), vector(rows, wide), vector(rows, wide), matrix(problem.hardest, wide), vector(rows, options),
      vector(rows, options), matrix(problem.hardest, options.dtype(at::kLong)),
      ForwardRecord{
          .kept = matrix(kept, options),
          .winners = matrix(problem.sub_centers == 1 ? c10::SymInt(0) : kept, options.dtype(at::kByte)),
          .inverse_norms = vector(problem.normalize_weight ? weight.sym_size(0) : c10::SymInt(0), options),
          .weight_sum = vector(weight_sum_size(problem, with_logit_sum), wide),
          .row_state = matrix(kRowStateSize, wide),
          .weight_scale = vector(problem.normalize_weight ? 0 : 1, wide)}});
}

BackwardTuple gradients_meta(const LinearProblem& problem, const std::array<bool, 5>& wanted) {
  const std::array<std::optional<at::Tensor>, 5> sources{
      problem.input, problem.weight, problem.bias, problem.margins.sample_m2, problem.margins.sample_m3};
  Gradients gradients;
  for (size_t i = 0; i < sources.size(); ++i) {
    gradients[i] = wanted[i] && sources[i].has_value()
        ? at::empty_symint(sources[i]->sym_sizes(), sources[i]->options())
        : at::empty({0}, problem.input.options());
  }
  return to_tuple(gradients);
}

BackwardTuple linear_margin_backward_meta(
    TORCHMARGIN_PACKED_LINEAR_PARAMETERS,
    TORCHMARGIN_BACKWARD_REQUEST_PARAMETERS) {
  constexpr std::string_view op = "_linear_margin_backward";
  const LinearProblem problem = make_linear_problem(op, TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
  check_request(op, problem, BackwardRequest{TORCHMARGIN_BACKWARD_REQUEST_ARGUMENTS});
  return gradients_meta(problem, wanted);
}

TargetTuple linear_target_rows_meta(TORCHMARGIN_PACKED_LINEAR_PARAMETERS) {
  make_linear_problem("_linear_target_rows", TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
  const auto wide = input.options().dtype(at::kDouble);
  return {at::empty_symint({input.sym_size(0)}, wide), at::empty_symint({input.sym_size(0), kRowStateSize}, wide)};
}

LogitsTuple margin_logits_forward_meta(TORCHMARGIN_PACKED_LINEAR_PARAMETERS) {
  const LinearProblem problem = make_linear_problem("_margin_logits_forward", TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
  const auto options = input.options().dtype(problem.acc());
  const c10::SymInt classes = weight.sym_size(0);
  return {
      at::empty_symint({input.sym_size(0), classes}, options),
      at::empty_symint({problem.normalize_weight ? classes : c10::SymInt(0)}, options),
      at::empty_symint({input.sym_size(0), kRowStateSize}, options.dtype(at::kDouble))};
}

BackwardTuple margin_logits_backward_meta(
    TORCHMARGIN_PACKED_LINEAR_PARAMETERS,
    TORCHMARGIN_LOGITS_BACKWARD_REQUEST_PARAMETERS) {
  constexpr std::string_view op = "_margin_logits_backward";
  const LinearProblem problem = make_linear_problem(op, TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
  check_request(op, problem, LogitsBackwardRequest{TORCHMARGIN_LOGITS_BACKWARD_REQUEST_ARGUMENTS});
  return gradients_meta(problem, wanted);
}

TORCH_LIBRARY_IMPL(torchmargin, Meta, library) {
  library.impl("_linear_margin_forward", linear_margin_forward_meta);
  library.impl("_linear_margin_backward", linear_margin_backward_meta);
  library.impl("_linear_target_rows", linear_target_rows_meta);
  library.impl("_margin_logits_forward", margin_logits_forward_meta);
  library.impl("_margin_logits_backward", margin_logits_backward_meta);
}

} // namespace
} // namespace torchmargin
