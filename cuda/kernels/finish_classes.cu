// Products to rows of grad_weight and grad_bias: a warp a class.
#include "kernels/device.cuh"
#include "kernels/launch.h"
#include "sweep/dispatch.h"
#include "sweep/row_bodies.h"

namespace torchmargin::device {
namespace {

constexpr int kSlice = 256; // features that a warp holds at a time, in float64

// The first of `count` rising numbers that is not below `value`.
__device__ const int64_t* first_not_below(const int64_t* numbers, int64_t count, int64_t value) {
  while (count > 0) {
    const int64_t half = count / 2;
    if (numbers[half] < value) {
      numbers += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return numbers;
}

__device__ RowsOfClass rows_of_class(const FinishClassesArgs& args, int64_t class_index) {
  const int64_t* const targets = args.sorted_target;
  const int64_t* const begin = first_not_below(targets, args.rows, class_index);
  const int64_t* const end = first_not_below(begin, targets + args.rows - begin, class_index + 1);
  return {args.sorted_row + (begin - targets), args.sorted_row + (end - targets)};
}

// No row has this class as its target, and nothing is smoothed: the hot case, in T.
template <typename T>
__device__ void finish_plain_class(const FinishClassesArgs& args, int64_t local, const WarpTeam& team) {
  const int64_t features = args.context.features;
  const T* const products = static_cast<const T*>(args.products) + local * features;
  const T* const w = static_cast<const T*>(args.weight) + local * args.weight_row_stride;
  T* const out = static_cast<T*>(args.grad_weight) + local * features;
  const T unscale = static_cast<T>(1.0 / *args.operand_scale);
  T factor = T(0);
  if (args.context.normalize_weight) {
    const T inverse = static_cast<const T*>(args.inverse_norms)[local];
    double along = 0.0;
    for (int64_t k = team.rank; k < features; k += team.size) {
      along += static_cast<double>(products[k] * w[k]);
    }
    factor = static_cast<T>(team.sum(along)) * inverse * inverse;
  }
  for (int64_t k = team.rank; k < features; k += team.size) {
    out[k] = unscale * (products[k] - factor * w[k]);
  }
}

template <typename Scalar, typename T>
__global__ void finish_classes_kernel(FinishClassesArgs args) {
  TORCHMARGIN_SHARED(double, scratch, kWarps * kSlice);
  const int64_t local = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (local >= args.class_count) {
    return; // the whole warp
  }
  const WarpTeam team{static_cast<int>(threadIdx.x % kWarp)};
  const RowsOfClass rows = rows_of_class(args, args.first_class + local);
  if (args.bias_products != nullptr && team.rank == 0) {
    finish_bias<T>(args, local, rows);
  }
  if (args.products == nullptr) {
    return;
  }
  if (rows.begin == rows.end && args.input_sum == nullptr) {
    finish_plain_class<T>(args, local, team);
  } else {
    double* const own_scratch = scratch + threadIdx.x / kWarp * kSlice;
    finish_class<Scalar, T>(args, local, rows, own_scratch, kSlice, team);
  }
}

} // namespace

void launch_finish_classes(const FinishClassesArgs& args, c10::ScalarType acc, cudaStream_t stream) {
  if (args.class_count == 0) {
    return;
  }
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    with_dtype(args.context.input.dtype, [&](auto scalar) {
      const auto kernel = finish_classes_kernel<decltype(scalar), T>;
      TORCHMARGIN_LAUNCH(kernel, warp_blocks(args.class_count), kThreads, stream, args);
    });
  });
}

} // namespace torchmargin::device
