// What every kernel needs of the device: launches, teams of threads, sums in a fixed order.
// The same source is read by nvcc and, under TORCHMARGIN_DEVICE_ON_HOST, by a host compiler with
// the tests' stand-in for the device (tests/cpp/device_on_host).
#pragma once

#if defined(TORCHMARGIN_DEVICE_ON_HOST)
#include "device_on_host.h"
#else
#include <cuda_runtime.h>

#define TORCHMARGIN_SHARED(type, name, size) __shared__ type name[size]
#define TORCHMARGIN_LAUNCH(kernel, grid, block, stream, ...) kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#endif

#include <cstdint>

namespace torchmargin::device {

constexpr int kWarp = 32;
constexpr int kThreads = 256; // of every block
constexpr int kWarps = kThreads / kWarp;

// The butterfly adds the same pairs in every lane: the same bits for all of them.
__device__ inline double warp_sum(double value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

__device__ inline double warp_max(double value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = other > value ? other : value; // NaN of a lane is passed over, as on the CPU
  }
  return value;
}

// A team for math/team.h: the lanes of one warp.
struct WarpTeam {
  int rank;
  static constexpr int size = kWarp;

  __device__ double sum(double value) const {
    return warp_sum(value);
  }
};

// The threads of a block; `partial` is shared memory for a value of each warp.
struct BlockTeam {
  int rank;
  static constexpr int size = kThreads;
  double* partial; // [kWarps]

  __device__ double sum(double value) const {
    share(warp_sum(value));
    double total = partial[0];
    for (int warp = 1; warp < kWarps; ++warp) {
      total += partial[warp];
    }
    __syncthreads(); // before the next use of `partial`
    return total;
  }

  __device__ double max(double value) const {
    share(warp_max(value));
    double largest = partial[0];
    for (int warp = 1; warp < kWarps; ++warp) {
      largest = partial[warp] > largest ? partial[warp] : largest;
    }
    __syncthreads();
    return largest;
  }

 private:
  __device__ void share(double of_warp) const {
    if (rank % kWarp == 0) {
      partial[rank / kWarp] = of_warp;
    }
    __syncthreads();
  }
};

// Blocks for `rows` rows, a warp each.
inline unsigned warp_blocks(int64_t rows) {
  return static_cast<unsigned>((rows + kWarps - 1) / kWarps);
}

} // namespace torchmargin::device
