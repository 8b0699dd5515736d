// The kernels of the seam on the CPU: loops over rows or classes in parallel, each row
// by the row kernels of the running instruction set. No row is shared between threads
// and every sum has a fixed order, so results do not depend on the number of threads
// (the products' own may).
#include "cpu/sweep_kernels.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <limits>

#include "cpu/gradient_kernels.h"
#include "cpu/loops.h"
#include "cpu/row_kernels.h"
#include "cpu/target_row.h"
#include "math/online_lse.h"

namespace torchmargin::cpu {
namespace {

void load_rows(const LoadRowsArgs& args, c10::ScalarType acc) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const RowKernels<T>& kernels = row_kernels<T>();
    T* const rows = static_cast<T*>(args.rows);
    T* const inverse_norms = static_cast<T*>(args.inverse_norms);
    const double operand_scale = args.operand_scale != nullptr ? *args.operand_scale : 1.0;
    if (args.inverse_norms != nullptr || args.scale_in_place) {
      at::parallel_for(0, args.row_count, grain(args.features), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          T* const row = rows + i * args.row_stride;
          double factor = args.normalize ? inverse_norm(kernels.squared_norm(row, args.features)) : 1.0;
          if (inverse_norms != nullptr) {
            inverse_norms[i] = static_cast<T>(factor);
          }
          if (!args.scale_in_place) {
            continue;
          }
          const double given = args.row_factor != nullptr ? args.row_factor[i] * operand_scale : 1.0;
          // NB: a row without a gradient is 0 even if it holds NaN; one with next to none
          // would make the products denormal, and those are slow.
          if (given == 0.0 || (args.operand_scale != nullptr && std::fabs(given) < 0x1p-90)) {
            std::fill(row, row + args.features, T(0));
          } else if (factor * given != 1.0) {
            kernels.scale_row(row, args.features, factor * given);
          }
        }
      });
    }
    if (args.sum == nullptr) {
      return;
    }
    // Threads share out the features: the order of the sum stays that of the rows.
    const T* const weights = args.scale_in_place || !args.normalize ? nullptr : inverse_norms;
    at::parallel_for(0, args.features, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < args.row_count; ++i) {
        const double factor = weights != nullptr ? static_cast<double>(weights[i]) : 1.0;
        kernels.add_row(args.sum + begin, rows + i * args.row_stride + begin, end - begin, factor);
      }
    });
  });
}

template <typename T>
LogitMap<T> logit_map(const LogitsTile& tile, int64_t first) {
  const T* const norms = static_cast<const T*>(tile.inverse_norms);
  const T* const bias = static_cast<const T*>(tile.bias);
  return {
      static_cast<T>(tile.scale), norms != nullptr ? norms + first : nullptr, bias != nullptr ? bias + first : nullptr};
}

// The target's column within the tile; class_count if it is not there.
int64_t target_column(const LogitsTile& tile, int64_t row) {
  const int64_t column = tile.target[row] - tile.first_class;
  return column >= 0 && column < tile.class_count ? column : tile.class_count;
}

void accumulate_chunk(const AccumulateChunkArgs& args, c10::ScalarType acc) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const LogitsTile& tile = args.tile;
    const RowKernels<T>& kernels = row_kernels<T>();
    at::parallel_for(0, tile.row_count, grain(tile.class_count), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* const dots = static_cast<const T*>(tile.logits) + i * tile.row_stride;
        OnlineLse total{args.shift[i], args.sum[i]};
        double maximum = args.maximum[i];
        const auto add = [&](int64_t first, int64_t last) {
          for (; first < last; first += kBlock) {
            const BlockSum block = kernels.sum_block(
                dots + first, std::min(kBlock, last - first), logit_map<T>(tile, first), args.bounded);
            total.combine({block.shift, block.sum});
            maximum = std::max(maximum, block.maximum);
          }
        };
        const int64_t column = target_column(tile, i);
        add(0, column);
        add(column + 1, tile.class_count);
        args.shift[i] = total.shift;
        args.sum[i] = total.sum;
        args.maximum[i] = maximum;
      }
    });
  });
}

void softmax_chunk(const SoftmaxChunkArgs& args, c10::ScalarType acc) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const LogitsTile& tile = args.tile;
    const RowKernels<T>& kernels = row_kernels<T>();
    at::parallel_for(0, tile.row_count, grain(tile.class_count), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* const out = static_cast<T*>(args.out) + i * tile.class_count;
        if (args.upstream[i] == 0.0) {
          std::fill(out, out + tile.class_count, T(0));
          continue;
        }
        kernels.softmax_row(
            static_cast<const T*>(tile.logits) + i * tile.row_stride, out, tile.class_count, logit_map<T>(tile, 0),
            static_cast<const T*>(args.other_lse)[i], args.times_inverse_norms && tile.inverse_norms != nullptr);
        const int64_t column = target_column(tile, i);
        if (column < tile.class_count) {
          out[column] = T(0);
        }
      }
    });
  });
}

template <typename Scalar, typename T>
void target_pass_rows(const TargetPassArgs& args, int64_t begin, int64_t end) {
  const TargetContext& context = args.context;
  const Reader<Scalar> x(context.input);
  const Reader<Scalar> w(context.weight);
  for (int64_t i = begin; i < end; ++i) {
    const TargetRow row = evaluate_target<Scalar>(context, i);
    const double bias = row.present ? vector_element(context.bias, row.target, 0.0) : 0.0;
    const double target_logit = row.present ? context.margin.scale * row.alpha * row.beta * row.margin.psi + bias : 0.0;
    double logit_sum = 0.0;
    if (args.weight_sum != nullptr) {
      for (int64_t k = 0; k < context.features; ++k) {
        const double others = args.weight_sum[k] - (row.present ? row.b * w(row.target, k) : 0.0);
        logit_sum += row.a * x(i, k) * others;
      }
      logit_sum =
          context.margin.scale * logit_sum + (args.bias_sum != nullptr ? *args.bias_sum - bias : 0.0) + target_logit;
    }
    OnlineLse total;
    double maximum = -std::numeric_limits<double>::infinity();
    for (int64_t partial = i; partial < args.lanes * args.rows; partial += args.rows) {
      total.combine({args.shift[partial], args.sum[partial]});
      maximum = std::max(maximum, args.maximum[partial]);
    }
    const double other_lse = total.project();
    static_cast<T*>(args.other_lse)[i] = static_cast<T>(other_lse);
    static_cast<T*>(args.target_logit)[i] = static_cast<T>(target_logit);
    static_cast<T*>(args.logit_sum)[i] = static_cast<T>(logit_sum);
    static_cast<T*>(args.target_angle)[i] = static_cast<T>(row.present ? row.angle.theta : 0.0);
    // The maximum passed NaN over; the sum did not.
    static_cast<T*>(args.max_other_logit)[i] = static_cast<T>(std::isnan(other_lse) ? other_lse : maximum);
  }
}

void target_pass(const TargetPassArgs& args, c10::ScalarType acc) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, args.context.input.dtype, "torchmargin_target_pass", [&] {
      at::parallel_for(0, args.rows, grain(args.context.features * 4), [&](int64_t begin, int64_t end) {
        target_pass_rows<scalar_t, T>(args, begin, end);
      });
    });
  });
}

void run_lanes(int64_t lanes, const std::function<void(int64_t)>& body) {
  if (lanes == 1) { // the products and kernels inside share out the threads
    body(0);
    return;
  }
  at::parallel_for(0, lanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; ++lane) {
      body(lane);
    }
  });
}

// Fresh memory costs a page fault per 4 KiB, which for a large gradient takes as long as
// the product that fills it; 2 MiB pages make that negligible.
void prepare_buffer(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (data != nullptr && end > begin) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE); // a refusal changes nothing
  }
#endif
}

} // namespace

const SweepKernels& sweep_kernels() {
  static constexpr SweepKernels kernels{load_rows,      accumulate_chunk, softmax_chunk, target_pass,
                                        finish_classes, finish_rows,      run_lanes,     prepare_buffer};
  return kernels;
}

} // namespace torchmargin::cpu
