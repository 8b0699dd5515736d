// Adds a tile of logits to each row's running log-sum-exp and maximum: a block a row. Where the sums need no shift and
// a row factor alone makes logits of products, the inside of the tile has a loop of its own.
#include "kernels/interior.cuh"
#include "kernels/launch.h"
#include "kernels/row_lse.cuh"
#include "kernels/tile.cuh"
#include "sweep/dispatch.h"

namespace torchmargin::device {
namespace {

__device__ inline void add_to_sums(const AccumulateChunkArgs& args, int64_t i, const RowLse& added) {
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
    add_to_sums(args, i, added);
  }
}

// Sums of exp(z) itself. At most kGroup terms are summed in float32 before float64 takes over.
constexpr int kGroup = 16;

// kFactors: classes have factors as well. The maximum is rounded as the general way rounds a logit, to the bit.
template <bool kFactors>
__global__ void accumulate_interior_kernel(AccumulateChunkArgs args) {
  TORCHMARGIN_SHARED(double, scratch, 2 * kWarps);
  const int64_t i = blockIdx.x;
  const ProductsTile& tile = args.tile;
  const float* const products = static_cast<const float*>(tile.products) + i * tile.row_stride;
  const float* const factors = static_cast<const float*>(tile.class_factors);
  const float row_scale = TileRow<float>(tile, i).scale;
  // Of products, or with factors of logits.
  const float exponent_of = kFactors ? static_cast<float>(kLog2E) : exponent_scale(tile, i);
  const int64_t own_of_all = tile.target[i] - tile.first_class;
  const int count = static_cast<int>(tile.class_count);
  const int own = own_of_all >= 0 && own_of_all < count ? static_cast<int>(own_of_all) : -1;
  const int inside = count / kGroup * kGroup;
  float largest = -INFINITY; // without factors of the products: their scale is not negative
  double sum = 0.0;
  for (int j = static_cast<int>(threadIdx.x) * kGroup; j < inside; j += kThreads * kGroup) {
    Elements<float, kGroup> z;
    z.load(products + j);
    if (kFactors) {
      Elements<float, kGroup> of_classes;
      of_classes.load(factors + j);
      TORCHMARGIN_UNROLL
      for (int e = 0; e < kGroup; ++e) {
        z.values[e] = scaled_product(z.values[e], of_classes.values[e], row_scale);
      }
    }
    const int place = own - j;
    float partial = 0.0F;
    if (static_cast<unsigned>(place) < kGroup) { // rare
      TORCHMARGIN_UNROLL
      for (int e = 0; e < kGroup; ++e) {
        largest = fmaxf(largest, e == place ? -INFINITY : z.values[e]);
        partial += e == place ? 0.0F : exp2_of(z.values[e] * exponent_of);
      }
    } else {
      TORCHMARGIN_UNROLL
      for (int e = 0; e < kGroup; ++e) {
        largest = fmaxf(largest, z.values[e]); // NaN is passed over
        partial += exp2_of(z.values[e] * exponent_of);
      }
    }
    sum += static_cast<double>(partial);
  }
  const int last = inside + static_cast<int>(threadIdx.x); // less than kGroup of them
  if (last < count && last != own) {
    const float z = kFactors ? scaled_product(products[last], factors[last], row_scale) : products[last];
    largest = fmaxf(largest, z);
    sum += static_cast<double>(exp2_of(z * exponent_of));
  }
  sum = warp_sum(sum);
  largest = warp_max(largest);
  if (threadIdx.x % kWarp == 0) {
    scratch[threadIdx.x / kWarp] = sum;
    scratch[kWarps + threadIdx.x / kWarp] = static_cast<double>(largest);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double most = -INFINITY;
    RowLse added{OnlineLse{}, -INFINITY};
    for (int warp = 0; warp < kWarps; ++warp) {
      added.lse.combine({0.0, scratch[warp]});
      most = scratch[kWarps + warp] > most ? scratch[kWarps + warp] : most;
    }
    added.maximum = kFactors ? most : scaled_product(static_cast<float>(most), 1.0F, row_scale);
    add_to_sums(args, i, added);
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
  if (args.bounded && args.tile.scale > 0 && has_interior(args.tile, acc)) {
    const auto kernel =
        args.tile.class_factors != nullptr ? accumulate_interior_kernel<true> : accumulate_interior_kernel<false>;
    TORCHMARGIN_LAUNCH(kernel, static_cast<unsigned>(args.tile.row_count), kThreads, stream, args);
    return;
  }
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    TORCHMARGIN_LAUNCH(accumulate_chunk_kernel<T>, static_cast<unsigned>(args.tile.row_count), kThreads, stream, args);
  });
}

} // namespace torchmargin::device
