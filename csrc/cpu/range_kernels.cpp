// The bodies of the seam's kernels; see range_kernels.h.
#include "cpu/range_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

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

// Of row `row`; nothing is hard where `hard` is nullptr.
template <typename T>
HardMap<T> hard_map(const HardRow* hard, const ProductsTile& tile, int64_t row) {
  const T row_factor = tile.row_factors != nullptr ? static_cast<const T*>(tile.row_factors)[row] : T(1);
  if (hard == nullptr) {
    return {row_factor, std::numeric_limits<T>::infinity(), T(0), T(1), T(0)};
  }
  const HardRow& own = hard[row];
  return {
      row_factor, static_cast<T>(own.threshold), static_cast<T>(own.a), static_cast<T>(own.b),
      static_cast<T>(tile.scale * own.d)};
}

template <typename T>
BinaryMap<T> binary_map(const BinaryForm& form, const ProductsTile& tile, const void* bias, int64_t row) {
  const bool of_angle = form.kind == BinaryKind::angle;
  return {
      .row_factor = tile.row_factors != nullptr ? static_cast<const T*>(tile.row_factors)[row] : T(1),
      .scale = static_cast<T>(tile.scale),
      .bias = bias != nullptr ? *static_cast<const T*>(bias) : T(0),
      .power = form.power,
      .added = static_cast<T>(form.kind == BinaryKind::cosine ? form.margin : 0.0),
      .of_angle = of_angle,
      .cosine_of_margin = static_cast<T>(of_angle ? std::cos(form.margin) : 1.0),
      .sine_of_margin = static_cast<T>(of_angle ? std::sin(form.margin) : 0.0)};
}

// Takes the largest of a block's logits into a row's list of them, and moves the others to the front of the block. What
// the list has no place for any more joins the sum. `first_class`: of the block's first logit. Returns how many are
// left.
template <typename T>
int64_t take_hardest(
    T* logits,
    int64_t size,
    int64_t first_class,
    int64_t hardest,
    T* top_logit,
    int64_t* top_class,
    OnlineLse& total) {
  int64_t left = 0;
  for (int64_t j = 0; j < size; ++j) {
    if (!(logits[j] > top_logit[hardest - 1])) { // NaN, and what is equal but of a higher class, as well
      logits[left++] = logits[j];
      continue;
    }
    if (top_class[hardest - 1] >= 0) {
      total.combine({static_cast<double>(top_logit[hardest - 1]), 1.0});
    }
    int64_t place = hardest - 1;
    for (; place > 0 && logits[j] > top_logit[place - 1]; --place) {
      top_logit[place] = top_logit[place - 1];
      top_class[place] = top_class[place - 1];
    }
    top_logit[place] = logits[j];
    top_class[place] = first_class + j;
  }
  return left;
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
    const bool changed = args.hard != nullptr || args.logit_sum != nullptr;
    std::vector<T> buffer(args.hardest > 0 ? kBlock : 0);
    for (int64_t i = begin; i < end; ++i) {
      const T* const products = static_cast<const T*>(tile.products) + i * tile.row_stride;
      T* const top_logit = args.hardest > 0 ? static_cast<T*>(args.top_logit) + i * args.hardest : nullptr;
      int64_t* const top_class = args.hardest > 0 ? args.top_class + i * args.hardest : nullptr;
      if (args.first) {
        std::fill_n(top_logit, args.hardest, -std::numeric_limits<T>::infinity());
        std::fill_n(top_class, args.hardest, -1);
      }
      const HardMap<T> hard = hard_map<T>(args.hard, tile, i);
      const double shift = args.hard != nullptr ? args.hard[i].shift : (args.bounded ? 0.0 : std::nan(""));
      double logit_sum = args.logit_sum != nullptr && !args.first ? args.logit_sum[i] : 0.0;
      const auto sum_of = [&](int64_t first, int64_t size) {
        const LogitMap<T> map = logit_map<T>(tile, i, first);
        return changed ? kernels.sum_hard_block(
                             products + first, size, map, hard, shift, args.logit_sum != nullptr ? &logit_sum : nullptr,
                             args.sum_of_changes)
                       : kernels.sum_block(products + first, size, map, args.bounded);
      };
      OnlineLse total = args.first ? OnlineLse() : OnlineLse{args.sums.shift[i], args.sums.sum[i]};
      double maximum = args.first ? -std::numeric_limits<double>::infinity() : args.sums.maximum[i];
      const auto add = [&](int64_t first, int64_t last) {
        for (; first < last; first += kBlock) {
          const int64_t size = std::min(kBlock, last - first);
          BlockSum block = sum_of(first, size);
          maximum = std::max(maximum, block.maximum);
          if (args.hardest > 0 && block.maximum > static_cast<double>(top_logit[args.hardest - 1])) {
            kernels.logits_row(products + first, buffer.data(), size, logit_map<T>(tile, i, first));
            const int64_t left =
                take_hardest(buffer.data(), size, tile.first_class + first, args.hardest, top_logit, top_class, total);
            block = kernels.sum_block(buffer.data(), left, {T(1), nullptr, nullptr}, args.bounded);
          }
          total.combine({block.shift, block.sum});
        }
      };
      const int64_t column = target_column(tile, i);
      add(0, column);
      add(column + 1, tile.class_count);
      args.sums.shift[i] = total.shift;
      args.sums.sum[i] = total.sum;
      args.sums.maximum[i] = maximum;
      if (args.logit_sum != nullptr) {
        args.logit_sum[i] = logit_sum;
      }
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
      const T* const products = static_cast<const T*>(tile.products) + i * tile.row_stride;
      const bool times_class_factors = args.times_class_factors && tile.class_factors != nullptr;
      if (args.of_lse == nullptr) {
        kernels.softmax_row(
            products, out, tile.class_count, logit_map<T>(tile, i, 0), args.other_lse[i], times_class_factors);
      } else {
        kernels.weigh_row(
            products, out, tile.class_count, logit_map<T>(tile, i, 0), hard_map<T>(args.hard, tile, i),
            {.lse = args.other_lse[i],
             .times_class_factors = times_class_factors,
             .of_lse = static_cast<T>(args.of_lse[i]),
             .of_sum = args.of_sum != nullptr ? static_cast<T>(args.of_sum[i]) : T(0),
             .sum_of_changes = args.sum_of_changes,
             .slopes = args.slopes});
      }
      const int64_t column = target_column(tile, i);
      if (column < tile.class_count) {
        out[column] = T(0);
      }
    }
  });
}

void add_binary_range(const AddBinaryArgs& args, c10::ScalarType acc, int64_t begin, int64_t end) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const ProductsTile& tile = args.tile;
    const RowKernels<T>& kernels = row_kernels<T>();
    for (int64_t i = begin; i < end; ++i) {
      const T* const products = static_cast<const T*>(tile.products) + i * tile.row_stride;
      const BinaryMap<T> map = binary_map<T>(args.form, tile, args.bias, i);
      double softplus_sum = args.first ? 0.0 : args.softplus_sum[i];
      double slope_sum = args.first ? 0.0 : args.slope_sum[i];
      double maximum = args.first ? -std::numeric_limits<double>::infinity() : args.maximum[i];
      const auto add = [&](int64_t first, int64_t last) {
        for (; first < last; first += kBlock) {
          const BinarySum block = kernels.sum_binary_block(
              products + first, std::min(kBlock, last - first), logit_map<T>(tile, i, first), map);
          softplus_sum += block.softplus;
          slope_sum += block.slope;
          maximum = std::max(maximum, block.maximum);
        }
      };
      const int64_t column = target_column(tile, i);
      add(0, column);
      add(column + 1, tile.class_count);
      args.softplus_sum[i] = softplus_sum;
      args.slope_sum[i] = slope_sum;
      args.maximum[i] = maximum;
    }
  });
}

void weigh_binary_range(const WeighBinaryArgs& args, c10::ScalarType acc, int64_t begin, int64_t end) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const ProductsTile& tile = args.tile;
    for (int64_t i = begin; i < end; ++i) {
      T* const out = static_cast<T*>(args.out) + i * args.out_row_stride;
      if (args.upstream[i] == 0.0) {
        std::fill(out, out + tile.class_count, T(0));
        continue;
      }
      row_kernels<T>().weigh_binary_row(
          static_cast<const T*>(tile.products) + i * tile.row_stride, out, tile.class_count, logit_map<T>(tile, i, 0),
          binary_map<T>(args.form, tile, args.bias, i), static_cast<T>(args.factor * args.out_scale),
          args.times_class_factors && tile.class_factors != nullptr);
      const int64_t column = target_column(tile, i);
      if (column < tile.class_count) {
        out[column] = T(0);
      }
    }
  });
}

void fold_centers_range(const FoldCentersArgs& args, c10::ScalarType acc, int64_t begin, int64_t end) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = begin; i < end; ++i) {
      row_kernels<T>().fold_row(
          static_cast<const T*>(args.products) + i * args.row_stride, args.plane_stride, args.class_count, args.centers,
          static_cast<const T*>(args.factors), static_cast<T*>(args.out) + i * args.out_row_stride,
          args.winner != nullptr ? args.winner + i * args.winner_row_stride : nullptr);
    }
  });
}

void spread_centers_range(const SpreadCentersArgs& args, c10::ScalarType acc, int64_t begin, int64_t end) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = begin; i < end; ++i) {
      row_kernels<T>().spread_row(
          static_cast<T*>(args.weights) + i * args.row_stride, args.plane_stride, args.class_count, args.centers,
          static_cast<const T*>(args.factors), args.winner + i * args.winner_row_stride);
    }
  });
}

void write_hardest_range(const WriteHardestArgs& args, c10::ScalarType acc, int64_t begin, int64_t end) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t at = i * args.hardest; at < (i + 1) * args.hardest; ++at) {
        const int64_t column = args.classes[at] - args.first_class;
        if (args.classes[at] >= 0 && column >= 0 && column < args.class_count) {
          const T factor = args.class_factors != nullptr ? static_cast<const T*>(args.class_factors)[column] : T(1);
          static_cast<T*>(args.out)[i * args.out_row_stride + column] =
              static_cast<T>(args.values[at] * args.out_scale) * factor;
        }
      }
    }
  });
}

} // namespace torchmargin::cpu
