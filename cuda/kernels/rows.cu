// The float64 kernels over rows: the targets before the sweep, the end of the forward pass, grad_input. A warp a row;
// the bodies are those of the CPU (csrc/sweep).
#include "kernels/device.cuh"
#include "kernels/launch.h"
#include "sweep/combine_rows.h"
#include "sweep/dispatch.h"
#include "sweep/finish_bodies.h"
#include "sweep/hard_rows.h"
#include "sweep/merge_hardest.h"
#include "sweep/target_rows.h"
#include "sweep/widen_upstream.h"

namespace torchmargin::device {
namespace {

// The row of this warp.
__device__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
}
__device__ WarpTeam own_team() {
  return WarpTeam{static_cast<int>(threadIdx.x % kWarp)};
}

template <typename Scalar, typename T>
__global__ void target_rows_kernel(TargetRowsArgs args) {
  if (row_of_warp() < args.rows) { // the whole warp
    target_row<Scalar, T>(args, row_of_warp(), own_team());
  }
}

template <typename Scalar, typename T>
__global__ void combine_rows_kernel(CombineRowsArgs args) {
  if (row_of_warp() < args.rows) {
    combine_row<Scalar, T>(args, row_of_warp(), own_team());
  }
}

// One block: the scale is of all rows.
__global__ void widen_upstream_kernel(WidenUpstreamArgs args) {
  TORCHMARGIN_SHARED(double, sizes, kThreads);
  double largest = 0.0;
  for (int64_t i = threadIdx.x; i < args.rows; i += kThreads) {
    largest = larger_size(largest, widen_row(args, i));
  }
  sizes[threadIdx.x] = largest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int other = 1; other < kThreads; ++other) {
      largest = larger_size(largest, sizes[other]);
    }
    *args.operand_scale = operand_scale_of(args, largest);
  }
}

// 32 rows a block: a warp every kWarps-th set, and then their sums in order.
__global__ void fold_sets_kernel(FoldSetsArgs args) {
  TORCHMARGIN_SHARED(double, sums, kThreads);
  TORCHMARGIN_SHARED(double, maxima, kThreads);
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  double sum = 0.0;
  double maximum = -INFINITY;
  for (int64_t set = warp; set < args.sets && i < args.rows; set += kWarps) {
    sum += args.sum[set * args.rows + i];
    const double other = args.maximum[set * args.rows + i];
    maximum = other > maximum ? other : maximum;
  }
  sums[threadIdx.x] = sum;
  maxima[threadIdx.x] = maximum;
  __syncthreads();
  if (warp != 0 || i >= args.rows) {
    return;
  }
  for (int other = 1; other < kWarps; ++other) {
    sum += sums[other * kWarp + lane];
    maximum = maxima[other * kWarp + lane] > maximum ? maxima[other * kWarp + lane] : maximum;
  }
  OnlineLse total{0.0, sum};
  if (!args.first) {
    total.combine({args.sums.shift[i], args.sums.sum[i]});
    maximum = args.sums.maximum[i] > maximum ? args.sums.maximum[i] : maximum;
  }
  args.sums.shift[i] = total.shift;
  args.sums.sum[i] = total.sum;
  args.sums.maximum[i] = maximum;
}

// A thread a row.
__global__ void hard_rows_kernel(HardRowsArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < args.rows) {
    args.hard[i] = hard_row(args, i);
  }
}

template <typename Scalar, typename T>
__global__ void merge_hardest_kernel(MergeHardestArgs args) {
  if (row_of_warp() < args.rows) {
    merge_hardest_row<Scalar, T>(args, row_of_warp(), own_team());
  }
}

template <typename Scalar, typename T>
__global__ void finish_rows_kernel(FinishRowsArgs args) {
  if (row_of_warp() < args.rows) {
    finish_row<Scalar, T>(args, row_of_warp(), own_team());
  }
}

} // namespace

void launch_target_rows(const TargetRowsArgs& args, c10::ScalarType /*acc*/, cudaStream_t stream) {
  if (args.rows == 0) {
    return;
  }
  with_dtype_and_acc(args.context.input.dtype, [&](auto scalar, auto zero) {
    const auto kernel = target_rows_kernel<decltype(scalar), decltype(zero)>;
    TORCHMARGIN_LAUNCH(kernel, warp_blocks(args.rows), kThreads, stream, args);
  });
}

void launch_combine_rows(const CombineRowsArgs& args, c10::ScalarType /*acc*/, cudaStream_t stream) {
  if (args.rows == 0) {
    return;
  }
  with_dtype_and_acc(args.context.input.dtype, [&](auto scalar, auto zero) {
    const auto kernel = combine_rows_kernel<decltype(scalar), decltype(zero)>;
    TORCHMARGIN_LAUNCH(kernel, warp_blocks(args.rows), kThreads, stream, args);
  });
}

void launch_fold_sets(const FoldSetsArgs& args, cudaStream_t stream) {
  if (args.rows > 0) {
    const unsigned blocks = static_cast<unsigned>((args.rows + kWarp - 1) / kWarp);
    TORCHMARGIN_LAUNCH(fold_sets_kernel, blocks, kThreads, stream, args);
  }
}

void launch_widen_upstream(const WidenUpstreamArgs& args, cudaStream_t stream) {
  TORCHMARGIN_LAUNCH(widen_upstream_kernel, 1, kThreads, stream, args);
}

void launch_hard_rows(const HardRowsArgs& args, c10::ScalarType /*acc*/, cudaStream_t stream) {
  if (args.rows > 0) {
    const unsigned blocks = static_cast<unsigned>((args.rows + kThreads - 1) / kThreads);
    TORCHMARGIN_LAUNCH(hard_rows_kernel, blocks, kThreads, stream, args);
  }
}

void launch_merge_hardest(const MergeHardestArgs& args, c10::ScalarType /*acc*/, cudaStream_t stream) {
  if (args.rows == 0) {
    return;
  }
  with_dtype_and_acc(args.context.input.dtype, [&](auto scalar, auto zero) {
    const auto kernel = merge_hardest_kernel<decltype(scalar), decltype(zero)>;
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
