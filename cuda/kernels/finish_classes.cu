// Products to rows of grad_weight and grad_bias. The classes without rows of their own, nearly all of them: a warp
// each, chunk by chunk. Those that have some are put aside and finished all at once, a block each.
#include "kernels/device.cuh"
#include "kernels/launch.h"
#include "sweep/dispatch.h"
#include "sweep/finish_bodies.h"

namespace torchmargin::device {
namespace {

constexpr int kSlice = 1024; // features that a block holds at a time, in float64
constexpr int kTerms = 64; // rows of a class that it looks at together

// Where the first of rising numbers that is not below `value` stands: by a warp, the last of 32 parts at a time.
__device__ int64_t first_not_below(const int64_t* numbers, int64_t count, int64_t value, int lane) {
  int64_t first = 0;
  while (count > 0) {
    const int64_t part = (count + kWarp - 1) / kWarp;
    const int64_t begin = lane * part;
    const int64_t end = begin + part < count ? begin + part : count;
    const bool below = begin < count && numbers[first + end - 1] < value;
    const int64_t whole = part * __popc(__ballot_sync(0xffffffffu, below));
    if (whole >= count) {
      return first + count;
    }
    first += whole;
    count = (part < count - whole ? part : count - whole) - 1; // its last one is not below
  }
  return first;
}

// Products and weight of a class as a warp reads them. What a lane sees first is in its registers from the start.
template <typename Scalar, typename T>
struct ClassInRegisters {
  static constexpr int kCount = elements_per_thread<Scalar, T>();
  static constexpr int kHeld = kCount == 8 ? 2 : 4;
  static constexpr int64_t kStep = kWarp * kCount;
  int64_t features;
  int64_t first; // of this lane's
  Row<const T> products;
  Row<const Scalar> weight;
  Elements<T, kCount> held_products[kHeld];
  Elements<Scalar, kCount> held_weight[kHeld];

  __device__ ClassInRegisters(const FinishClassesArgs& args, int64_t local, int lane)
      : features(args.context.features),
        first(static_cast<int64_t>(lane) * kCount),
        products(static_cast<const T*>(args.products) + local * args.products_row_stride, features),
        weight(
            static_cast<const Scalar*>(args.weight.data) + local * args.weight.row_stride,
            features,
            args.weight.column_stride) {
    TORCHMARGIN_UNROLL
    for (int part = 0; part < kHeld; ++part) {
      held_products[part] = products.template read<kCount>(first + part * kStep, T(0));
      held_weight[part] = weight.template read<kCount>(first + part * kStep, Scalar(0));
    }
  }

  // body(k, products, weight) for all of a lane's features.
  template <typename Body>
  __device__ void for_each(Body body) const {
    TORCHMARGIN_UNROLL
    for (int part = 0; part < kHeld; ++part) {
      if (first + part * kStep < features) {
        body(first + part * kStep, held_products[part], held_weight[part]);
      }
    }
    for (int64_t k = first + kHeld * kStep; k < features; k += kStep) {
      body(k, products.template read<kCount>(k, T(0)), weight.template read<kCount>(k, Scalar(0)));
    }
  }
};

// No row has this class as its target, in T. NB: without smoothing nothing is asked for each feature.
template <bool kSmoothed, typename Scalar, typename T>
__device__ void finish_plain_class(
    const FinishClassesArgs& args,
    int64_t local,
    const ClassInRegisters<Scalar, T>& held,
    const WarpTeam& team) {
  constexpr int kCount = ClassInRegisters<Scalar, T>::kCount;
  using Products = Elements<T, kCount>;
  using Weights = Elements<Scalar, kCount>;
  const Row<Scalar> out(static_cast<Scalar*>(args.grad_weight) + local * held.features, held.features);
  T unscale = static_cast<T>(1.0 / *args.products_scale);
  const T inverse = args.context.normalize_weight ? static_cast<const T*>(args.inverse_norms)[local] : T(1);
  if (args.products_lack_norms) {
    unscale *= inverse;
  }
  const double smoothing = args.context.margin.scale * static_cast<double>(inverse);
  const auto gradient_of = [&](int64_t k, int e, T product) {
    T value = unscale * product;
    if (kSmoothed && k + e < held.features) {
      value += static_cast<T>(smoothing * args.input_sum[k + e]);
    }
    return value;
  };
  T along = T(0); // the part along w, which is taken away
  if (args.context.normalize_weight) {
    double sum = 0.0;
    held.for_each([&](int64_t k, const Products& p, const Weights& w) {
      T partial = T(0);
      TORCHMARGIN_UNROLL
      for (int e = 0; e < kCount; ++e) {
        partial += gradient_of(k, e, p.values[e]) * static_cast<T>(w.values[e]);
      }
      sum += static_cast<double>(partial);
    });
    along = static_cast<T>(team.sum(sum)) * inverse * inverse;
  }
  held.for_each([&](int64_t k, const Products& p, const Weights& w) {
    Elements<Scalar, kCount> gradient;
    TORCHMARGIN_UNROLL
    for (int e = 0; e < kCount; ++e) {
      gradient.values[e] = static_cast<Scalar>(gradient_of(k, e, p.values[e]) - along * static_cast<T>(w.values[e]));
    }
    out.write(k, gradient);
  });
}

template <bool kSmoothed, typename Scalar, typename T>
__global__ void finish_plain_classes_kernel(FinishClassesArgs args) {
  const int64_t local = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (local >= args.class_count) {
    return; // the whole warp
  }
  const WarpTeam team{static_cast<int>(threadIdx.x % kWarp)};
  const ClassInRegisters<Scalar, T> held(args, local, team.rank); // NB: on its way while the targets are searched
  const int64_t class_index = args.first_class + local;
  const int64_t place = first_not_below(args.sorted_target, args.rows, class_index, team.rank);
  if (place < args.rows && args.sorted_target[place] == class_index) {
    const Row<T> own(static_cast<T*>(args.own_products) + place * held.features, held.features);
    held.for_each([&](int64_t k, const auto& p, const auto& /*w*/) { own.write(k, p); });
    return;
  }
  if (args.bias_products != nullptr && team.rank == 0) {
    finish_bias<T>(args, local, {args.sorted_row, args.sorted_row});
  }
  finish_plain_class<kSmoothed, Scalar, T>(args, local, held, team);
}

// The bias alone is wanted: a thread a class.
template <typename T>
__global__ void finish_plain_biases_kernel(FinishClassesArgs args) {
  const int64_t local = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (local >= args.class_count) {
    return;
  }
  const int64_t class_index = args.first_class + local;
  int64_t begin = 0;
  for (int64_t end = args.rows; begin < end;) {
    const int64_t middle = (begin + end) / 2;
    args.sorted_target[middle] < class_index ? begin = middle + 1 : end = middle;
  }
  if (begin == args.rows || args.sorted_target[begin] != class_index) {
    finish_bias<T>(args, local, {args.sorted_row, args.sorted_row});
  }
}

// The class of the block's place among the sorted targets, if its row is the first of its class and the class is here;
// -1: none.
__device__ int64_t class_of_place(const FinishClassesArgs& args, int64_t place) {
  const int64_t target = args.sorted_target[place];
  const int64_t local = target - args.first_class;
  const bool first = place == 0 || args.sorted_target[place - 1] != target;
  return first && local >= 0 && local < args.class_count ? local : -1;
}

template <typename Scalar, typename T>
__global__ void finish_own_classes_kernel(FinishClassesArgs args) {
  TORCHMARGIN_SHARED(double, scratch, kSlice);
  TORCHMARGIN_SHARED(double, partial, kWarps);
  TORCHMARGIN_SHARED(OwnTerm, terms, kTerms);
  const int64_t place = blockIdx.x;
  const int64_t local = class_of_place(args, place);
  if (local < 0) {
    return; // the whole block
  }
  int64_t end = place + 1;
  while (end < args.rows && args.sorted_target[end] == args.sorted_target[place]) {
    ++end;
  }
  const RowsOfClass rows{args.sorted_row + place, args.sorted_row + end};
  if (args.bias_products != nullptr && threadIdx.x == 0) {
    finish_bias<T>(args, local, rows);
  }
  if (args.products == nullptr) {
    return;
  }
  const auto for_own_terms = [&](RowsOfClass own, auto body) {
    for (const int64_t* first = own.begin; first < own.end; first += kTerms) {
      const int64_t left = own.end - first;
      const int count = left < kTerms ? static_cast<int>(left) : kTerms;
      __syncthreads(); // nobody reads the last ones any more
      if (static_cast<int>(threadIdx.x) < count) {
        terms[threadIdx.x] = own_term(args, first[threadIdx.x]);
      }
      __syncthreads();
      for (int i = 0; i < count; ++i) {
        body(first[i], terms[i]);
      }
    }
  };
  const BlockTeam team{static_cast<int>(threadIdx.x), partial};
  finish_class<Scalar, T, Scalar, Scalar>(args, place, local, rows, scratch, kSlice, team, for_own_terms);
}

} // namespace

void launch_finish_classes(const FinishClassesArgs& args, c10::ScalarType /*acc*/, cudaStream_t stream) {
  if (args.class_count == 0) {
    return;
  }
  with_dtype_and_acc(args.context.input.dtype, [&](auto scalar, auto zero) {
    using Scalar = decltype(scalar);
    using T = decltype(zero);
    if (args.products == nullptr) {
      const unsigned blocks = static_cast<unsigned>((args.class_count + kThreads - 1) / kThreads);
      TORCHMARGIN_LAUNCH(finish_plain_biases_kernel<T>, blocks, kThreads, stream, args);
      return;
    }
    const auto kernel = args.input_sum != nullptr ? finish_plain_classes_kernel<true, Scalar, T>
                                                  : finish_plain_classes_kernel<false, Scalar, T>;
    TORCHMARGIN_LAUNCH(kernel, warp_blocks(args.class_count), kThreads, stream, args);
  });
}

void launch_finish_own_classes(const FinishClassesArgs& args, c10::ScalarType /*acc*/, cudaStream_t stream) {
  if (args.rows == 0) {
    return;
  }
  with_dtype_and_acc(args.context.input.dtype, [&](auto scalar, auto zero) {
    const auto kernel = finish_own_classes_kernel<decltype(scalar), decltype(zero)>;
    TORCHMARGIN_LAUNCH(kernel, static_cast<unsigned>(args.rows), kThreads, stream, args);
  });
}

} // namespace torchmargin::device
