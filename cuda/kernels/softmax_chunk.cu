// The softmax weights Q of the other classes of a tile, in the products' dtype: a thread some columns of several rows.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "kernels/launch.h"
#include "kernels/tile.cuh"

namespace torchmargin::device {
namespace {

constexpr int64_t kBlocksAlongRows = 512;

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

// Calls body(T(), Out()) for the dtypes of products and operands.
template <typename Body>
void with_types(c10::ScalarType acc, c10::ScalarType out, Body body) {
  if (acc == c10::ScalarType::Double) {
    return body(double(), double());
  }
  switch (out) {
    case c10::ScalarType::Half:
      return body(float(), c10::Half());
    case c10::ScalarType::BFloat16:
      return body(float(), c10::BFloat16());
    default:
      return body(float(), float());
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
    constexpr int64_t per_block = static_cast<int64_t>(kThreads) * elements_per_thread<T, Out>();
    const dim3 grid(
        static_cast<unsigned>((tile.class_count + per_block - 1) / per_block),
        static_cast<unsigned>(tile.row_count < kBlocksAlongRows ? tile.row_count : kBlocksAlongRows));
    const auto kernel = softmax_chunk_kernel<T, Out>;
    TORCHMARGIN_LAUNCH(kernel, grid, kThreads, stream, args);
  });
}

} // namespace torchmargin::device
