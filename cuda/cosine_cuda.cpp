// The ops on given cosines on CUDA.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "kernels/launch.h"
#include "ops/cosine_problem.h"
#include "sweep/cosine_pass.h"
#include "target_values.h"

namespace torchmargin::cuda {
namespace {

template <typename Args>
void enqueue(void (*launch)(const Args&, int64_t, cudaStream_t), const Args& args, int64_t count) {
  launch(args, count, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void forward(const CosineForwardArgs& args, int64_t rows) {
  enqueue(device::launch_cosine_forward, args, rows);
}
void backward(const CosineBackwardArgs& args, int64_t rows) {
  enqueue(device::launch_cosine_backward, args, rows);
}
void transform(const TransformArgs& args, int64_t count) {
  enqueue(device::launch_transform, args, count);
}

constexpr CosineKernels kKernels{forward, backward, transform};

CosineTuple margin_cosine_forward_cuda(
    TORCHMARGIN_PACKED_COSINE_PARAMETERS,
    std::optional<int64_t> ignore_index,
    bool with_logit_sum) {
  const CosineProblem problem = make_cosine_problem("_margin_cosine_forward", TORCHMARGIN_PACKED_COSINE_ARGUMENTS);
  const c10::cuda::CUDAGuard guard(cosine.device());
  if (ignore_index.has_value()) {
    assert_target_values(target, cosine.size(1), *ignore_index);
  }
  const CosineResult result = cosine_pass(problem, with_logit_sum, kKernels);
  return {result.other_lse, result.target_logit, result.logit_sum};
}

CosineTuple margin_cosine_backward_cuda(
    TORCHMARGIN_PACKED_COSINE_PARAMETERS,
    TORCHMARGIN_COSINE_BACKWARD_REQUEST_PARAMETERS) {
  constexpr std::string_view op = "_margin_cosine_backward";
  const CosineProblem problem = make_cosine_problem(op, TORCHMARGIN_PACKED_COSINE_ARGUMENTS);
  const CosineBackwardRequest request{TORCHMARGIN_UPSTREAM_ARGUMENTS, other_lse, wanted};
  check_request(op, problem, request);
  const c10::cuda::CUDAGuard guard(cosine.device());
  const CosineGradients gradients = cosine_backward_pass(problem, request, kKernels);
  return {gradients[0], gradients[1], gradients[2]};
}

at::Tensor margin_transform_forward_cuda(const at::Tensor& cosine, at::ArrayRef<double> numbers) {
  const MarginParameters margin = make_transform("_margin_transform_forward", cosine, numbers);
  const c10::cuda::CUDAGuard guard(cosine.device());
  return transform_pass(cosine, std::nullopt, margin, kKernels);
}

at::Tensor
margin_transform_backward_cuda(const at::Tensor& grad, const at::Tensor& cosine, at::ArrayRef<double> numbers) {
  constexpr std::string_view op = "_margin_transform_backward";
  const MarginParameters margin = make_transform(op, cosine, numbers);
  check_shape(op, "grad", grad, cosine.sym_sizes());
  const c10::cuda::CUDAGuard guard(cosine.device());
  return transform_pass(cosine, grad, margin, kKernels);
}

TORCH_LIBRARY_IMPL(torchmargin, CUDA, library) {
  library.impl("_margin_cosine_forward", margin_cosine_forward_cuda);
  library.impl("_margin_cosine_backward", margin_cosine_backward_cuda);
  library.impl("_margin_transform_forward", margin_transform_forward_cuda);
  library.impl("_margin_transform_backward", margin_transform_backward_cuda);
}

} // namespace
} // namespace torchmargin::cuda
