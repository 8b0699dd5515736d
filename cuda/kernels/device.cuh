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
#define TORCHMARGIN_UNROLL _Pragma("unroll")
// A kernel of which so many blocks fit a processor at once: registers for no more.
#define TORCHMARGIN_BLOCKS_AT_ONCE(blocks) __launch_bounds__(::torchmargin::device::kThreads, blocks)
#endif

#include <cstdint>
#include <type_traits>

namespace torchmargin::device {

constexpr int kWarp = 32;
constexpr int kThreads = 256; // of every block
constexpr int kWarps = kThreads / kWarp;

// Elements of a row that a thread has in its registers: 16 bytes of the narrowest type that a kernel reads or writes.
template <typename T, int kCount>
struct Elements {
  static constexpr int kPerAccess = 16 / sizeof(T) < kCount ? 16 / sizeof(T) : kCount;
  struct alignas(sizeof(T) * kPerAccess) Access {
    T values[kPerAccess];
  };
  T values[kCount];

  __device__ void load(const T* from) {
    TORCHMARGIN_UNROLL
    for (int part = 0; part < kCount / kPerAccess; ++part) {
      const Access access = reinterpret_cast<const Access*>(from)[part];
      TORCHMARGIN_UNROLL
      for (int e = 0; e < kPerAccess; ++e) {
        values[part * kPerAccess + e] = access.values[e];
      }
    }
  }

  __device__ void store(T* to) const {
    TORCHMARGIN_UNROLL
    for (int part = 0; part < kCount / kPerAccess; ++part) {
      Access access;
      TORCHMARGIN_UNROLL
      for (int e = 0; e < kPerAccess; ++e) {
        access.values[e] = values[part * kPerAccess + e];
      }
      reinterpret_cast<Access*>(to)[part] = access;
    }
  }
};

// How many elements are 16 bytes of the narrowest of these types.
template <typename... Types>
constexpr int elements_per_thread() {
  int least = 16;
  ((least = static_cast<int>(sizeof(Types)) < least ? static_cast<int>(sizeof(Types)) : least), ...);
  return 16 / least;
}

// A row of `size` elements that lie `stride` apart: read and written by 16 bytes where it can be.
template <typename T>
struct Row {
  T* data;
  int64_t size;
  int64_t stride;
  bool by_16_bytes;

  __device__ Row(T* data_, int64_t size_, int64_t stride_ = 1)
      : data(data_),
        size(size_),
        stride(stride_),
        by_16_bytes(stride_ == 1 && reinterpret_cast<uintptr_t>(data_) % 16 == 0) {}

  // Elements [first, first + kCount); `fill` past the end of the row.
  template <int kCount>
  __device__ auto read(int64_t first, std::remove_const_t<T> fill) const {
    Elements<std::remove_const_t<T>, kCount> elements;
    if (by_16_bytes && first + kCount <= size) {
      elements.load(data + first);
    } else {
      TORCHMARGIN_UNROLL
      for (int e = 0; e < kCount; ++e) {
        elements.values[e] = first + e < size ? data[(first + e) * stride] : fill;
      }
    }
    return elements;
  }

  template <int kCount>
  __device__ void write(int64_t first, const Elements<T, kCount>& elements) const {
    if (by_16_bytes && first + kCount <= size) {
      elements.store(data + first);
    } else {
      TORCHMARGIN_UNROLL
      for (int e = 0; e < kCount; ++e) {
        if (first + e < size) {
          data[(first + e) * stride] = elements.values[e];
        }
      }
    }
  }
};

// The butterfly adds the same pairs in every lane: the same bits for all of them.
__device__ inline double warp_sum(double value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

template <typename T>
__device__ T warp_max(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, value, offset);
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
