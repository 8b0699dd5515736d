// Shapes and dtypes of the ops on given cosines, for fake tensors, torch.compile and torch.export.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "ops/cosine_problem.h"

namespace torchmargin {
namespace {

CosineTuple margin_cosine_forward_meta(
    TORCHMARGIN_PACKED_COSINE_PARAMETERS,
    std::optional<int64_t> /*ignore_index*/,
    bool /*with_logit_sum*/) {
  make_cosine_problem("_margin_cosine_forward", TORCHMARGIN_PACKED_COSINE_ARGUMENTS);
  const auto rows = [&] { return at::empty_symint({cosine.sym_size(0)}, cosine.options().dtype(at::kDouble)); };
  return {rows(), rows(), rows()};
}

CosineTuple margin_cosine_backward_meta(
    TORCHMARGIN_PACKED_COSINE_PARAMETERS,
    TORCHMARGIN_COSINE_BACKWARD_REQUEST_PARAMETERS) {
  constexpr std::string_view op = "_margin_cosine_backward";
  const CosineProblem problem = make_cosine_problem(op, TORCHMARGIN_PACKED_COSINE_ARGUMENTS);
  check_request(op, problem, CosineBackwardRequest{TORCHMARGIN_UPSTREAM_ARGUMENTS, other_lse, wanted});
  const auto like = [&](size_t index, const std::optional<at::Tensor>& source) {
    return wanted[index] && source.has_value() ? at::empty_symint(source->sym_sizes(), source->options())
                                               : at::empty({0}, cosine.options());
  };
  return {like(0, problem.cosine), like(1, problem.margins.sample_m2), like(2, problem.margins.sample_m3)};
}

at::Tensor margin_transform_forward_meta(const at::Tensor& cosine, at::ArrayRef<double> numbers) {
  make_transform("_margin_transform_forward", cosine, numbers);
  return at::empty_symint(cosine.sym_sizes(), cosine.options());
}

at::Tensor
margin_transform_backward_meta(const at::Tensor& /*grad*/, const at::Tensor& cosine, at::ArrayRef<double> numbers) {
  make_transform("_margin_transform_backward", cosine, numbers);
  return at::empty_symint(cosine.sym_sizes(), cosine.options());
}

TORCH_LIBRARY_IMPL(torchmargin, Meta, library) {
  library.impl("_margin_cosine_forward", margin_cosine_forward_meta);
  library.impl("_margin_cosine_backward", margin_cosine_backward_meta);
  library.impl("_margin_transform_forward", margin_transform_forward_meta);
  library.impl("_margin_transform_backward", margin_transform_backward_meta);
}

} // namespace
} // namespace torchmargin
