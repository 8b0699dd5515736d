// The inside of a tile, where nothing has to be asked: whole 16 bytes of every row, products that factors alone make
// logits, exponentials to base 2. What lies outside goes the general way (tile.cuh). Inline assembly has a twin in C++.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/device.cuh"
#include "sweep/kernels.h"

namespace torchmargin::device {

constexpr double kLog2E = 1.4426950408889634;

#if defined(TORCHMARGIN_DEVICE_ON_HOST)

inline float exp2_of(float x) {
  return std::exp2(x);
}

// Two numbers of 16 bits, the first in the lower half.
template <typename Out>
uint32_t packed(float first, float second) {
  const Out both[2] = {static_cast<Out>(first), static_cast<Out>(second)};
  uint32_t word;
  std::memcpy(&word, both, sizeof(word));
  return word;
}

inline void store_16_bytes(void* to, const uint32_t (&words)[4]) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) {
    device_on_host::fail("16 bytes stored where none can be");
  }
  std::memcpy(to, words, sizeof(words));
}

#else

// 2^x, within 2 units in the last place; a result that is denormal is 0.
__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <typename Out>
__device__ uint32_t packed(float first, float second);

template <>
__device__ inline uint32_t packed<c10::Half>(float first, float second) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

template <>
__device__ inline uint32_t packed<c10::BFloat16>(float first, float second) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

// NB: in assembly, or the compiler merges it with the stores of a tail and makes eight of it.
__device__ inline void store_16_bytes(void* to, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

#endif

// Do the rows of a matrix begin at 16 bytes?
inline bool rows_by_16_bytes(const void* data, int64_t row_stride, size_t element) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride * static_cast<int64_t>(element) % 16 == 0;
}

// Float32 products that factors alone make logits, in rows that are read by 16 bytes.
inline bool has_interior(const ProductsTile& tile, c10::ScalarType acc) {
  return acc == c10::ScalarType::Float && tile.bias == nullptr && tile.class_count < (int64_t(1) << 30) &&
      rows_by_16_bytes(tile.products, tile.row_stride, sizeof(float)) &&
      rows_by_16_bytes(tile.class_factors, /*row_stride=*/0, sizeof(float));
}

// What makes exponents to base 2 of a row's products.
__device__ inline float exponent_scale(const ProductsTile& tile, int64_t row) {
  const double factor = tile.row_factors != nullptr ? static_cast<const float*>(tile.row_factors)[row] : 1.0;
  return static_cast<float>(tile.scale * kLog2E * factor);
}

} // namespace torchmargin::device
