// Shapes and dtypes of the private linear ops, for fake tensors, torch.compile and
// export. Sizes may be symbolic.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "ops/problem.h"
#include "sweep/chunk_plan.h"

namespace torchmargin {
namespace {

ForwardTuple linear_margin_forward_meta(
    TORCHMARGIN_LINEAR_PARAMETERS,
    std::optional<int64_t> /*ignore_index*/,
    bool with_logit_sum,
    int64_t kept_classes) {
  const LinearProblem problem = make_linear_problem("_linear_margin_forward", TORCHMARGIN_LINEAR_ARGUMENTS);
  const auto options = input.options().dtype(problem.acc());
  const auto wide = input.options().dtype(at::kDouble);
  const c10::SymInt rows = input.sym_size(0);
  const c10::SymInt kept = kept_classes == 0 ? 0 : kept_columns(c10::SymInt(kept_classes), weight.sym_size(0));
  const auto vector = [&](c10::SymInt size, at::TensorOptions opts) {
    return at::empty_symint({std::move(size)}, opts);
  };
  return to_tuple(ForwardResult{
      vector(rows, wide), vector(rows, wide), vector(rows, wide), vector(rows, options), vector(rows, options),
      at::empty_symint({rows, kept}, options), vector(normalize_weight ? weight.sym_size(0) : c10::SymInt(0), options),
      vector(with_logit_sum ? input.sym_size(1) : c10::SymInt(0), wide)});
}

BackwardTuple gradients_meta(const LinearProblem& problem, const std::array<bool, 5>& wanted) {
  const std::array<std::optional<at::Tensor>, 5> sources{
      problem.input, problem.weight, problem.bias, problem.sample_m2, problem.sample_m3};
  Gradients gradients;
  for (size_t i = 0; i < sources.size(); ++i) {
    gradients[i] = wanted[i] && sources[i].has_value()
        ? at::empty_symint(sources[i]->sym_sizes(), sources[i]->options())
        : at::empty({0}, problem.input.options());
  }
  return to_tuple(gradients);
}

BackwardTuple linear_margin_backward_meta(TORCHMARGIN_LINEAR_BACKWARD_PARAMETERS) {
  return gradients_meta(make_linear_problem("_linear_margin_backward", TORCHMARGIN_LINEAR_ARGUMENTS), wanted);
}

std::tuple<at::Tensor, at::Tensor> margin_logits_forward_meta(TORCHMARGIN_LINEAR_PARAMETERS) {
  const LinearProblem problem = make_linear_problem("_margin_logits_forward", TORCHMARGIN_LINEAR_ARGUMENTS);
  const auto options = input.options().dtype(problem.acc());
  const c10::SymInt classes = weight.sym_size(0);
  return {
      at::empty_symint({input.sym_size(0), classes}, options),
      at::empty_symint({normalize_weight ? classes : c10::SymInt(0)}, options)};
}

BackwardTuple margin_logits_backward_meta(TORCHMARGIN_LOGITS_BACKWARD_PARAMETERS) {
  return gradients_meta(make_linear_problem("_margin_logits_backward", TORCHMARGIN_LINEAR_ARGUMENTS), wanted);
}

TORCH_LIBRARY_IMPL(torchmargin, Meta, library) {
  library.impl("_linear_margin_forward", linear_margin_forward_meta);
  library.impl("_linear_margin_backward", linear_margin_backward_meta);
  library.impl("_margin_logits_forward", margin_logits_forward_meta);
  library.impl("_margin_logits_backward", margin_logits_backward_meta);
}

} // namespace
} // namespace torchmargin
