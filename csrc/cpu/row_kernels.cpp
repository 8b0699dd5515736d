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

// Calls body(k, lanes) for each vector of float64 of a row, and lastly for what is left of one.
template <typename Body, typename Tail>
inline void for_each_wide(int64_t size, Body body, Tail tail) {
  int64_t k = 0;
  for (; k + kWide <= size; k += kWide) {
    body(k);
  }
  for (; k < size; ++k) {
    tail(k);
  }
}

template <typename T>
void distances(
    const T* x,
    const T* w,
    int64_t size,
    double inverse_x,
    double inverse_w,
    double* difference,
    double* sum) {
  Vector<double> differences[2] = {};
  Vector<double> sums[2] = {};
  int64_t k = 0;
  for (; k + 2 * kWide <= size; k += 2 * kWide) {
    for (int part = 0; part < 2; ++part) {
      const Vector<double> unit_x = widen(x + k + part * kWide) * inverse_x;
      const Vector<double> unit_w = widen(w + k + part * kWide) * inverse_w;
      const Vector<double> apart = unit_x - unit_w;
      const Vector<double> together = unit_x + unit_w;
      differences[part] += apart * apart;
      sums[part] += together * together;
    }
  }
  *difference = sum_lanes<double>(differences[0] + differences[1]);
  *sum = sum_lanes<double>(sums[0] + sums[1]);
  for (; k < size; ++k) {
    const double unit_x = static_cast<double>(x[k]) * inverse_x;
    const double unit_w = static_cast<double>(w[k]) * inverse_w;
    *difference += (unit_x - unit_w) * (unit_x - unit_w);
    *sum += (unit_x + unit_w) * (unit_x + unit_w);
  }
}

template <typename T>
void scale_row(const T* from, T* to, int64_t size, double factor) {
  for_each_wide(
      size, [&](int64_t k) { narrow(to + k, widen(from + k) * factor); },
      [&](int64_t k) { to[k] = static_cast<T>(static_cast<double>(from[k]) * factor); });
}

template <typename T>
void widen_row(const T* from, double* to, int64_t size, double factor) {
  for_each_wide(
      size, [&](int64_t k) { store(to + k, widen(from + k) * factor); },
      [&](int64_t k) { to[k] = static_cast<double>(from[k]) * factor; });
}

template <typename T>
void narrow_row(const double* from, T* to, int64_t size) {
  for_each_wide(
      size, [&](int64_t k) { narrow(to + k, load(from + k)); }, [&](int64_t k) { to[k] = static_cast<T>(from[k]); });
}

template <typename T>
void add_row(double* sum, const T* row, int64_t size, double factor) {
  for_each_wide(
      size, [&](int64_t k) { store(sum + k, load(sum + k) + widen(row + k) * factor); },
      [&](int64_t k) { sum[k] += static_cast<double>(row[k]) * factor; });
}

template <typename T>
double dot(const double* a, const T* b, int64_t size) {
  Vector<double> sums[2] = {};
  int64_t k = 0;
  for (; k + 2 * kWide <= size; k += 2 * kWide) {
    sums[0] += load(a + k) * widen(b + k);
    sums[1] += load(a + k + kWide) * widen(b + k + kWide);
  }
  double sum = sum_lanes<double>(sums[0] + sums[1]);
  for (; k < size; ++k) {
    sum += a[k] * static_cast<double>(b[k]);
  }
  return sum;
}

// For numbers and for vectors of them.
template <typename Number>
inline Number tangent_term(Number self, Number other, const TangentTerm& term) {
  const Number s = self * term.inverse_self;
  const Number o = other * term.inverse_other;
  const Number tangent = ((o + s * term.sign) - s * (term.sign * term.half)) * term.inverse_sine;
  return (s * term.radial - tangent * term.dtheta) * term.factor;
}

template <typename T>
void add_tangent(double* sum, const T* self, const T* other, int64_t size, const TangentTerm& term) {
  for_each_wide(
      size, [&](int64_t k) { store(sum + k, load(sum + k) + tangent_term(widen(self + k), widen(other + k), term)); },
      [&](int64_t k) { sum[k] += tangent_term(static_cast<double>(self[k]), static_cast<double>(other[k]), term); });
}

template <typename T>
void finish_row(
    T* products,
    const T* self,
    const T* other,
    int64_t size,
    const RowGradient& gradient,
    const TangentTerm& term) {
  const bool smoothed = gradient.smoothing != 0.0;
  const auto others = [&](int64_t k) {
    const Vector<double> value = widen(products + k) * gradient.unscale;
    return smoothed ? value + load(gradient.sum + k) * gradient.smoothing : value;
  };
  const auto other_at = [&](int64_t k) {
    const double value = static_cast<double>(products[k]) * gradient.unscale;
    return smoothed ? value + gradient.sum[k] * gradient.smoothing : value;
  };
  double along = 0.0;
  if (gradient.project) {
    Vector<double> sums = Vector<double>{};
    for_each_wide(
        size, [&](int64_t k) { sums += others(k) * widen(self + k); },
        [&](int64_t k) { along += other_at(k) * static_cast<double>(self[k]); });
    along = (along + sum_lanes<double>(sums)) * term.inverse_self * term.inverse_self;
  }
  const bool own = term.factor != 0.0;
  for_each_wide(
      size,
      [&](int64_t k) {
        const Vector<double> x = widen(self + k);
        Vector<double> value = others(k) - x * along;
        if (own) {
          value += tangent_term(x, widen(other + k), term);
        }
        narrow(products + k, value * gradient.outer);
      },
      [&](int64_t k) {
        const double x = static_cast<double>(self[k]);
        double value = other_at(k) - x * along;
        if (own) {
          value += tangent_term(x, static_cast<double>(other[k]), term);
        }
        products[k] = static_cast<T>(value * gradient.outer);
      });
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
constexpr RowKernels<T> kTable{
    .squared_norm = squared_norm<T>,
    .distances = distances<T>,
    .scale_row = scale_row<T>,
    .widen_row = widen_row<T>,
    .narrow_row = narrow_row<T>,
    .add_row = add_row<T>,
    .dot = dot<T>,
    .add_tangent = add_tangent<T>,
    .finish_row = finish_row<T>,
    .sum_block = sum_block<T>,
    .softmax_row = softmax_row<T>,
    .project_row = project_row<T>};

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
