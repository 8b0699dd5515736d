// One row of a tile of raw products as logits.
#pragma once

#include "kernels/device.cuh"
#include "sweep/kernels.h"

namespace torchmargin::device {

template <typename T>
struct TileRow {
  const T* dots;
  const T* inverse_norms; // or nullptr: 1
  const T* bias; // or nullptr: 0
  T scale;
  int64_t own_column; // the target's, outside [0, class_count) if it is not in this tile

  __device__ TileRow(const LogitsTile& tile, int64_t row)
      : dots(static_cast<const T*>(tile.logits) + row * tile.row_stride),
        inverse_norms(static_cast<const T*>(tile.inverse_norms)),
        bias(static_cast<const T*>(tile.bias)),
        scale(static_cast<T>(tile.scale)),
        own_column(tile.target[row] - tile.first_class) {}

  __device__ T operator()(int64_t j) const {
    const T z = dots[j] * (inverse_norms != nullptr ? inverse_norms[j] * scale : scale);
    return bias != nullptr ? z + bias[j] : z;
  }
};

// Q below exp(-50) is exactly 0; a comparison that lets NaN through.
template <typename T>
__device__ T softmax_weight(T logit, T other_lse) {
  const T gap = logit - other_lse;
  return gap < T(-50) ? T(0) : exp(gap);
}

} // namespace torchmargin::device
