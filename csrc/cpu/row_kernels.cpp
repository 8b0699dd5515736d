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
    store_lanes(out + j, flushed, lanes);
  });
}

// A vector of changed logits, and how they came to be.
template <typename T>
struct Changed {
  Vector<T> before; // both without the bias
  Vector<T> after;
  Vector<T> bias;
  Vector<T> slope; // dn/dc
  Vector<T> class_factor;
};

// Calls body(changed, first, lanes) for each vector of a row.
template <typename T, typename Body>
inline void
for_each_changed(const T* products, int64_t size, const LogitMap<T>& map, const HardMap<T>& hard, Body body) {
  const Vector<T> one = Vector<T>{} + T(1);
  for (int64_t j = 0; j < size; j += kLanes<T>) {
    const int lanes = size - j < kLanes<T> ? static_cast<int>(size - j) : kLanes<T>;
    const auto read = [&](const T* from, T fill) { return load_lanes(from + j, lanes, fill); };
    Changed<T> changed{};
    changed.class_factor = map.class_factors != nullptr ? read(map.class_factors, T(1)) : one;
    changed.bias = map.bias != nullptr ? read(map.bias, T(0)) : Vector<T>{};
    const Vector<T> product = read(products, T(0));
    changed.before = scaled_product(product, changed.class_factor, map.scale);
    const Vector<T> cosine = scaled_product(product, changed.class_factor, hard.row_factor);
    const auto above = cosine > hard.threshold;
    changed.after = above ? changed_logit(changed.before, cosine, hard.a, hard.b, hard.scaled_d) : changed.before;
    changed.slope = above ? slope_of_change(cosine, hard.a, hard.b) : one;
    body(changed, j, lanes);
  }
}

template <typename T>
BlockSum sum_hard_block(
    const T* products,
    int64_t size,
    LogitMap<T> map,
    const HardMap<T>& hard,
    double shift,
    double* logit_sum,
    bool sum_of_changes) {
  constexpr T infinity = __builtin_huge_val();
  Vector<T> largest_before = Vector<T>{} - infinity;
  Vector<T> largest = Vector<T>{} - infinity;
  Vector<T> logits = Vector<T>{};
  for_each_changed(products, size, map, hard, [&](const Changed<T>& changed, int64_t, int lanes) {
    const Vector<T> before = keep_lanes<T>(changed.before + changed.bias, lanes, -infinity);
    const Vector<T> after = keep_lanes<T>(changed.after + changed.bias, lanes, -infinity);
    largest_before = before > largest_before ? before : largest_before;
    largest = after > largest ? after : largest;
    const Vector<T> counted = sum_of_changes ? changed.after - changed.before : changed.after;
    logits += keep_lanes<T>(counted, lanes, T(0));
  });
  if (logit_sum != nullptr) {
    *logit_sum += static_cast<double>(sum_lanes<T>(logits));
  }
  T maximum = -infinity;
  T maximum_before = -infinity;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    maximum = largest[lane] > maximum ? largest[lane] : maximum;
    maximum_before = largest_before[lane] > maximum_before ? largest_before[lane] : maximum_before;
  }
  BlockSum block{0.0, 0.0, static_cast<double>(maximum_before)};
  // NB: as in sum_block.
  if (maximum == -infinity || maximum == infinity) {
    block.sum = maximum == infinity ? 1.0 : 0.0;
    block.shift = static_cast<double>(maximum);
    for_each_changed(products, size, map, hard, [&](const Changed<T>& changed, int64_t, int lanes) {
      const Vector<T> z = changed.after + changed.bias;
      for (int lane = 0; lane < lanes; ++lane) {
        block.sum = z[lane] == z[lane] ? block.sum : static_cast<double>(z[lane]);
      }
    });
    return block;
  }
  const T from = shift == shift ? static_cast<T>(shift) : maximum;
  Vector<T> sum = Vector<T>{};
  for_each_changed(products, size, map, hard, [&](const Changed<T>& changed, int64_t, int lanes) {
    const Vector<T> z = changed.after + changed.bias;
    // NB: exp() makes a small number of -infinity.
    sum += keep_lanes<T>(z == -infinity ? Vector<T>{} : exp(z - from), lanes, T(0));
  });
  block.shift = static_cast<double>(from);
  block.sum = static_cast<double>(sum_lanes<T>(sum));
  return block;
}

template <typename T>
void logits_row(const T* products, T* out, int64_t size, LogitMap<T> map) {
  for_each_vector(
      products, size, map, [&](Vector<T> z, Vector<T>, int64_t j, int lanes) { store_lanes(out + j, z, lanes); });
}

template <typename T>
void weigh_row(
    const T* products,
    T* out,
    int64_t size,
    LogitMap<T> map,
    const HardMap<T>& hard,
    const WeightMap<T>& weights) {
  const T high = static_cast<T>(weights.lse);
  const double rest = weights.lse - static_cast<double>(high);
  const T low = rest - rest == 0.0 ? static_cast<T>(rest) : T(0);
  for_each_changed(products, size, map, hard, [&](const Changed<T>& changed, int64_t j, int lanes) {
    const Vector<T> exponent = ((changed.after + changed.bias) - high) - low;
    const Vector<T> q = exponent < T(kFlush) ? Vector<T>{} : exp(exponent); // NaN stays
    const Vector<T> slope = weights.slopes ? changed.slope : Vector<T>{} + T(1);
    Vector<T> weight = q * weights.of_lse;
    if (weights.sum_of_changes) {
      weight = weight * slope + (slope - T(1)) * weights.of_sum;
    } else {
      weight = (weight + weights.of_sum) * slope;
    }
    if (weights.times_class_factors) {
      weight *= changed.class_factor;
    }
    store_lanes(out + j, weight, lanes);
  });
}

// log(1 + x) for x in [0, 1], exact to the last digits: 2 artanh(x / (2 + x)), by its series.
inline Vector<float> log_of_one_and(Vector<float> x) {
  const Vector<float> s = x / (x + 2.0f);
  const Vector<float> square = s * s;
  Vector<float> sum = Vector<float>{} + 1.0f / 15.0f; // the next term is below 1e-9
  for (int k = 13; k > 0; k -= 2) {
    sum = sum * square + 1.0f / static_cast<float>(k);
  }
  return s * sum * 2.0f;
}

inline Vector<double> log_of_one_and(Vector<double> x) {
  const Vector<double> s = x / (x + 2.0);
  const Vector<double> square = s * s;
  Vector<double> sum = Vector<double>{} + 1.0 / 33.0; // the next term is below 1e-18
  for (int k = 31; k > 0; k -= 2) {
    sum = sum * square + 1.0 / static_cast<double>(k);
  }
  return s * sum * 2.0;
}

template <typename T>
inline Vector<T> power_of(Vector<T> x, double power) {
  const bool whole = power == __builtin_floor(power);
  if (whole && power >= 0 && power <= 64) {
    Vector<T> result = Vector<T>{} + T(1);
    Vector<T> square = x;
    for (int rest = static_cast<int>(power); rest > 0; rest /= 2) {
      result = rest % 2 == 1 ? result * square : result;
      square *= square;
    }
    return result;
  }
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    x[lane] = x[lane] < T(0) && !whole ? T(0) : static_cast<T>(__builtin_pow(static_cast<double>(x[lane]), power));
  }
  return x;
}

// A vector of the other classes' curves N(c). At c = +-1 the angle's slope is infinite, and its direction nothing:
// there it is left out.
template <typename T>
struct BinaryCurve {
  Vector<T> cosine;
  Vector<T> z;
  Vector<T> slope; // dN/dc
  Vector<T> class_factor;
};

// Calls body(curve, first, lanes) for each vector of a row.
template <typename T, typename Body>
inline void for_each_binary(
    const T* products,
    int64_t size,
    const LogitMap<T>& map,
    const BinaryMap<T>& binary,
    bool with_slope,
    Body body) {
  const Vector<T> one = Vector<T>{} + T(1);
  for (int64_t j = 0; j < size; j += kLanes<T>) {
    const int lanes = size - j < kLanes<T> ? static_cast<int>(size - j) : kLanes<T>;
    const auto read = [&](const T* from, T fill) { return load_lanes(from + j, lanes, fill); };
    BinaryCurve<T> curve{};
    curve.class_factor = map.class_factors != nullptr ? read(map.class_factors, T(1)) : one;
    curve.cosine = scaled_product(read(products, T(0)), curve.class_factor, binary.row_factor);
    Vector<T> inner = curve.cosine;
    Vector<T> inner_slope = one;
    if (binary.of_angle) {
      const Vector<T> square = (one - curve.cosine) * (one + curve.cosine);
      const auto inside = square > T(0);
      Vector<T> sine = square;
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        sine[lane] =
            inside[lane] ? static_cast<T>(__builtin_sqrt(static_cast<double>(square[lane]))) : T(0) * square[lane];
      }
      inner = curve.cosine * binary.cosine_of_margin + sine * binary.sine_of_margin;
      inner_slope = inside ? binary.cosine_of_margin - curve.cosine / sine * binary.sine_of_margin
                           : Vector<T>{} + binary.cosine_of_margin;
    }
    if (binary.power == 1.0) {
      curve.z = (inner + binary.added) * binary.scale + binary.bias;
      curve.slope = inner_slope;
    } else {
      const Vector<T> half = (inner + T(1)) * T(0.5);
      curve.z = (power_of<T>(half, binary.power) * T(2) - T(1) + binary.added) * binary.scale + binary.bias;
      if (with_slope) {
        curve.slope = power_of<T>(half, binary.power - 1.0) * static_cast<T>(binary.power) * inner_slope;
      }
    }
    body(curve, j, lanes);
  }
}

template <typename T>
BinarySum sum_binary_block(const T* products, int64_t size, LogitMap<T> map, const BinaryMap<T>& binary) {
  constexpr T infinity = __builtin_huge_val();
  Vector<T> largest = Vector<T>{} - infinity;
  Vector<T> softplus = Vector<T>{};
  Vector<T> slope = Vector<T>{};
  for_each_binary(
      products, size, map, binary, /*with_slope=*/false, [&](const BinaryCurve<T>& curve, int64_t, int lanes) {
        const Vector<T> plain = keep_lanes<T>(curve.cosine * binary.scale, lanes, -infinity);
        largest = plain > largest ? plain : largest;
        const Vector<T> small = exp(curve.z > T(0) ? -curve.z : curve.z);
        const Vector<T> part = T(1) / (small + T(1));
        softplus += keep_lanes<T>((curve.z > T(0) ? curve.z : Vector<T>{}) + log_of_one_and(small), lanes, T(0));
        slope += keep_lanes<T>(curve.z > T(0) ? part : small * part, lanes, T(0));
      });
  T maximum = -infinity;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    maximum = largest[lane] > maximum ? largest[lane] : maximum;
  }
  return {
      static_cast<double>(sum_lanes<T>(softplus)), static_cast<double>(sum_lanes<T>(slope)),
      static_cast<double>(maximum)};
}

template <typename T>
void weigh_binary_row(
    const T* products,
    T* out,
    int64_t size,
    LogitMap<T> map,
    const BinaryMap<T>& binary,
    T factor,
    bool times_class_factors) {
  for_each_binary(
      products, size, map, binary, /*with_slope=*/true, [&](const BinaryCurve<T>& curve, int64_t j, int lanes) {
        const Vector<T> small = exp(curve.z > T(0) ? -curve.z : curve.z);
        const Vector<T> part = T(1) / (small + T(1));
        // NB: as for Q, what is too small to count would make the products denormal.
        const Vector<T> sigmoid = curve.z > T(0) ? part : (curve.z < T(kFlush) ? Vector<T>{} : small * part);
        Vector<T> weight = sigmoid * curve.slope * factor;
        if (times_class_factors) {
          weight *= curve.class_factor;
        }
        store_lanes(out + j, weight, lanes);
      });
}

template <typename T>
void fold_row(
    const T* products,
    int64_t plane_stride,
    int64_t size,
    int64_t centers,
    const T* factors,
    T* out,
    uint8_t* winner) {
  for (int64_t j = 0; j < size; j += kLanes<T>) {
    const int64_t lanes = size - j < kLanes<T> ? size - j : kLanes<T>;
    const auto cosine = [&](int64_t k) {
      const T* const from = products + k * plane_stride + j;
      Vector<T> value = load_lanes(from, lanes, T(0));
      if (factors != nullptr) {
        const T* const own = factors + k * size + j;
        value *= load_lanes(own, lanes, T(1));
      }
      return value;
    };
    Vector<T> best = cosine(0);
    Integers<T> place = Integers<T>{};
    for (int64_t k = 1; k < centers; ++k) {
      const Vector<T> value = cosine(k);
      const Integers<T> better = (value > best) | ((value != value) & (best == best));
      best = better ? value : best;
      place = better ? Integers<T>{} + static_cast<typename SimdTypes<T>::Integer>(k) : place;
    }
    store_lanes(out + j, best, lanes);
    for (int64_t lane = 0; winner != nullptr && lane < lanes; ++lane) {
      winner[j + lane] = static_cast<uint8_t>(place[lane]);
    }
  }
}

template <typename T>
void spread_row(
    T* weights,
    int64_t plane_stride,
    int64_t size,
    int64_t centers,
    const T* factors,
    const uint8_t* winner) {
  for (int64_t j = 0; j < size; j += kLanes<T>) {
    const int64_t lanes = size - j < kLanes<T> ? size - j : kLanes<T>;
    const Vector<T> weight = load_lanes(weights + j, lanes, T(0));
    Integers<T> place = Integers<T>{};
    for (int64_t lane = 0; lane < lanes; ++lane) {
      place[lane] = winner[j + lane];
    }
    for (int64_t k = centers - 1; k >= 0; --k) { // the first plane last, for the weights stand there
      Vector<T> value = weight;
      if (factors != nullptr) {
        const T* const own = factors + k * size + j;
        value *= load_lanes(own, lanes, T(1));
      }
      value = place == static_cast<typename SimdTypes<T>::Integer>(k) ? value : Vector<T>{};
      T* const to = weights + k * plane_stride + j;
      store_lanes(to, value, lanes);
    }
  }
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
    .sum_hard_block = sum_hard_block<T>,
    .logits_row = logits_row<T>,
    .softmax_row = softmax_row<T>,
    .weigh_row = weigh_row<T>,
    .sum_binary_block = sum_binary_block<T>,
    .weigh_binary_row = weigh_binary_row<T>,
    .fold_row = fold_row<T>,
    .spread_row = spread_row<T>,
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
