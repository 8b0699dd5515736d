// One row of a tile whose logits change, or of one against all; and the largest entry that a block sees.
#pragma once

#include "kernels/device.cuh"
#include "kernels/tile.cuh"
#include "math/one_against_all.h"

namespace torchmargin::device {

// How a row's hard negatives change, in T.
template <typename T>
struct HardMap {
  T row_factor; // cosine = product * (class_factor * row_factor)
  T threshold;
  T a;
  T b;
  T scaled_d;
  double shift;

  // hard == nullptr: nothing changes.
  __device__ HardMap(const HardRow* hard, const ProductsTile& tile, int64_t row)
      : row_factor(tile.row_factors != nullptr ? static_cast<const T*>(tile.row_factors)[row] : T(1)),
        threshold(static_cast<T>(INFINITY)),
        a(T(0)),
        b(T(1)),
        scaled_d(T(0)),
        shift(NAN) {
    if (hard != nullptr) {
      threshold = static_cast<T>(hard[row].threshold);
      a = static_cast<T>(hard[row].a);
      b = static_cast<T>(hard[row].b);
      scaled_d = static_cast<T>(tile.scale * hard[row].d);
      shift = hard[row].shift;
    }
  }
};

template <typename T, int kCount>
struct ChangedLogits {
  Elements<T, kCount> before; // both without the bias
  Elements<T, kCount> after;
  Elements<T, kCount> slope; // dn/dc

  __device__
  ChangedLogits(const TileRow<T>& row, const HardMap<T>& hard, const Columns<T, kCount>& columns, int64_t first) {
    const Elements<T, kCount> product = row.products.template read<kCount>(first, T(0));
    TORCHMARGIN_UNROLL
    for (int e = 0; e < kCount; ++e) {
      const T z = scaled_product(product.values[e], columns.factors.values[e], row.scale);
      const T cosine = scaled_product(product.values[e], columns.factors.values[e], hard.row_factor);
      const bool above = cosine > hard.threshold;
      before.values[e] = z;
      after.values[e] = above ? changed_logit(z, cosine, hard.a, hard.b, hard.scaled_d) : z;
      slope.values[e] = above ? slope_of_change(cosine, hard.a, hard.b) : T(1);
    }
  }
};

// The sums of a block's threads, and the largest of what they have; the same for all of them. scratch: [kWarps].
__device__ inline double block_sum(double value, double* scratch) {
  return BlockTeam{static_cast<int>(threadIdx.x), scratch}.sum(value);
}

__device__ inline double block_max(double value, double* scratch) {
  value = warp_max(value);
  if (threadIdx.x % kWarp == 0) {
    scratch[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  double largest = scratch[0];
  for (int warp = 1; warp < kWarps; ++warp) {
    largest = scratch[warp] > largest ? scratch[warp] : largest;
  }
  __syncthreads(); // before the next use of `scratch`
  return largest;
}

// A logit with its class; the larger logit comes first, then the lower class.
struct Entry {
  double logit = -INFINITY;
  double place = INFINITY; // a whole number

  __device__ bool before(const Entry& other) const {
    return logit > other.logit || (logit == other.logit && place < other.place);
  }
};

// The first of all threads' entries, for all of them. scratch: [2 kWarps].
__device__ inline Entry block_first(Entry entry, double* scratch) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    Entry other;
    other.logit = __shfl_xor_sync(0xffffffffu, entry.logit, offset);
    other.place = __shfl_xor_sync(0xffffffffu, entry.place, offset);
    entry = other.before(entry) ? other : entry;
  }
  if (threadIdx.x % kWarp == 0) {
    scratch[threadIdx.x / kWarp] = entry.logit;
    scratch[kWarps + threadIdx.x / kWarp] = entry.place;
  }
  __syncthreads();
  Entry first;
  for (int warp = 0; warp < kWarps; ++warp) {
    Entry other;
    other.logit = scratch[warp];
    other.place = scratch[kWarps + warp];
    first = other.before(first) ? other : first;
  }
  __syncthreads(); // before the next use of `scratch`
  return first;
}

// z and dN/dc of another class, one against all: as the CPU's row kernels have them.
template <typename T>
struct BinaryMap {
  T row_factor;
  T scale;
  T bias;
  BinaryForm form;
  T cosine_of_margin;
  T sine_of_margin;

  __device__ BinaryMap(const BinaryForm& form_, const ProductsTile& tile, const void* bias_, int64_t row)
      : row_factor(tile.row_factors != nullptr ? static_cast<const T*>(tile.row_factors)[row] : T(1)),
        scale(static_cast<T>(tile.scale)),
        bias(bias_ != nullptr ? *static_cast<const T*>(bias_) : T(0)),
        form(form_),
        cosine_of_margin(static_cast<T>(cos(form_.margin))),
        sine_of_margin(static_cast<T>(sin(form_.margin))) {}

  __device__ static T power_of(T x, double power) {
    const bool whole = power == floor(power);
    if (whole && power >= 0.0 && power <= 64.0) {
      T result = T(1);
      T square = x;
      for (int rest = static_cast<int>(power); rest > 0; rest /= 2) {
        result = rest % 2 == 1 ? result * square : result;
        square *= square;
      }
      return result;
    }
    return x < T(0) && !whole ? T(0) : static_cast<T>(pow(static_cast<double>(x), power));
  }

  __device__ void evaluate(T cosine, T* z, T* slope) const {
    T inner = cosine;
    T inner_slope = T(1);
    if (form.kind == BinaryKind::angle) {
      const T square = (T(1) - cosine) * (T(1) + cosine);
      const T sine = square > T(0) ? sqrt(square) : T(0) * square;
      inner = cosine * cosine_of_margin + sine * sine_of_margin;
      inner_slope = square > T(0) ? cosine_of_margin - cosine / sine * sine_of_margin : cosine_of_margin;
    }
    const T added = form.kind == BinaryKind::cosine ? static_cast<T>(form.margin) : T(0);
    if (form.power == 1.0) {
      *z = (inner + added) * scale + bias;
      *slope = inner_slope;
    } else {
      const T half = (inner + T(1)) * T(0.5);
      *z = (power_of(half, form.power) * T(2) - T(1) + added) * scale + bias;
      *slope = power_of(half, form.power - 1.0) * static_cast<T>(form.power) * inner_slope;
    }
  }
};

} // namespace torchmargin::device
