// The private ops on given cosines, once for all devices: the gate, the check of the targets' values, the pass.
#pragma once

#include <torch/library.h>

#include "ops/cosine_problem.h"
#include "sweep/cosine_pass.h"

namespace torchmargin {

// On: as LinearOps has it (linear_ops.h).
template <typename On, const CosineKernels& kernels>
struct CosineOps {
  using Guard = typename On::Guard;

  static CosineTuple
  forward(TORCHMARGIN_PACKED_COSINE_PARAMETERS, std::optional<int64_t> ignore_index, bool with_logit_sum) {
    const CosineProblem problem = make_cosine_problem("_margin_cosine_forward", TORCHMARGIN_PACKED_COSINE_ARGUMENTS);
    const Guard guard(cosine.device());
    if (ignore_index.has_value()) {
      On::check_target_values("margin_cross_entropy", target, cosine.size(1), *ignore_index);
    }
    const CosineResult result = cosine_pass(problem, with_logit_sum, kernels);
    return {result.other_lse, result.target_logit, result.logit_sum};
  }

  static CosineTuple backward(TORCHMARGIN_PACKED_COSINE_PARAMETERS, TORCHMARGIN_COSINE_BACKWARD_REQUEST_PARAMETERS) {
    constexpr std::string_view op = "_margin_cosine_backward";
    const CosineProblem problem = make_cosine_problem(op, TORCHMARGIN_PACKED_COSINE_ARGUMENTS);
    const CosineBackwardRequest request{TORCHMARGIN_UPSTREAM_ARGUMENTS, other_lse, wanted};
    check_request(op, problem, request);
    const Guard guard(cosine.device());
    const CosineGradients gradients = cosine_backward_pass(problem, request, kernels);
    return {gradients[0], gradients[1], gradients[2]};
  }

  static at::Tensor transform(const at::Tensor& cosine, at::ArrayRef<double> numbers) {
    const MarginParameters margin = make_transform("_margin_transform_forward", cosine, numbers);
    const Guard guard(cosine.device());
    return transform_pass(cosine, std::nullopt, margin, kernels);
  }

  static at::Tensor transform_backward(const at::Tensor& grad, const at::Tensor& cosine, at::ArrayRef<double> numbers) {
    constexpr std::string_view op = "_margin_transform_backward";
    const MarginParameters margin = make_transform(op, cosine, numbers);
    check_shape(op, "grad", grad, cosine.sym_sizes());
    const Guard guard(cosine.device());
    return transform_pass(cosine, grad, margin, kernels);
  }

  static void add_to(torch::Library& library) {
    library.impl("_margin_cosine_forward", forward);
    library.impl("_margin_cosine_backward", backward);
    library.impl("_margin_transform_forward", transform);
    library.impl("_margin_transform_backward", transform_backward);
  }
};

} // namespace torchmargin
