// A vector of floats or doubles as wide as the instruction set this file is compiled
// for, with exp: what the row kernels are written with. GCC/Clang vector extensions.
// NB: included only by row_kernels.cpp, and everything here is in an anonymous
// namespace: an inline function shared between instruction sets would be merged by
// the linker, and an old CPU could meet AVX512 in it.
#pragma once

#include <cstdint>

namespace torchmargin::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct SimdTypes;
template <>
struct SimdTypes<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
  using Integer = int32_t;
};
template <>
struct SimdTypes<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Integers __attribute__((vector_size(kVectorBytes)));
  using Integer = int64_t;
};

template <typename T>
using Vector = typename SimdTypes<T>::Vector;
template <typename T>
using Integers = typename SimdTypes<T>::Integers;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
inline Vector<T> load(const T* from) {
  Vector<T> v;
  __builtin_memcpy(&v, from, kVectorBytes);
  return v;
}

template <typename T>
inline void store(T* to, Vector<T> v) {
  __builtin_memcpy(to, &v, kVectorBytes);
}

// The first `count` lanes from memory, the others `fill`.
template <typename T>
inline Vector<T> load_some(const T* from, int64_t count, T fill) {
  Vector<T> v = Vector<T>{} + fill;
  for (int64_t lane = 0; lane < count; ++lane) {
    v[lane] = from[lane];
  }
  return v;
}

template <typename T>
inline void store_some(T* to, Vector<T> v, int64_t count) {
  for (int64_t lane = 0; lane < count; ++lane) {
    to[lane] = v[lane];
  }
}

// Of a row's last vector only the first `lanes` are there; of the others all.
template <typename T>
inline Vector<T> load_lanes(const T* from, int64_t lanes, T fill) {
  return lanes == kLanes<T> ? load(from) : load_some(from, lanes, fill);
}

template <typename T>
inline void store_lanes(T* to, Vector<T> v, int64_t lanes) {
  if (lanes == kLanes<T>) {
    store(to, v);
  } else {
    store_some(to, v, lanes);
  }
}

template <typename T>
inline T sum_lanes(Vector<T> v) {
  T sum = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    sum += v[lane];
  }
  return sum;
}

// exp(x) for x <= log(largest finite number), within 2 units in the last place. Below the
// smallest normal number it stays there; NaN stays NaN.
//   n = round(x / ln 2), r = x - n ln 2 in two parts, e^r by a polynomial, times 2^n.
inline Vector<float> exp(Vector<float> x) {
  constexpr float lowest = -87.33654f;
  x = x < lowest ? Vector<float>{} + lowest : x;
  constexpr float magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
  const Vector<float> shifted = x * 1.44269504088896341f + magic;
  const Vector<float> n = shifted - magic;
  const Vector<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // Minimax on [-ln2/2, ln2/2] (Cephes' expf).
  Vector<float> p = Vector<float>{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Integers<float> exponent = ((Integers<float>)shifted + 127) << 23;
  return p * (Vector<float>)exponent;
}

inline Vector<double> exp(Vector<double> x) {
  constexpr double lowest = -708.39;
  x = x < lowest ? Vector<double>{} + lowest : x;
  constexpr double magic = 6755399441055744.0; // 1.5 * 2^52
  const Vector<double> shifted = x * 1.44269504088896340736 + magic;
  const Vector<double> n = shifted - magic;
  const Vector<double> r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  // Taylor: r^14/14! is below 5e-18 on [-ln2/2, ln2/2].
  constexpr double coefficients[] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0,
                                     1.0 / 362880.0,     1.0 / 40320.0,     1.0 / 5040.0,     1.0 / 720.0,
                                     1.0 / 120.0,        1.0 / 24.0,        1.0 / 6.0,        0.5};
  Vector<double> p = Vector<double>{};
  for (const double coefficient : coefficients) {
    p = p * r + coefficient;
  }
  p = p * (r * r) + r + 1.0;
  const Integers<double> exponent = ((Integers<double>)shifted + 1023) << 52;
  return p * (Vector<double>)exponent;
}

} // namespace
} // namespace torchmargin::cpu
