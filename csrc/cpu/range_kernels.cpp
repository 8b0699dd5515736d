// The bodies of the seam's kernels; see range_kernels.h.
#include "cpu/range_kernels.h"

#include <algorithm>
#include <limits>

#include "cpu/loops.h"
#include "cpu/row_kernels.h"
#include "math/angle.h"
#include "math/logit.h"
#include "math/online_lse.h"
#include "math/team.h"

namespace torchmargin::cpu {
namespace {

template <typename T>
LogitMap<T> logit_map(const ProductsTile& tile, int64_t row, int64_t first) {
  const T* const factors = static_cast<const T*>(tile.class_factors);
  const T* const bias = static_cast<const T*>(tile.bias);
  const T row_factor = tile.row_factors != nullptr ? static_cast<const T*>(tile.row_factors)[row] : T(1);
  return {
      static_cast<T>(tile.scale) * row_factor, factors != nullptr ? factors + first : nullptr,
      bias != nullptr ? bias + first : nullptr};
}

// The target's column within the tile; class_count if it is not there.
int64_t target_column(const ProductsTile& tile, int64_t row) {
  const int64_t column = tile.target[row] - tile.first_class;
  return column >= 0 && column < tile.class_count ? column : tile.class_count;
}

} // namespace

void load_rows_range(const LoadRowsArgs& args, c10::ScalarType acc, int64_t begin, int64_t end) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const RowKernels<T>& kernels = row_kernels<T>();
    const T* const rows = static_cast<const T*>(args.rows.data);
    T* const inverse_norms = static_cast<T*>(args.inverse_norms);
    const double operand_scale = args.operand_scale != nullptr ? *args.operand_scale : 1.0;
    for (int64_t i = begin; i < end; ++i) {
      const T* const row = rows + i * args.rows.row_stride;
      double inverse = 1.0;
      if (args.measured) {
        inverse =
            inverse_norm(args.state != nullptr ? args.state[i].x_squared : kernels.squared_norm(row, args.features));
      }
      if (inverse_norms != nullptr) {
        inverse_norms[i] = static_cast<T>(inverse);
      }
      if (args.out == nullptr) {
        continue;
      }
      T* const out = static_cast<T*>(args.out) + i * args.out_row_stride;
      const double given = args.row_factor != nullptr ? args.row_factor[i] * operand_scale : operand_scale;
      // NB: a row without a gradient is 0 even if it holds NaN; one with next to none
      // would make the products denormal, and those are slow.
      if (given == 0.0 ||
          (args.row_factor != nullptr && args.operand_scale != nullptr && std::fabs(given) < kSmallestFactor)) {
        std::fill(out, out + args.features, T(0));
        continue;
      }
      const double factor = args.to_unit ? inverse * given : given;
      if (out != row || factor != 1.0) {
        kernels.scale_row(row, out, args.features, factor);
      }
    }
  });
}

// Threads share out the features: the order of the sum stays that of the rows.
void sum_rows_range(const LoadRowsArgs& args, c10::ScalarType acc, int64_t begin, int64_t end) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const T* const rows = static_cast<const T*>(args.rows.data);
    const T* const norms = args.measured ? static_cast<const T*>(args.inverse_norms) : nullptr;
    for (int64_t i = 0; i < args.row_count; ++i) {
      const double given = args.row_factor != nullptr ? args.row_factor[i] : 1.0;
      if (given != 0.0) {
        const double factor = norms != nullptr ? given * static_cast<double>(norms[i]) : given;
        row_kernels<T>().add_row(args.sum + begin, rows + i * args.rows.row_stride + begin, end - begin, factor);
      }
    }
  });
}

void accumulate_range(const AccumulateChunkArgs& args, c10::ScalarType acc, int64_t begin, int64_t end) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const ProductsTile& tile = args.tile;
    const RowKernels<T>& kernels = row_kernels<T>();
    for (int64_t i = begin; i < end; ++i) {
      const T* const products = static_cast<const T*>(tile.products) + i * tile.row_stride;
      OnlineLse total = args.first ? OnlineLse() : OnlineLse{args.sums.shift[i], args.sums.sum[i]};
      double maximum = args.first ? -std::numeric_limits<double>::infinity() : args.sums.maximum[i];
      const auto add = [&](int64_t first, int64_t last) {
        for (; first < last; first += kBlock) {
          const BlockSum block = kernels.sum_block(
              products + first, std::min(kBlock, last - first), logit_map<T>(tile, i, first), args.bounded);
          total.combine({block.shift, block.sum});
          maximum = std::max(maximum, block.maximum);
        }
      };
      const int64_t column = target_column(tile, i);
      add(0, column);
      add(column + 1, tile.class_count);
      args.sums.shift[i] = total.shift;
      args.sums.sum[i] = total.sum;
      args.sums.maximum[i] = maximum;
    }
  });
}

void softmax_range(const SoftmaxChunkArgs& args, c10::ScalarType acc, int64_t begin, int64_t end) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const ProductsTile& tile = args.tile;
    const RowKernels<T>& kernels = row_kernels<T>();
    for (int64_t i = begin; i < end; ++i) {
      T* const out = static_cast<T*>(args.out) + i * args.out_row_stride;
      if (args.upstream[i] == 0.0) {
        std::fill(out, out + tile.class_count, T(0));
        continue;
      }
      kernels.softmax_row(
          static_cast<const T*>(tile.products) + i * tile.row_stride, out, tile.class_count, logit_map<T>(tile, i, 0),
          args.other_lse[i], args.times_class_factors && tile.class_factors != nullptr);
      const int64_t column = target_column(tile, i);
      if (column < tile.class_count) {
        out[column] = T(0);
      }
    }
  });
}

} // namespace torchmargin::cpu
