// Adds a tile to each row's running sums where logits change, where the sum of the logits is wanted, or where the
// hardest classes are kept apart: a block a row. Without these accumulate_chunk.cu does it.
#include "kernels/head.cuh"
#include "kernels/launch.h"
#include "kernels/row_lse.cuh"
#include "sweep/dispatch.h"

namespace torchmargin::device {
namespace {

constexpr int kScratch = kRowLseScratch > 2 * kWarps ? kRowLseScratch : 2 * kWarps;

// The running sums of a row, in its thread 0.
struct Running {
  OnlineLse lse;
  double maximum;
  double logit_sum;
};

// Puts an entry into a row's list, which it belongs to, and what has no place any more into the sum. One thread does
// it.
template <typename T>
__device__ void insert(const Entry& entry, int64_t hardest, T* logits, int64_t* classes, OnlineLse& total) {
  if (classes[hardest - 1] >= 0) {
    total.combine({static_cast<double>(logits[hardest - 1]), 1.0});
  }
  int64_t place = hardest - 1;
  for (; place > 0; --place) {
    Entry other;
    other.logit = static_cast<double>(logits[place - 1]);
    other.place = static_cast<double>(classes[place - 1]);
    if (classes[place - 1] >= 0 && !entry.before(other)) {
      break;
    }
    logits[place] = logits[place - 1];
    classes[place] = classes[place - 1];
  }
  logits[place] = static_cast<T>(entry.logit);
  classes[place] = static_cast<int64_t>(entry.place);
}

template <typename T>
__global__ void accumulate_head_kernel(AccumulateChunkArgs args) {
  constexpr int kCount = elements_per_thread<T>();
  constexpr int64_t kStep = static_cast<int64_t>(kThreads) * kCount;
  TORCHMARGIN_SHARED(double, scratch, kScratch);
  const int64_t i = blockIdx.x;
  const ProductsTile& tile = args.tile;
  const TileRow<T> row(tile, i);
  const HardMap<T> hard(args.hard, tile, i);
  const int64_t count = tile.class_count;
  const int64_t begin = static_cast<int64_t>(threadIdx.x) * kCount;

  // The logits before they change, and what is summed of all.
  double largest = -INFINITY;
  double logit_sum = 0.0;
  for (int64_t j = begin; j < count; j += kStep) {
    const Columns<T, kCount> columns(tile, j);
    const ChangedLogits<T, kCount> z(row, hard, columns, j);
    T partial = T(0);
    TORCHMARGIN_UNROLL
    for (int e = 0; e < kCount; ++e) {
      if (j + e < count && j + e != row.own_column) {
        const double before = static_cast<double>(z.before.values[e] + columns.bias.values[e]);
        largest = before > largest ? before : largest;
        partial += args.sum_of_changes ? z.after.values[e] - z.before.values[e] : z.after.values[e];
      }
    }
    logit_sum += static_cast<double>(partial);
  }
  largest = block_max(largest, scratch);
  logit_sum = block_sum(logit_sum, scratch);

  Running running{OnlineLse{}, -INFINITY, 0.0};
  if (threadIdx.x == 0 && !args.first) {
    running.lse.shift = args.sums.shift[i];
    running.lse.sum = args.sums.sum[i];
    running.maximum = args.sums.maximum[i];
    running.logit_sum = args.logit_sum != nullptr ? args.logit_sum[i] : 0.0;
  }

  // The hardest: one after the other, as long as the tile has one that belongs to the list.
  T* const top_logit = static_cast<T*>(args.top_logit) + i * args.hardest;
  int64_t* const top_class = args.top_class + i * args.hardest;
  if (args.hardest > 0 && args.first) {
    for (int64_t k = threadIdx.x; k < args.hardest; k += kThreads) {
      top_logit[k] = static_cast<T>(-INFINITY);
      top_class[k] = -1;
    }
    __syncthreads();
  }
  Entry taken; // the last one; every entry of the tile up to it is in the list
  taken.logit = INFINITY;
  taken.place = -1.0;
  for (int64_t k = 0; k < args.hardest; ++k) {
    Entry best;
    for (int64_t j = begin; j < count; j += kStep) {
      const Elements<T, kCount> z = row.logits(j, Columns<T, kCount>(tile, j));
      for (int e = 0; e < kCount; ++e) {
        Entry other;
        other.logit = static_cast<double>(z.values[e]);
        other.place = static_cast<double>(tile.first_class + j + e);
        const bool counts = j + e < count && j + e != row.own_column && other.logit > -INFINITY; // not NaN
        best = counts && taken.before(other) && other.before(best) ? other : best;
      }
    }
    best = block_first(best, scratch);
    Entry last;
    last.logit = static_cast<double>(top_logit[args.hardest - 1]);
    last.place = top_class[args.hardest - 1] >= 0 ? static_cast<double>(top_class[args.hardest - 1]) : INFINITY;
    __syncthreads(); // all have read it
    if (best.place == INFINITY || !best.before(last)) {
      break; // the whole block
    }
    if (threadIdx.x == 0) {
      insert(best, args.hardest, top_logit, top_class, running.lse);
    }
    taken = best;
    __syncthreads();
  }

  // What is left, relative to the row's shift.
  const bool shifted = hard.shift == hard.shift;
  const T shift = shifted ? static_cast<T>(hard.shift) : T(0);
  const auto logits = [&](int64_t j) {
    const Columns<T, kCount> columns(tile, j);
    Elements<T, kCount> z = ChangedLogits<T, kCount>(row, hard, columns, j).after;
    TORCHMARGIN_UNROLL
    for (int e = 0; e < kCount; ++e) {
      const T logit = z.values[e] + columns.bias.values[e];
      Entry entry;
      entry.logit = static_cast<double>(logit);
      entry.place = static_cast<double>(tile.first_class + j + e);
      const bool apart = args.hardest > 0 && logit == logit && !taken.before(entry);
      z.values[e] = apart ? static_cast<T>(-INFINITY) : logit - shift;
    }
    return z;
  };
  const bool bounded = args.hard != nullptr ? shifted : args.bounded;
  RowLse added = row_lse<T, kCount>(logits, count, row.own_column, bounded, scratch);
  if (threadIdx.x == 0) {
    added.lse.shift += static_cast<double>(shift);
    running.lse.combine(added.lse);
    args.sums.shift[i] = running.lse.shift;
    args.sums.sum[i] = running.lse.sum;
    args.sums.maximum[i] = largest > running.maximum ? largest : running.maximum;
    if (args.logit_sum != nullptr) {
      args.logit_sum[i] = running.logit_sum + logit_sum;
    }
  }
}

template <typename T>
__global__ void add_binary_kernel(AddBinaryArgs args) {
  constexpr int kCount = elements_per_thread<T>();
  TORCHMARGIN_SHARED(double, scratch, kWarps);
  const int64_t i = blockIdx.x;
  const ProductsTile& tile = args.tile;
  const TileRow<T> row(tile, i);
  const BinaryMap<T> map(args.form, tile, args.bias, i);
  double softplus_sum = 0.0;
  double slope_sum = 0.0;
  double largest = -INFINITY;
  for (int64_t j = static_cast<int64_t>(threadIdx.x) * kCount; j < tile.class_count; j += kThreads * kCount) {
    const Columns<T, kCount> columns(tile, j);
    const Elements<T, kCount> product = row.products.template read<kCount>(j, T(0));
    T softplus_part = T(0);
    T slope_part = T(0);
    for (int e = 0; e < kCount; ++e) {
      if (j + e >= tile.class_count || j + e == row.own_column) {
        continue;
      }
      const T cosine = scaled_product(product.values[e], columns.factors.values[e], map.row_factor);
      T z;
      T slope;
      map.evaluate(cosine, &z, &slope);
      const T small = exp(z > T(0) ? -z : z);
      const T part = T(1) / (T(1) + small);
      softplus_part += (z > T(0) ? z : T(0)) + log1p(small);
      slope_part += z > T(0) ? part : small * part;
      const double plain = static_cast<double>(cosine * map.scale);
      largest = plain > largest ? plain : largest;
    }
    softplus_sum += static_cast<double>(softplus_part);
    slope_sum += static_cast<double>(slope_part);
  }
  softplus_sum = block_sum(softplus_sum, scratch);
  slope_sum = block_sum(slope_sum, scratch);
  largest = block_max(largest, scratch);
  if (threadIdx.x == 0) {
    args.softplus_sum[i] = (args.first ? 0.0 : args.softplus_sum[i]) + softplus_sum;
    args.slope_sum[i] = (args.first ? 0.0 : args.slope_sum[i]) + slope_sum;
    const double before = args.first ? -INFINITY : args.maximum[i];
    args.maximum[i] = largest > before ? largest : before;
  }
}

} // namespace

void launch_accumulate_head(const AccumulateChunkArgs& args, c10::ScalarType acc, cudaStream_t stream) {
  if (args.tile.row_count == 0) {
    return;
  }
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    TORCHMARGIN_LAUNCH(accumulate_head_kernel<T>, static_cast<unsigned>(args.tile.row_count), kThreads, stream, args);
  });
}

void launch_add_binary(const AddBinaryArgs& args, c10::ScalarType acc, cudaStream_t stream) {
  if (args.tile.row_count == 0) {
    return;
  }
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    TORCHMARGIN_LAUNCH(add_binary_kernel<T>, static_cast<unsigned>(args.tile.row_count), kThreads, stream, args);
  });
}

} // namespace torchmargin::device
