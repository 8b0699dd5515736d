// Adds a tile of logits to each row's running log-sum-exp and maximum: a block a row.
#include "kernels/launch.h"
#include "kernels/row_lse.cuh"
#include "kernels/tile.cuh"
#include "sweep/dispatch.h"

namespace torchmargin::device {
namespace {

template <typename T>
__global__ void accumulate_chunk_kernel(AccumulateChunkArgs args) {
  constexpr int kCount = elements_per_thread<T>();
  TORCHMARGIN_SHARED(double, scratch, kRowLseScratch);
  const int64_t i = blockIdx.x;
  const ProductsTile& tile = args.tile;
  const TileRow<T> row(tile, i);
  const auto logits = [&](int64_t j) { return row.logits(j, Columns<T, kCount>(tile, j)); };
  const RowLse added = row_lse<T, kCount>(logits, tile.class_count, row.own_column, args.bounded, scratch);
  if (threadIdx.x == 0) {
    OnlineLse total;
    double maximum = -INFINITY;
    if (!args.first) {
      total.shift = args.sums.shift[i];
      total.sum = args.sums.sum[i];
      maximum = args.sums.maximum[i];
    }
    total.combine(added.lse);
    args.sums.shift[i] = total.shift;
    args.sums.sum[i] = total.sum;
    args.sums.maximum[i] = added.maximum > maximum ? added.maximum : maximum;
  }
}

} // namespace

void launch_accumulate_chunk(const AccumulateChunkArgs& args, c10::ScalarType acc, cudaStream_t stream) {
  if (args.hard != nullptr || args.logit_sum != nullptr || args.hardest > 0) {
    return launch_accumulate_head(args, acc, stream);
  }
  if (args.tile.row_count == 0) {
    return;
  }
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    TORCHMARGIN_LAUNCH(accumulate_chunk_kernel<T>, static_cast<unsigned>(args.tile.row_count), kThreads, stream, args);
  });
}

} // namespace torchmargin::device
