// The float64 kernels over rows: the end of the forward pass and grad_input. A warp a row; the
// bodies are those of the CPU (sweep/row_bodies.h).
#include "kernels/device.cuh"
#include "kernels/launch.h"
#include "sweep/dispatch.h"
#include "sweep/row_bodies.h"

namespace torchmargin::device {
namespace {

template <typename Scalar, typename T>
__global__ void target_pass_kernel(TargetPassArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (i < args.rows) { // the whole warp
    target_pass_row<Scalar, T>(args, i, WarpTeam{static_cast<int>(threadIdx.x % kWarp)});
  }
}

template <typename Scalar, typename T>
__global__ void finish_rows_kernel(FinishRowsArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (i < args.rows) {
    finish_row<Scalar, T>(args, i, WarpTeam{static_cast<int>(threadIdx.x % kWarp)});
  }
}

} // namespace

void launch_target_pass(const TargetPassArgs& args, c10::ScalarType /*acc*/, cudaStream_t stream) {
  if (args.rows == 0) {
    return;
  }
  with_dtype_and_acc(args.context.input.dtype, [&](auto scalar, auto zero) {
    const auto kernel = target_pass_kernel<decltype(scalar), decltype(zero)>;
    TORCHMARGIN_LAUNCH(kernel, warp_blocks(args.rows), kThreads, stream, args);
  });
}

void launch_finish_rows(const FinishRowsArgs& args, c10::ScalarType /*acc*/, cudaStream_t stream) {
  if (args.rows == 0) {
    return;
  }
  with_dtype_and_acc(args.context.input.dtype, [&](auto scalar, auto zero) {
    const auto kernel = finish_rows_kernel<decltype(scalar), decltype(zero)>;
    TORCHMARGIN_LAUNCH(kernel, warp_blocks(args.rows), kThreads, stream, args);
  });
}

} // namespace torchmargin::device
