// The softmax weights Q of the other classes of a tile: a thread an element, rows along y.
#include "kernels/launch.h"
#include "kernels/tile.cuh"
#include "sweep/dispatch.h"

namespace torchmargin::device {
namespace {

constexpr int kPerThread = 4; // columns, kThreads apart

template <typename T>
__global__ void softmax_chunk_kernel(SoftmaxChunkArgs args) {
  const LogitsTile& tile = args.tile;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kPerThread + threadIdx.x;
  for (int64_t i = blockIdx.y; i < tile.row_count; i += gridDim.y) {
    const TileRow<T> row(tile, i);
    const T other_lse = static_cast<const T*>(args.other_lse)[i];
    const bool nothing = args.upstream[i] == 0.0; // even if the row holds NaN
    T* const out = static_cast<T*>(args.out) + i * tile.class_count;
    for (int step = 0; step < kPerThread; ++step) {
      const int64_t j = first + static_cast<int64_t>(step) * kThreads;
      if (j >= tile.class_count) {
        break;
      }
      T weight = T(0);
      if (!nothing && j != row.own_column) {
        weight = softmax_weight(row(j), other_lse);
        if (args.times_inverse_norms && row.inverse_norms != nullptr) {
          weight *= row.inverse_norms[j];
        }
      }
      out[j] = weight;
    }
  }
}

} // namespace

void launch_softmax_chunk(const SoftmaxChunkArgs& args, c10::ScalarType acc, cudaStream_t stream) {
  const LogitsTile& tile = args.tile;
  if (tile.row_count == 0 || tile.class_count == 0) {
    return;
  }
  constexpr int64_t per_block = static_cast<int64_t>(kThreads) * kPerThread;
  const dim3 grid(
      static_cast<unsigned>((tile.class_count + per_block - 1) / per_block),
      static_cast<unsigned>(tile.row_count < 65535 ? tile.row_count : 65535));
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    TORCHMARGIN_LAUNCH(softmax_chunk_kernel<T>, grid, kThreads, stream, args);
  });
}

} // namespace torchmargin::device
