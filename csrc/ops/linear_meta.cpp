// Shapes and dtypes of the private linear ops, for fake tensors, torch.compile and
// export. Sizes may be symbolic.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "ops/problem.h"

namespace torchmargin {
namespace {

ForwardTuple linear_margin_forward_meta(
    TORCHMARGIN_LINEAR_PARAMETERS,
    std::optional<int64_t> /*ignore_index*/,
    bool with_logit_sum,
    int64_t kept_classes) {
  const LinearProblem problem = make_linear_problem("_linear_margin_forward", TORCHMARGIN_LINEAR_ARGUMENTS);
  const auto options = input.options().dtype(problem.acc());
  const c10::SymInt rows = input.sym_size(0);
  const auto vector = [&](c10::SymInt size, at::TensorOptions opts) {
    return at::empty_symint({std::move(size)}, opts);
  };
  return to_tuple(ForwardResult{
      vector(rows, options), vector(rows, options), vector(rows, options), vector(rows, options), vector(rows, options),
      at::empty_symint({rows, c10::SymInt(kept_classes)}, options),
      vector(normalize_weight ? weight.sym_size(0) : c10::SymInt(0), options),
      vector(with_logit_sum ? input.sym_size(1) : c10::SymInt(0), input.options().dtype(at::kDouble))});
}

BackwardTuple linear_margin_backward_meta(TORCHMARGIN_LINEAR_BACKWARD_PARAMETERS) {
  const LinearProblem problem = make_linear_problem("_linear_margin_backward", TORCHMARGIN_LINEAR_ARGUMENTS);
  const std::array<std::optional<at::Tensor>, 5> sources{
      problem.input, problem.weight, problem.bias, problem.sample_m2, problem.sample_m3};
  Gradients gradients;
  for (size_t i = 0; i < sources.size(); ++i) {
    gradients[i] = wanted[i] && sources[i].has_value()
        ? at::empty_symint(sources[i]->sym_sizes(), sources[i]->options())
        : at::empty({0}, input.options());
  }
  return to_tuple(gradients);
}

TORCH_LIBRARY_IMPL(torchmargin, Meta, library) {
  library.impl("_linear_margin_forward", linear_margin_forward_meta);
  library.impl("_linear_margin_backward", linear_margin_backward_meta);
}

} // namespace
} // namespace torchmargin
