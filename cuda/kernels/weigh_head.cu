// What the classes of a tile weigh where that is not Q alone, where they have several centers, or where they are one
// against all: a thread some columns of several rows. Q alone is in softmax_chunk.cu.
#include "kernels/head.cuh"
#include "kernels/launch.h"
#include "sweep/dispatch.h"

namespace torchmargin::device {
namespace {

template <typename T, typename Out>
__global__ void weigh_head_kernel(SoftmaxChunkArgs args) {
  constexpr int kCount = elements_per_thread<T, Out>();
  const ProductsTile& tile = args.tile;
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (j >= tile.class_count) {
    return;
  }
  const Columns<T, kCount> columns(tile, j);
  const T out_scale = static_cast<T>(args.out_scale);
  for (int64_t i = blockIdx.y; i < tile.row_count; i += gridDim.y) {
    const TileRow<T> row(tile, i);
    const HardMap<T> hard(args.hard, tile, i);
    const SplitLse<T> other_lse(args.other_lse[i]);
    const bool nothing = args.upstream[i] == 0.0; // even if the row holds NaN
    const T of_lse = static_cast<T>(args.of_lse[i]);
    const T of_sum = args.of_sum != nullptr ? static_cast<T>(args.of_sum[i]) : T(0);
    const ChangedLogits<T, kCount> z(row, hard, columns, j);
    Elements<Out, kCount> out;
    TORCHMARGIN_UNROLL
    for (int e = 0; e < kCount; ++e) {
      const T q = softmax_weight(z.after.values[e] + columns.bias.values[e], other_lse) * of_lse;
      const T slope = args.slopes ? z.slope.values[e] : T(1);
      T weight = args.sum_of_changes ? q * slope + (slope - T(1)) * of_sum : (q + of_sum) * slope;
      weight *= out_scale;
      if (args.times_class_factors) {
        weight *= columns.factors.values[e];
      }
      out.values[e] = nothing || j + e == row.own_column ? Out(0) : static_cast<Out>(weight);
    }
    Row<Out>(static_cast<Out*>(args.out) + i * args.out_row_stride, tile.class_count).write(j, out);
  }
}

template <typename T, typename Out>
__global__ void weigh_binary_kernel(WeighBinaryArgs args) {
  constexpr int kCount = elements_per_thread<T, Out>();
  const ProductsTile& tile = args.tile;
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (j >= tile.class_count) {
    return;
  }
  const Columns<T, kCount> columns(tile, j);
  const T factor = static_cast<T>(args.factor * args.out_scale);
  for (int64_t i = blockIdx.y; i < tile.row_count; i += gridDim.y) {
    const TileRow<T> row(tile, i);
    const BinaryMap<T> map(args.form, tile, args.bias, i);
    const bool nothing = args.upstream[i] == 0.0; // even if the row holds NaN
    const Elements<T, kCount> product = row.products.template read<kCount>(j, T(0));
    Elements<Out, kCount> out;
    for (int e = 0; e < kCount; ++e) {
      T z;
      T slope;
      map.evaluate(scaled_product(product.values[e], columns.factors.values[e], map.row_factor), &z, &slope);
      const T small = exp(z > T(0) ? -z : z);
      const T part = T(1) / (T(1) + small);
      const T sigmoid = z > T(0) ? part : (z < T(kFlush) ? T(0) : small * part);
      T weight = sigmoid * slope * factor;
      if (args.times_class_factors) {
        weight *= columns.factors.values[e];
      }
      out.values[e] = nothing || j + e == row.own_column ? Out(0) : static_cast<Out>(weight);
    }
    Row<Out>(static_cast<Out*>(args.out) + i * args.out_row_stride, tile.class_count).write(j, out);
  }
}

// Center k's factors of some columns.
template <typename T, int kCount>
__device__ Elements<T, kCount> center_factors(const void* factors, int64_t k, int64_t class_count, int64_t first) {
  Elements<T, kCount> elements;
  if (factors == nullptr) {
    for (int e = 0; e < kCount; ++e) {
      elements.values[e] = T(1);
    }
    return elements;
  }
  return Row<const T>(static_cast<const T*>(factors) + k * class_count, class_count).template read<kCount>(first, T(1));
}

template <typename T>
__global__ void fold_centers_kernel(FoldCentersArgs args) {
  constexpr int kCount = elements_per_thread<T>();
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (j >= args.class_count) {
    return;
  }
  for (int64_t i = blockIdx.y; i < args.row_count; i += gridDim.y) {
    const T* const planes = static_cast<const T*>(args.products) + i * args.row_stride;
    Elements<T, kCount> best{};
    int place[kCount] = {};
    for (int64_t k = 0; k < args.centers; ++k) {
      const auto product =
          Row<const T>(planes + k * args.plane_stride, args.class_count).template read<kCount>(j, T(0));
      const auto factor = center_factors<T, kCount>(args.factors, k, args.class_count, j);
      for (int e = 0; e < kCount; ++e) {
        const T value = product.values[e] * factor.values[e];
        const bool better = k == 0 || value > best.values[e] || (value != value && best.values[e] == best.values[e]);
        best.values[e] = better ? value : best.values[e];
        place[e] = better ? static_cast<int>(k) : place[e];
      }
    }
    Row<T>(static_cast<T*>(args.out) + i * args.out_row_stride, args.class_count).write(j, best);
    for (int e = 0; args.winner != nullptr && e < kCount; ++e) {
      if (j + e < args.class_count) {
        args.winner[i * args.winner_row_stride + j + e] = static_cast<uint8_t>(place[e]);
      }
    }
  }
}

template <typename T, typename Out>
__global__ void spread_centers_kernel(SpreadCentersArgs args) {
  constexpr int kCount = elements_per_thread<T, Out>();
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (j >= args.class_count) {
    return;
  }
  for (int64_t i = blockIdx.y; i < args.row_count; i += gridDim.y) {
    Out* const planes = static_cast<Out*>(args.weights) + i * args.row_stride;
    const auto weight = Row<Out>(planes, args.class_count).template read<kCount>(j, Out(0));
    for (int64_t k = args.centers - 1; k >= 0; --k) { // the first plane last, for the weights stand there
      const auto factor = center_factors<T, kCount>(args.factors, k, args.class_count, j);
      Elements<Out, kCount> out;
      for (int e = 0; e < kCount; ++e) {
        const bool wins = j + e < args.class_count && args.winner[i * args.winner_row_stride + j + e] == k;
        out.values[e] = wins ? static_cast<Out>(static_cast<T>(weight.values[e]) * factor.values[e]) : Out(0);
      }
      Row<Out>(planes + k * args.plane_stride, args.class_count).write(j, out);
    }
  }
}

template <typename T, typename Out>
__global__ void write_hardest_kernel(WriteHardestArgs args) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= args.row_count * args.hardest) {
    return;
  }
  const int64_t column = args.classes[at] - args.first_class;
  if (args.classes[at] < 0 || column < 0 || column >= args.class_count) {
    return;
  }
  const T factor = args.class_factors != nullptr ? static_cast<const T*>(args.class_factors)[column] : T(1);
  static_cast<Out*>(args.out)[at / args.hardest * args.out_row_stride + column] =
      static_cast<Out>(static_cast<T>(args.values[at] * args.out_scale) * factor);
}

} // namespace

void launch_weigh_head(const SoftmaxChunkArgs& args, c10::ScalarType acc, cudaStream_t stream) {
  if (args.tile.row_count == 0 || args.tile.class_count == 0) {
    return;
  }
  with_types(acc, args.out_dtype, [&](auto zero, auto out) {
    using T = decltype(zero);
    using Out = decltype(out);
    const auto kernel = weigh_head_kernel<T, Out>;
    const dim3 grid = tile_grid(args.tile.row_count, args.tile.class_count, elements_per_thread<T, Out>());
    TORCHMARGIN_LAUNCH(kernel, grid, kThreads, stream, args);
  });
}

void launch_weigh_binary(const WeighBinaryArgs& args, c10::ScalarType acc, cudaStream_t stream) {
  if (args.tile.row_count == 0 || args.tile.class_count == 0) {
    return;
  }
  with_types(acc, args.out_dtype, [&](auto zero, auto out) {
    using T = decltype(zero);
    using Out = decltype(out);
    const auto kernel = weigh_binary_kernel<T, Out>;
    const dim3 grid = tile_grid(args.tile.row_count, args.tile.class_count, elements_per_thread<T, Out>());
    TORCHMARGIN_LAUNCH(kernel, grid, kThreads, stream, args);
  });
}

void launch_fold_centers(const FoldCentersArgs& args, c10::ScalarType acc, cudaStream_t stream) {
  if (args.row_count == 0 || args.class_count == 0) {
    return;
  }
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid = tile_grid(args.row_count, args.class_count, elements_per_thread<T>());
    TORCHMARGIN_LAUNCH(fold_centers_kernel<T>, grid, kThreads, stream, args);
  });
}

void launch_spread_centers(const SpreadCentersArgs& args, c10::ScalarType acc, cudaStream_t stream) {
  if (args.row_count == 0 || args.class_count == 0) {
    return;
  }
  with_types(acc, args.dtype, [&](auto zero, auto out) {
    using T = decltype(zero);
    using Out = decltype(out);
    const auto kernel = spread_centers_kernel<T, Out>;
    const dim3 grid = tile_grid(args.row_count, args.class_count, elements_per_thread<T, Out>());
    TORCHMARGIN_LAUNCH(kernel, grid, kThreads, stream, args);
  });
}

void launch_write_hardest(const WriteHardestArgs& args, c10::ScalarType acc, cudaStream_t stream) {
  const int64_t count = args.row_count * args.hardest;
  if (count == 0) {
    return;
  }
  with_types(acc, args.out_dtype, [&](auto zero, auto out) {
    const auto kernel = write_hardest_kernel<decltype(zero), decltype(out)>;
    TORCHMARGIN_LAUNCH(kernel, static_cast<unsigned>((count + kThreads - 1) / kThreads), kThreads, stream, args);
  });
}

} // namespace torchmargin::device
