// Products to rows of grad_weight and grad_bias: a warp a class. The classes without rows of their own, nearly all of
// them, have a kernel that needs few registers.
#include "kernels/device.cuh"
#include "kernels/launch.h"
#include "sweep/dispatch.h"
#include "sweep/finish_bodies.h"

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

// No row has this class as its target, and nothing is smoothed, in T.
template <typename Scalar, typename T>
__device__ void finish_plain_class(const FinishClassesArgs& args, int64_t local, const WarpTeam& team) {
  constexpr int kCount = elements_per_thread<Scalar, T>();
  const int64_t features = args.context.features;
  const int64_t first = static_cast<int64_t>(team.rank) * kCount;
  constexpr int64_t kStep = kWarp * kCount;
  const Row<const T> products(static_cast<const T*>(args.products) + local * args.products_row_stride, features);
  const Row<const Scalar> weight(
      static_cast<const Scalar*>(args.weight.data) + local * args.weight.row_stride, features,
      args.weight.column_stride);
  const Row<Scalar> out(static_cast<Scalar*>(args.grad_weight) + local * features, features);
  T unscale = static_cast<T>(1.0 / *args.products_scale);
  T factor = T(0); // of the part along w, which is taken away
  if (args.context.normalize_weight) {
    const T inverse = static_cast<const T*>(args.inverse_norms)[local];
    double along = 0.0;
    for (int64_t k = first; k < features; k += kStep) {
      const auto p = products.template read<kCount>(k, T(0));
      const auto w = weight.template read<kCount>(k, Scalar(0));
      T partial = T(0);
      for (int e = 0; e < kCount; ++e) {
        partial += p.values[e] * static_cast<T>(w.values[e]);
      }
      along += static_cast<double>(partial);
    }
    factor = static_cast<T>(team.sum(along)) * inverse * inverse;
    if (args.products_lack_norms) {
      unscale *= inverse;
    }
  }
  for (int64_t k = first; k < features; k += kStep) {
    const auto p = products.template read<kCount>(k, T(0));
    const auto w = weight.template read<kCount>(k, Scalar(0));
    Elements<Scalar, kCount> gradient;
    for (int e = 0; e < kCount; ++e) {
      gradient.values[e] = static_cast<Scalar>(unscale * (p.values[e] - factor * static_cast<T>(w.values[e])));
    }
    out.write(k, gradient);
  }
}

// The classes without rows, where nothing is smoothed.
template <typename Scalar, typename T>
__global__ void finish_plain_classes_kernel(FinishClassesArgs args) {
  const int64_t local = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (local >= args.class_count) {
    return; // the whole warp
  }
  const WarpTeam team{static_cast<int>(threadIdx.x % kWarp)};
  const RowsOfClass rows = rows_of_class(args, args.first_class + local);
  if (rows.begin != rows.end) {
    return;
  }
  if (args.bias_products != nullptr && team.rank == 0) {
    finish_bias<T>(args, local, rows);
  }
  if (args.products != nullptr) {
    finish_plain_class<Scalar, T>(args, local, team);
  }
}

// The class that warp `index` finishes: the index-th of the chunk where all are smoothed, else that of the index-th
// target, if it is the first of its class and in the chunk; -1: none.
__device__ int64_t class_of_warp(const FinishClassesArgs& args, int64_t index) {
  if (args.input_sum != nullptr) {
    return index < args.class_count ? index : -1;
  }
  if (index >= args.rows || (index > 0 && args.sorted_target[index - 1] == args.sorted_target[index])) {
    return -1;
  }
  const int64_t local = args.sorted_target[index] - args.first_class;
  return local >= 0 && local < args.class_count ? local : -1;
}

template <typename Scalar, typename T>
__global__ void finish_classes_kernel(FinishClassesArgs args) {
  TORCHMARGIN_SHARED(double, scratch, (kWarps * kSlice));
  const int64_t local = class_of_warp(args, static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp);
  if (local < 0) {
    return; // the whole warp
  }
  const WarpTeam team{static_cast<int>(threadIdx.x % kWarp)};
  const RowsOfClass rows = rows_of_class(args, args.first_class + local);
  if (args.bias_products != nullptr && team.rank == 0) {
    finish_bias<T>(args, local, rows);
  }
  if (args.products != nullptr) {
    double* const own_scratch = scratch + threadIdx.x / kWarp * kSlice;
    finish_class<Scalar, T, Scalar, Scalar>(args, local, rows, own_scratch, kSlice, team);
  }
}

} // namespace

void launch_finish_classes(const FinishClassesArgs& args, c10::ScalarType /*acc*/, cudaStream_t stream) {
  if (args.class_count == 0) {
    return;
  }
  const bool smoothed = args.input_sum != nullptr;
  const int64_t warps = smoothed ? args.class_count : args.rows;
  with_dtype_and_acc(args.context.input.dtype, [&](auto scalar, auto zero) {
    if (!smoothed) {
      const auto plain = finish_plain_classes_kernel<decltype(scalar), decltype(zero)>;
      TORCHMARGIN_LAUNCH(plain, warp_blocks(args.class_count), kThreads, stream, args);
    }
    if (warps > 0) {
      const auto kernel = finish_classes_kernel<decltype(scalar), decltype(zero)>;
      TORCHMARGIN_LAUNCH(kernel, warp_blocks(warps), kThreads, stream, args);
    }
  });
}

} // namespace torchmargin::device
