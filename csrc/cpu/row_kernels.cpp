// Compiled once per instruction set, with TORCHMARGIN_CPU_ISA naming the namespace.
// NB: it includes no header with inline functions that other files use; see simd.h.
#include "cpu/row_kernels.h"

#include "cpu/simd.h"
#include "math/logit.h"

namespace torchmargin::cpu {
namespace {

// Half as many lanes as a vector of T has, for widening float to double.
typedef float HalfVector __attribute__((vector_size(kVectorBytes / 2)));

inline Vector<double> widen(const float* from) {
  HalfVector half;
  __builtin_memcpy(&half, from, sizeof(half));
  return __builtin_convertvector(half, Vector<double>);
}

inline Vector<double> widen(const double* from) {
  return load(from);
}

inline void narrow(float* to, Vector<double> v) {
  const HalfVector half = __builtin_convertvector(v, HalfVector);
  __builtin_memcpy(to, &half, sizeof(half));
}

inline void narrow(double* to, Vector<double> v) {
  store(to, v);
}

constexpr int kWide = kLanes<double>;

template <typename T>
double squared_norm(const T* row, int64_t size) {
  Vector<double> sums[2] = {};
  int64_t k = 0;
  for (; k + 2 * kWide <= size; k += 2 * kWide) {
    const Vector<double> a = widen(row + k);
    const Vector<double> b = widen(row + k + kWide);
    sums[0] += a * a;
    sums[1] += b * b;
  }
  double sum = sum_lanes<double>(sums[0] + sums[1]);
  for (; k < size; ++k) {
    sum += static_cast<double>(row[k]) * static_cast<double>(row[k]);
  }
  return sum;
}

template <typename T>
void scale_row(T* row, int64_t size, double factor) {
  int64_t k = 0;
  for (; k + kWide <= size; k += kWide) {
    narrow(row + k, widen(row + k) * factor);
  }
  for (; k < size; ++k) {
    row[k] = static_cast<T>(static_cast<double>(row[k]) * factor);
  }
}

template <typename T>
void add_row(double* sum, const T* row, int64_t size, double factor) {
  int64_t k = 0;
  for (; k + kWide <= size; k += kWide) {
    store(sum + k, load(sum + k) + widen(row + k) * factor);
  }
  for (; k < size; ++k) {
    sum[k] += static_cast<double>(row[k]) * factor;
  }
}

// Calls body(z, class_factor, first, lanes) for each vector of logits of a row; in the
// last one only `lanes` count.
template <typename T, typename Body>
inline void for_each_vector(const T* products, int64_t size, const LogitMap<T>& map, Body body) {
  const Vector<T> one = Vector<T>{} + T(1);
  int64_t j = 0;
  for (; j + kLanes<T> <= size; j += kLanes<T>) {
    const Vector<T> class_factor = map.class_factors != nullptr ? load(map.class_factors + j) : one;
    Vector<T> z = scaled_product(load(products + j), class_factor, map.scale);
    if (map.bias != nullptr) {
      z += load(map.bias + j);
    }
    body(z, class_factor, j, kLanes<T>);
  }
  if (j < size) {
    const int64_t left = size - j;
    const Vector<T> class_factor = map.class_factors != nullptr ? load_some(map.class_factors + j, left, T(1)) : one;
    Vector<T> z = scaled_product(load_some(products + j, left, T(0)), class_factor, map.scale);
    if (map.bias != nullptr) {
      z += load_some(map.bias + j, left, T(0));
    }
    body(z, class_factor, j, static_cast<int>(left));
  }
}

// v in the first `lanes` lanes, `fill` in the others.
template <typename T>
inline Vector<T> keep_lanes(Vector<T> v, int lanes, T fill) {
  if (lanes < kLanes<T>) {
    for (int lane = lanes; lane < kLanes<T>; ++lane) {
      v[lane] = fill;
    }
  }
  return v;
}

template <typename T>
BlockSum sum_block(const T* products, int64_t size, LogitMap<T> map, bool bounded) {
  constexpr T infinity = __builtin_huge_val();
  Vector<T> largest = Vector<T>{} - infinity;
  Vector<T> sum = Vector<T>{};
  if (bounded) {
    for_each_vector(products, size, map, [&](Vector<T> z, Vector<T>, int64_t, int lanes) {
      const Vector<T> counted = keep_lanes<T>(z, lanes, -infinity);
      largest = counted > largest ? counted : largest;
      sum += keep_lanes<T>(exp(z), lanes, T(0));
    });
  } else {
    for_each_vector(products, size, map, [&](Vector<T> z, Vector<T>, int64_t, int lanes) {
      const Vector<T> counted = keep_lanes<T>(z, lanes, -infinity);
      largest = counted > largest ? counted : largest;
    });
  }
  T maximum = -infinity;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    maximum = largest[lane] > maximum ? largest[lane] : maximum;
  }
  if (bounded) {
    return {0.0, static_cast<double>(sum_lanes<T>(sum)), static_cast<double>(maximum)};
  }
  // NB: z - maximum would be NaN. Every logit is -inf (a mask) or NaN, or one is +inf and so is the sum.
  if (maximum == -infinity || maximum == infinity) {
    double sum_or_nan = maximum == infinity ? 1.0 : 0.0;
    for_each_vector(products, size, map, [&](Vector<T> z, Vector<T>, int64_t, int lanes) {
      for (int lane = 0; lane < lanes; ++lane) {
        sum_or_nan = z[lane] == z[lane] ? sum_or_nan : static_cast<double>(z[lane]);
      }
    });
    return {static_cast<double>(maximum), sum_or_nan, static_cast<double>(maximum)};
  }
  for_each_vector(products, size, map, [&](Vector<T> z, Vector<T>, int64_t, int lanes) {
    sum += keep_lanes<T>(exp(z - maximum), lanes, T(0));
  });
  return {static_cast<double>(maximum), static_cast<double>(sum_lanes<T>(sum)), static_cast<double>(maximum)};
}

template <typename T>
void softmax_row(const T* products, T* out, int64_t size, LogitMap<T> map, double lse, bool times_class_factors) {
  const T high = static_cast<T>(lse);
  const double rest = lse - static_cast<double>(high);
  const T low = rest - rest == 0.0 ? static_cast<T>(rest) : T(0); // 0 where the lse is not finite
  for_each_vector(products, size, map, [&](Vector<T> z, Vector<T> class_factor, int64_t j, int lanes) {
    const Vector<T> exponent = (z - high) - low;
    const Vector<T> q = exp(exponent) * (times_class_factors ? class_factor : Vector<T>{} + T(1));
    const Vector<T> flushed = exponent < T(kFlush) ? Vector<T>{} : q; // NaN stays
    if (lanes == kLanes<T>) {
      store(out + j, flushed);
    } else {
      store_some(out + j, flushed, lanes);
    }
  });
}

template <typename T>
void project_row(const T* row, const T* w, T* out, int64_t size, T inverse_norm, T unscale) {
  Vector<T> dots[4] = {};
  int64_t k = 0;
  if (inverse_norm == T(0)) { // nothing to take away, and w may hold an infinity
    for (; k < size; ++k) {
      out[k] = row[k] * unscale;
    }
    return;
  }
  for (; k + 4 * kLanes<T> <= size; k += 4 * kLanes<T>) {
    for (int part = 0; part < 4; ++part) {
      const int64_t at = k + part * kLanes<T>;
      dots[part] += load(row + at) * load(w + at);
    }
  }
  T dot = sum_lanes<T>((dots[0] + dots[1]) + (dots[2] + dots[3]));
  for (; k < size; ++k) {
    dot += row[k] * w[k];
  }
  const T along = dot * inverse_norm;
  for (k = 0; k + kLanes<T> <= size; k += kLanes<T>) {
    store(out + k, (load(row + k) - along * (load(w + k) * inverse_norm)) * unscale);
  }
  for (; k < size; ++k) {
    out[k] = (row[k] - along * (w[k] * inverse_norm)) * unscale;
  }
}

template <typename T>
constexpr RowKernels<T> kTable{squared_norm<T>, scale_row<T>, add_row<T>, sum_block<T>, softmax_row<T>, project_row<T>};

} // namespace

namespace TORCHMARGIN_CPU_ISA {
const RowKernels<float>& float_kernels() {
  return kTable<float>;
}
const RowKernels<double>& double_kernels() {
  return kTable<double>;
}
} // namespace TORCHMARGIN_CPU_ISA

} // namespace torchmargin::cpu
