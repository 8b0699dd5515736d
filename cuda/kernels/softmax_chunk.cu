// The softmax weights Q of the other classes of a tile, in the products' dtype: a thread some columns of several rows.
#include "kernels/launch.h"
#include "kernels/tile.cuh"

namespace torchmargin::device {
namespace {

template <typename T, typename Out>
__global__ void softmax_chunk_kernel(SoftmaxChunkArgs args) {
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
    const SplitLse<T> other_lse(args.other_lse[i]);
    const bool nothing = args.upstream[i] == 0.0; // even if the row holds NaN
    const Elements<T, kCount> z = row.logits(j, columns);
    Elements<Out, kCount> out;
    TORCHMARGIN_UNROLL
    for (int e = 0; e < kCount; ++e) {
      T weight = softmax_weight(z.values[e], other_lse) * out_scale;
      if (args.times_class_factors) {
        weight *= columns.factors.values[e];
      }
      out.values[e] = nothing || j + e == row.own_column ? Out(0) : static_cast<Out>(weight);
    }
    Row<Out>(static_cast<Out*>(args.out) + i * args.out_row_stride, tile.class_count).write(j, out);
  }
}

} // namespace

void launch_softmax_chunk(const SoftmaxChunkArgs& args, c10::ScalarType acc, cudaStream_t stream) {
  const ProductsTile& tile = args.tile;
  if (args.of_lse != nullptr) {
    return launch_weigh_head(args, acc, stream);
  }
  if (tile.row_count == 0 || tile.class_count == 0) {
    return;
  }
  with_types(acc, args.out_dtype, [&](auto zero, auto out) {
    using T = decltype(zero);
    using Out = decltype(out);
    const dim3 grid = tile_grid(tile.row_count, tile.class_count, elements_per_thread<T, Out>());
    const auto kernel = softmax_chunk_kernel<T, Out>;
    TORCHMARGIN_LAUNCH(kernel, grid, kThreads, stream, args);
  });
}

} // namespace torchmargin::device
