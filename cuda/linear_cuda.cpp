// The private linear ops on CUDA: the gate, the check of the targets' values, the sweep with this
// device's kernels on the current stream.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "kernels/launch.h"
#include "ops/problem.h"
#include "sweep/sweeps.h"
#include "sweep/tile_steps.h"
#include "target_values.h"

namespace torchmargin::cuda {
namespace {

// Enqueues a kernel on the current stream and checks the launch.
template <typename Args>
void enqueue(void (*launch)(const Args&, c10::ScalarType, cudaStream_t), const Args& args, c10::ScalarType acc) {
  launch(args, acc, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void load_rows(const LoadRowsArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_load_rows, args, acc);
}
void accumulate_chunk(const AccumulateChunkArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_accumulate_chunk, args, acc);
}
void softmax_chunk(const SoftmaxChunkArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_softmax_chunk, args, acc);
}
void target_rows(const TargetRowsArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_target_rows, args, acc);
}
void combine_rows(const CombineRowsArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_combine_rows, args, acc);
}
void finish_classes(const FinishClassesArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_finish_classes, args, acc);
}
void finish_rows(const FinishRowsArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_finish_rows, args, acc);
}
void run_lanes(int64_t lanes, const std::function<void(int64_t)>& body) {
  for (int64_t lane = 0; lane < lanes; ++lane) { // the plan makes one: a stream is one queue
    body(lane);
  }
}
void prepare_buffer(void* /*data*/, int64_t /*bytes*/) {}

const Device& this_device() {
  static const Device gpu{
      .traits = kGpuTraits,
      .kernels =
          {.load_rows = load_rows,
           .target_rows = target_rows,
           .accumulate_chunk = accumulate_chunk,
           .combine_rows = combine_rows,
           .softmax_chunk = softmax_chunk,
           .finish_classes = finish_classes,
           .finish_rows = finish_rows,
           .widen_upstream = nullptr,
           .run_lanes = run_lanes,
           .prepare_buffer = prepare_buffer},
      .steps = kPortableSteps};
  return gpu;
}

ForwardTuple linear_margin_forward_cuda(TORCHMARGIN_PACKED_LINEAR_PARAMETERS, TORCHMARGIN_FORWARD_REQUEST_PARAMETERS) {
  constexpr std::string_view op = "_linear_margin_forward";
  const LinearProblem problem = make_linear_problem(op, TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
  const ForwardRequest request{TORCHMARGIN_FORWARD_REQUEST_ARGUMENTS};
  check_request(op, problem, request);
  const c10::cuda::CUDAGuard guard(input.device());
  if (ignore_index.has_value()) {
    assert_target_values(target, weight.size(0), *ignore_index);
  }
  return to_tuple(sweep_forward(problem, request, this_device()));
}

BackwardTuple linear_margin_backward_cuda(
    TORCHMARGIN_PACKED_LINEAR_PARAMETERS,
    TORCHMARGIN_BACKWARD_REQUEST_PARAMETERS) {
  constexpr std::string_view op = "_linear_margin_backward";
  const LinearProblem problem = make_linear_problem(op, TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
  const BackwardRequest request{TORCHMARGIN_BACKWARD_REQUEST_ARGUMENTS};
  check_request(op, problem, request);
  const c10::cuda::CUDAGuard guard(input.device());
  return to_tuple(sweep_backward(problem, request, this_device()));
}

LogitsTuple margin_logits_forward_cuda(TORCHMARGIN_PACKED_LINEAR_PARAMETERS) {
  const LinearProblem problem = make_linear_problem("_margin_logits_forward", TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
  const c10::cuda::CUDAGuard guard(input.device());
  return to_tuple(sweep_logits(problem, this_device()));
}

BackwardTuple margin_logits_backward_cuda(
    TORCHMARGIN_PACKED_LINEAR_PARAMETERS,
    TORCHMARGIN_LOGITS_BACKWARD_REQUEST_PARAMETERS) {
  constexpr std::string_view op = "_margin_logits_backward";
  const LinearProblem problem = make_linear_problem(op, TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
  const LogitsBackwardRequest request{TORCHMARGIN_LOGITS_BACKWARD_REQUEST_ARGUMENTS};
  check_request(op, problem, request);
  const c10::cuda::CUDAGuard guard(input.device());
  return to_tuple(sweep_logits_backward(problem, request, this_device()));
}

TORCH_LIBRARY_IMPL(torchmargin, CUDA, library) {
  library.impl("_linear_margin_forward", linear_margin_forward_cuda);
  library.impl("_linear_margin_backward", linear_margin_backward_cuda);
  library.impl("_margin_logits_forward", margin_logits_forward_cuda);
  library.impl("_margin_logits_backward", margin_logits_backward_cuda);
}

} // namespace
} // namespace torchmargin::cuda
