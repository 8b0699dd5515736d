// The public ops on given cosines: composite, as the linear ones are (linear.cpp).
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "ops/class_weight.h"
#include "ops/cosine_problem.h"
#include "ops/cross_entropy.h"

namespace torchmargin {
namespace {

at::Tensor margin_cross_entropy(TORCHMARGIN_COSINE_PARAMETERS, TORCHMARGIN_LOSS_PARAMETERS) {
  constexpr std::string_view op = "margin_cross_entropy";
  const CosineProblem problem = make_cosine_problem(op, TORCHMARGIN_COSINE_ARGUMENTS);
  const CrossEntropyOptions options = make_cross_entropy_options(op, TORCHMARGIN_LOSS_ARGUMENTS);
  check_class_weight(op, class_weight, cosine, cosine.sym_size(1), label_smoothing);
  const CosineResult result = call_cosine_forward(problem, ignore_index, /*with_logit_sum=*/label_smoothing > 0);
  return cross_entropy(
      result.other_lse, result.target_logit, result.logit_sum, target, cosine.sym_size(1), problem.acc(), options);
}

at::Tensor margin_transform(TORCHMARGIN_TRANSFORM_PARAMETERS) {
  const MarginParameters margin =
      make_transform("margin_transform", cosine, m1, m2, m3, extension, margin_weight, margin_gradient);
  return call_transform(cosine, numbers_of(margin));
}

TORCH_LIBRARY_IMPL(torchmargin, CompositeImplicitAutograd, library) {
  library.impl("margin_cross_entropy", margin_cross_entropy);
  library.impl("margin_transform", margin_transform);
}

} // namespace
} // namespace torchmargin
