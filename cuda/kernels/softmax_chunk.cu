// The softmax weights Q of the other classes of a tile, in the products' dtype: a thread some columns of several rows.
// Where the operands are of 16 bits and factors alone make logits of products, the inside of the tile has a loop of its
// own.
#include "kernels/interior.cuh"
#include "kernels/launch.h"
#include "kernels/tile.cuh"

#include <cmath>

namespace torchmargin::device {
namespace {

// Columns [j, j + kCount) of a row.
template <typename T, typename Out, int kCount>
__device__ void write_weights(const SoftmaxChunkArgs& args, int64_t i, int64_t j, const Columns<T, kCount>& columns) {
  const ProductsTile& tile = args.tile;
  const T out_scale = static_cast<T>(args.out_scale);
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

template <typename T, typename Out>
__global__ void softmax_chunk_kernel(SoftmaxChunkArgs args) {
  constexpr int kCount = elements_per_thread<T, Out>();
  const ProductsTile& tile = args.tile;
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (j >= tile.class_count) {
    return;
  }
  const Columns<T, kCount> columns(tile, j);
  for (int64_t i = blockIdx.y; i < tile.row_count; i += gridDim.y) {
    write_weights<T, Out, kCount>(args, i, j, columns);
  }
}

// A row as the interior's loop wants it: weight = 2^((product scale - high) - low), where the exponents' parts have
// out_scale in them.
struct InteriorRow {
  float scale;
  float high;
  float low;
  float least; // an exponent below it is a weight of 0
  int32_t own_column; // -1: in none of the tile's
  int32_t used;
};

__device__ inline InteriorRow interior_row(const SoftmaxChunkArgs& args, double log2_out_scale, int64_t i) {
  const ProductsTile& tile = args.tile;
  const int64_t own = tile.target[i] - tile.first_class;
  const double lse = args.other_lse[i] * kLog2E - log2_out_scale;
  const float high = static_cast<float>(lse);
  const double rest = lse - static_cast<double>(high);
  return {
      exponent_scale(tile, i),
      high,
      isfinite(rest) ? static_cast<float>(rest) : 0.0F,
      static_cast<float>(kFlush * kLog2E + log2_out_scale),
      own >= 0 && own < tile.class_count ? static_cast<int32_t>(own) : -1,
      args.upstream[i] != 0.0};
}

// What a block does before its rows is shared by so many of them.
constexpr int64_t kRowsPerBlock = 4;

// kFactors: classes have factors as well, for the logits and for the weights.
template <typename Out, bool kFactors>
__global__ void TORCHMARGIN_BLOCKS_AT_ONCE(4) softmax_interior_kernel(SoftmaxChunkArgs args, double log2_out_scale) {
  constexpr int kCount = 16 / sizeof(Out);
  const ProductsTile& tile = args.tile;
  const int j = static_cast<int>((blockIdx.x * kThreads + threadIdx.x) * kCount);
  const bool inside = j + kCount <= tile.class_count;
  TORCHMARGIN_SHARED(InteriorRow, rows, kThreads);
  Elements<float, kCount> factors{};
  if (kFactors && inside) {
    factors.load(static_cast<const float*>(tile.class_factors) + j);
  }
  // This block's rows, as many at a time as there are threads to look at them.
  for (int64_t first = blockIdx.y; first < tile.row_count; first += static_cast<int64_t>(gridDim.y) * kThreads) {
    const int64_t own = first + static_cast<int64_t>(threadIdx.x) * gridDim.y;
    if (own < tile.row_count) {
      rows[threadIdx.x] = interior_row(args, log2_out_scale, own);
    }
    __syncthreads();
    const int64_t left = (tile.row_count - first + gridDim.y - 1) / gridDim.y;
    const int count = left < kThreads ? static_cast<int>(left) : kThreads;
    if (inside) {
      const int64_t in_step = static_cast<int64_t>(gridDim.y) * tile.row_stride;
      const int64_t out_step = static_cast<int64_t>(gridDim.y) * args.out_row_stride;
      const float* in = static_cast<const float*>(tile.products) + first * tile.row_stride + j;
      Out* out = static_cast<Out*>(args.out) + first * args.out_row_stride + j;
      for (int r = 0; r < count; ++r, in += in_step, out += out_step) {
        const InteriorRow row = rows[r];
        Elements<float, kCount> z;
        z.load(in);
        TORCHMARGIN_UNROLL
        for (int e = 0; e < kCount; ++e) {
          const float scale = kFactors ? row.scale * factors.values[e] : row.scale;
          const float exponent = fmaf(z.values[e], scale, -row.high) - row.low;
          // NaN stays. What float16 rounds to 0 is 0 long before.
          const bool too_small = !std::is_same_v<Out, c10::Half> && exponent < row.least;
          z.values[e] = too_small ? 0.0F : exp2_of(exponent);
          z.values[e] *= kFactors && args.times_class_factors ? factors.values[e] : 1.0F;
        }
        const int place = row.own_column - j;
        if (static_cast<unsigned>(place) < kCount || row.used == 0) { // rare
          TORCHMARGIN_UNROLL
          for (int e = 0; e < kCount; ++e) {
            z.values[e] = e == place || row.used == 0 ? 0.0F : z.values[e];
          }
        }
        uint32_t words[4];
        TORCHMARGIN_UNROLL
        for (int word = 0; word < 4; ++word) {
          words[word] = packed<Out>(z.values[2 * word], z.values[2 * word + 1]);
        }
        store_16_bytes(out, words);
      }
    } else if (j < tile.class_count) {
      const Columns<float, kCount> columns(tile, j);
      for (int r = 0; r < count; ++r) {
        write_weights<float, Out, kCount>(args, first + static_cast<int64_t>(r) * gridDim.y, j, columns);
      }
    }
    __syncthreads(); // before `rows` changes
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
    if constexpr (sizeof(Out) == 2) {
      if (has_interior(tile, acc) && rows_by_16_bytes(args.out, args.out_row_stride, sizeof(Out))) {
        const int64_t row_blocks = (tile.row_count + kRowsPerBlock - 1) / kRowsPerBlock;
        const dim3 interior = tile_grid(row_blocks, tile.class_count, elements_per_thread<T, Out>());
        const auto kernel =
            tile.class_factors != nullptr ? softmax_interior_kernel<Out, true> : softmax_interior_kernel<Out, false>;
        TORCHMARGIN_LAUNCH(kernel, interior, kThreads, stream, args, std::log2(args.out_scale));
        return;
      }
    }
    const auto kernel = softmax_chunk_kernel<T, Out>;
    TORCHMARGIN_LAUNCH(kernel, grid, kThreads, stream, args);
  });
}

} // namespace torchmargin::device
