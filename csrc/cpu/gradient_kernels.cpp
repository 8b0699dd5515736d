// Products to gradients: every class and every row is finished by one thread.
#include <algorithm>
#include <vector>

#include "cpu/loops.h"
#include "cpu/range_kernels.h"
#include "cpu/row_kernels.h"
#include "math/team.h"
#include "sweep/finish_bodies.h"

namespace torchmargin::cpu {
namespace {

// No row has this class as its target, and nothing is smoothed: the hot case.
template <typename T>
void finish_plain_class(const FinishClassesArgs& args, int64_t local) {
  const int64_t features = args.context.features;
  const T inverse = args.context.normalize_weight ? static_cast<const T*>(args.inverse_norms)[local] : T(0);
  row_kernels<T>().project_row(
      static_cast<const T*>(args.products) + local * args.products_row_stride,
      static_cast<const T*>(args.weight.data) + local * args.weight.row_stride,
      static_cast<T*>(args.grad_weight) + local * features, features, inverse,
      static_cast<T>(1.0 / *args.products_scale));
}

} // namespace

void finish_classes_range(const FinishClassesArgs& args, c10::ScalarType acc, int64_t begin, int64_t end) {
  std::vector<double> scratch(args.products != nullptr ? args.context.features : 0);
  const int64_t* const targets = args.sorted_target;
  const int64_t* next = std::lower_bound(targets, targets + args.rows, args.first_class + begin);
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    with_dtype(args.context.input.dtype, [&](auto scalar) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t* const first = next;
        while (next != targets + args.rows && *next == args.first_class + j) {
          ++next;
        }
        const RowsOfClass rows{args.sorted_row + (first - targets), args.sorted_row + (next - targets)};
        if (args.bias_products != nullptr) {
          finish_bias<T>(args, j, rows);
        }
        if (args.products == nullptr) {
          continue;
        }
        if (rows.begin == rows.end && args.input_sum == nullptr) {
          finish_plain_class<T>(args, j);
        } else {
          finish_class<decltype(scalar), T, T, T>(args, j, rows, scratch.data(), args.context.features, Alone());
        }
      }
    });
  });
}

void finish_rows_range(const FinishRowsArgs& args, c10::ScalarType acc, int64_t begin, int64_t end) {
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    with_dtype(args.context.input.dtype, [&](auto scalar) {
      for (int64_t i = begin; i < end; ++i) {
        finish_row<decltype(scalar), T>(args, i, Alone());
      }
    });
  });
}

} // namespace torchmargin::cpu
