// The loss from given cosines, and the logits of the linear ops: composite, as the linear loss
// is (ops/linear.cpp). margin_transform is an op of its own.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "ops/cosine_problem.h"
#include "ops/cross_entropy.h"
#include "ops/problem.h"

namespace torchmargin {
namespace {

at::Tensor margin_cross_entropy(
    TORCHMARGIN_COSINE_PARAMETERS,
    double label_smoothing,
    int64_t ignore_index,
    std::string_view reduction) {
  constexpr std::string_view op = "margin_cross_entropy";
  const CosineProblem problem = make_cosine_problem(op, TORCHMARGIN_COSINE_ARGUMENTS);
  const CrossEntropyOptions options = make_cross_entropy_options(op, label_smoothing, ignore_index, reduction);
  const CosineResult result = call_cosine_forward(problem, ignore_index, /*with_logit_sum=*/label_smoothing > 0);
  return cross_entropy(
             result.other_lse, result.target_logit, result.logit_sum, target, cosine.sym_size(1), problem.acc(),
             options)
      .loss;
}

at::Tensor margin_logits(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& given_target,
    TORCHMARGIN_LINEAR_OPTION_PARAMETERS) {
  check_given("margin_logits", "input", input);
  const at::Tensor target = given_target.has_value() && given_target->defined()
      ? *given_target
      : at::full_symint({input.dim() > 0 ? input.sym_size(0) : 0}, -1, input.options().dtype(at::kLong));
  return call_logits_forward(make_linear_problem("margin_logits", TORCHMARGIN_LINEAR_ARGUMENTS)).logits;
}

TORCH_LIBRARY_IMPL(torchmargin, CompositeImplicitAutograd, library) {
  library.impl("margin_cross_entropy", margin_cross_entropy);
  library.impl("margin_logits", margin_logits);
}

} // namespace
} // namespace torchmargin
