// One row of a tile of raw products as logits, some columns at a time.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "kernels/device.cuh"
#include "math/logit.h"
#include "sweep/kernels.h"

namespace torchmargin::device {

// What makes logits of the products of some columns.
template <typename T, int kCount>
struct Columns {
  Elements<T, kCount> factors;
  Elements<T, kCount> bias;

  __device__ Columns(const ProductsTile& tile, int64_t first) {
    TORCHMARGIN_UNROLL
    for (int e = 0; e < kCount; ++e) {
      factors.values[e] = T(1);
      bias.values[e] = T(0);
    }
    if (tile.class_factors != nullptr) {
      factors =
          Row<const T>(static_cast<const T*>(tile.class_factors), tile.class_count).template read<kCount>(first, T(1));
    }
    if (tile.bias != nullptr) {
      bias = Row<const T>(static_cast<const T*>(tile.bias), tile.class_count).template read<kCount>(first, T(0));
    }
  }
};

template <typename T>
struct TileRow {
  Row<const T> products;
  T scale;
  int64_t own_column; // the target's, outside [0, class_count) if it is not in this tile

  __device__ TileRow(const ProductsTile& tile, int64_t row)
      : products(static_cast<const T*>(tile.products) + row * tile.row_stride, tile.class_count),
        scale(static_cast<T>(tile.scale)),
        own_column(tile.target[row] - tile.first_class) {
    if (tile.row_factors != nullptr) {
      scale *= static_cast<const T*>(tile.row_factors)[row];
    }
  }

  template <int kCount>
  __device__ Elements<T, kCount> logits(int64_t first, const Columns<T, kCount>& columns) const {
    Elements<T, kCount> z = products.template read<kCount>(first, T(0));
    TORCHMARGIN_UNROLL
    for (int e = 0; e < kCount; ++e) {
      z.values[e] = scaled_product(z.values[e], columns.factors.values[e], scale) + columns.bias.values[e];
    }
    return z;
  }
};

// A row's log-sum-exp in two parts, for it is not rounded to T: near the largest logit z - lse is exact, and so is
// the factor that all softmax weights of the row share.
template <typename T>
struct SplitLse {
  T high;
  T low; // 0 where the whole is not finite

  __device__ explicit SplitLse(double lse) : high(static_cast<T>(lse)), low(T(0)) {
    const double rest = lse - static_cast<double>(high);
    low = isfinite(rest) ? static_cast<T>(rest) : T(0);
  }
};

// Q below exp(-50) is exactly 0; a comparison that lets NaN through.
template <typename T>
__device__ T softmax_weight(T logit, const SplitLse<T>& other_lse) {
  const T gap = (logit - other_lse.high) - other_lse.low;
  return gap < T(kFlush) ? T(0) : exp(gap);
}

// For kernels where a thread has some columns of several rows: every so many rows a block of its own.
inline dim3 tile_grid(int64_t rows, int64_t classes, int64_t per_thread) {
  constexpr int64_t kBlocksAlongRows = 512;
  const int64_t per_block = kThreads * per_thread;
  return dim3(
      static_cast<unsigned>((classes + per_block - 1) / per_block),
      static_cast<unsigned>(rows < kBlocksAlongRows ? rows : kBlocksAlongRows));
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

} // namespace torchmargin::device
