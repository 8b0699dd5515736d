// Shapes and dtypes of the ops on given cosines, for fake tensors, torch.compile and torch.export.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "ops/cosine_problem.h"

namespace torchmargin {
namespace {

CosineTuple margin_cosine_forward_meta(
    TORCHMARGIN_COSINE_PARAMETERS,
    std::optional<int64_t> /*ignore_index*/,
    bool /*with_logit_sum*/) {
  make_cosine_problem("_margin_cosine_forward", TORCHMARGIN_COSINE_ARGUMENTS);
  const auto rows = [&] { return at::empty_symint({cosine.sym_size(0)}, cosine.options().dtype(at::kDouble)); };
  return {rows(), rows(), rows()};
}

CosineTuple margin_cosine_backward_meta(
    TORCHMARGIN_COSINE_PARAMETERS,
    const std::optional<at::Tensor>& /*grad_other_lse*/,
    const std::optional<at::Tensor>& /*grad_target_logit*/,
    const std::optional<at::Tensor>& /*grad_logit_sum*/,
    const at::Tensor& /*other_lse*/,
    std::array<bool, 3> wanted) {
  const CosineProblem problem = make_cosine_problem("_margin_cosine_backward", TORCHMARGIN_COSINE_ARGUMENTS);
  const auto like = [&](size_t index, const std::optional<at::Tensor>& source) {
    return wanted[index] && source.has_value() ? at::empty_symint(source->sym_sizes(), source->options())
                                               : at::empty({0}, cosine.options());
  };
  return {like(0, problem.cosine), like(1, problem.sample_m2), like(2, problem.sample_m3)};
}

at::Tensor margin_transform_meta(const at::Tensor& cosine, TORCHMARGIN_MARGIN_PARAMETERS) {
  check_transform("margin_transform", cosine, TORCHMARGIN_MARGIN_ARGUMENTS);
  return at::empty_symint(cosine.sym_sizes(), cosine.options());
}

at::Tensor
margin_transform_backward_meta(const at::Tensor& /*grad*/, const at::Tensor& cosine, TORCHMARGIN_MARGIN_PARAMETERS) {
  check_transform("_margin_transform_backward", cosine, TORCHMARGIN_MARGIN_ARGUMENTS);
  return at::empty_symint(cosine.sym_sizes(), cosine.options());
}

TORCH_LIBRARY_IMPL(torchmargin, Meta, library) {
  library.impl("_margin_cosine_forward", margin_cosine_forward_meta);
  library.impl("_margin_cosine_backward", margin_cosine_backward_meta);
  library.impl("margin_transform", margin_transform_meta);
  library.impl("_margin_transform_backward", margin_transform_backward_meta);
}

} // namespace
} // namespace torchmargin
