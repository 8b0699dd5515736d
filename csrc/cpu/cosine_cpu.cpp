// The ops on given cosines on the CPU: the gate, the check of the targets' values, the loops.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/cosine_kernels.h"
#include "cpu/loops.h"
#include "cpu/target_values.h"
#include "ops/cosine_problem.h"
#include "sweep/cosine_pass.h"

namespace torchmargin::cpu {
namespace {

void forward(const CosineForwardArgs& args, int64_t rows) {
  at::parallel_for(
      0, rows, grain(args.context.classes), [&](int64_t begin, int64_t end) { cosine_forward(args, begin, end); });
}

void backward(const CosineBackwardArgs& args, int64_t rows) {
  at::parallel_for(
      0, rows, grain(args.context.classes), [&](int64_t begin, int64_t end) { cosine_backward(args, begin, end); });
}

void transform_all(const TransformArgs& args, int64_t count) {
  at::parallel_for(0, count, grain(1), [&](int64_t begin, int64_t end) { transform(args, begin, end); });
}

constexpr CosineKernels kKernels{forward, backward, transform_all};

CosineTuple margin_cosine_forward_cpu(
    TORCHMARGIN_PACKED_COSINE_PARAMETERS,
    std::optional<int64_t> ignore_index,
    bool with_logit_sum) {
  const CosineProblem problem = make_cosine_problem("_margin_cosine_forward", TORCHMARGIN_PACKED_COSINE_ARGUMENTS);
  if (ignore_index.has_value()) {
    check_target_values("margin_cross_entropy", target, cosine.size(1), *ignore_index);
  }
  const CosineResult result = cosine_pass(problem, with_logit_sum, kKernels);
  return {result.other_lse, result.target_logit, result.logit_sum};
}

CosineTuple margin_cosine_backward_cpu(
    TORCHMARGIN_PACKED_COSINE_PARAMETERS,
    TORCHMARGIN_COSINE_BACKWARD_REQUEST_PARAMETERS) {
  constexpr std::string_view op = "_margin_cosine_backward";
  const CosineProblem problem = make_cosine_problem(op, TORCHMARGIN_PACKED_COSINE_ARGUMENTS);
  const CosineBackwardRequest request{TORCHMARGIN_UPSTREAM_ARGUMENTS, other_lse, wanted};
  check_request(op, problem, request);
  const CosineGradients gradients = cosine_backward_pass(problem, request, kKernels);
  return {gradients[0], gradients[1], gradients[2]};
}

at::Tensor margin_transform_forward_cpu(const at::Tensor& cosine, at::ArrayRef<double> numbers) {
  const MarginParameters margin = make_transform("_margin_transform_forward", cosine, numbers);
  return transform_pass(cosine, std::nullopt, margin, kKernels);
}

at::Tensor
margin_transform_backward_cpu(const at::Tensor& grad, const at::Tensor& cosine, at::ArrayRef<double> numbers) {
  constexpr std::string_view op = "_margin_transform_backward";
  const MarginParameters margin = make_transform(op, cosine, numbers);
  check_shape(op, "grad", grad, cosine.sym_sizes());
  return transform_pass(cosine, grad, margin, kKernels);
}

TORCH_LIBRARY_IMPL(torchmargin, CPU, library) {
  library.impl("_margin_cosine_forward", margin_cosine_forward_cpu);
  library.impl("_margin_cosine_backward", margin_cosine_backward_cpu);
  library.impl("_margin_transform_forward", margin_transform_forward_cpu);
  library.impl("_margin_transform_backward", margin_transform_backward_cpu);
}

} // namespace
} // namespace torchmargin::cpu
