#include "cpu/cosine_kernels.h"

#include <algorithm>
#include <type_traits>

#include "cpu/loops.h"
#include "cpu/row_kernels.h"
#include "math/online_lse.h"
#include "sweep/cosine_row.h"

namespace torchmargin::cpu {
namespace {

template <typename Scalar>
using Acc = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

// Pieces of a row of at most kBlock cosines in acc: where they stand if they are contiguous acc,
// else widened into a buffer.
template <typename Scalar>
class RowReader {
 public:
  explicit RowReader(const RawMatrix& matrix) : matrix_(matrix) {}

  const Acc<Scalar>* piece(int64_t row, int64_t first, int64_t count) {
    const Scalar* const from = static_cast<const Scalar*>(matrix_.data) + row * matrix_.row_stride;
    if constexpr (std::is_same_v<Scalar, Acc<Scalar>>) {
      if (matrix_.column_stride == 1) {
        return from + first;
      }
    }
    for (int64_t k = 0; k < count; ++k) {
      buffer_[k] = static_cast<Acc<Scalar>>(from[(first + k) * matrix_.column_stride]);
    }
    return buffer_;
  }

 private:
  RawMatrix matrix_;
  Acc<Scalar> buffer_[kBlock];
};

template <typename Scalar>
void forward_row(const CosineForwardArgs& args, int64_t row, RowReader<Scalar>& reader) {
  using T = Acc<Scalar>;
  const CosineContext& context = args.context;
  const OwnMargin own = own_margin<Scalar>(context, row);
  const LogitMap<T> map{static_cast<T>(context.margin.scale), nullptr, nullptr};
  OnlineLse total;
  double cosine_sum = 0.0;
  const auto add = [&](const T* cosines, int64_t count) {
    if (count > 0) {
      const BlockSum block = row_kernels<T>().sum_block(cosines, count, map, /*bounded=*/false);
      total.combine({block.shift, block.sum});
    }
    for (int64_t k = 0; args.with_logit_sum && k < count; ++k) {
      cosine_sum += static_cast<double>(cosines[k]);
    }
  };
  for (int64_t first = 0; first < context.classes; first += kBlock) {
    const int64_t count = std::min(kBlock, context.classes - first);
    const T* const cosines = reader.piece(row, first, count);
    const int64_t own_place = own.target - first; // left out, if it is in this piece
    const int64_t before = own_place >= 0 && own_place < count ? own_place : count;
    add(cosines, before);
    add(cosines + before + 1, count - before - 1);
  }
  const double target_logit = own.present ? context.margin.scale * own.value.psi : 0.0;
  args.other_lse[row] = total.project();
  args.target_logit[row] = target_logit;
  args.logit_sum[row] = args.with_logit_sum ? context.margin.scale * cosine_sum + target_logit : 0.0;
}

template <typename Scalar>
void backward_row(const CosineBackwardArgs& args, int64_t row, RowReader<Scalar>& reader, Acc<Scalar>* weights) {
  using T = Acc<Scalar>;
  const CosineContext& context = args.context;
  const double other_lse = args.other_lse[row];
  // A row without other classes has nothing to give to them.
  const double g_o = other_lse == -std::numeric_limits<double>::infinity() ? 0.0 : args.grad_other_lse[row];
  const double g_z = args.grad_logit_sum[row];
  const OwnMargin own = own_margin<Scalar>(context, row);
  const double g_t = own.present ? args.grad_target_logit[row] + g_z : 0.0;
  const double scale = context.margin.scale;
  if (args.grad_m2 != nullptr) {
    args.grad_m2[row] = g_t == 0.0 ? 0.0 : g_t * scale * own.value.dm2;
  }
  if (args.grad_m3 != nullptr) {
    args.grad_m3[row] = g_t == 0.0 ? 0.0 : -g_t * scale * own.mu;
  }
  if (args.grad_cosine == nullptr) {
    return;
  }
  Scalar* const out = static_cast<Scalar*>(args.grad_cosine) + row * context.classes;
  const LogitMap<T> map{static_cast<T>(scale), nullptr, nullptr};
  const T factor = static_cast<T>(scale * g_o);
  const T constant = static_cast<T>(scale * g_z);
  for (int64_t first = 0; first < context.classes; first += kBlock) {
    const int64_t count = std::min(kBlock, context.classes - first);
    if (g_o == 0.0) { // nothing, even if the row holds NaN
      std::fill_n(out + first, count, static_cast<Scalar>(constant));
      continue;
    }
    row_kernels<T>().softmax_row(
        reader.piece(row, first, count), weights, count, map, other_lse, /*times_class_factors=*/false);
    for (int64_t k = 0; k < count; ++k) {
      out[first + k] = static_cast<Scalar>(factor * weights[k] + constant);
    }
  }
  if (own.present) {
    out[own.target] = static_cast<Scalar>(g_t == 0.0 ? 0.0 : g_t * scale * own.value.dcosine);
  }
}

} // namespace

void cosine_forward(const CosineForwardArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.context.cosine.dtype, [&](auto zero) {
    using Scalar = decltype(zero);
    RowReader<Scalar> reader(args.context.cosine);
    for (int64_t row = begin; row < end; ++row) {
      forward_row<Scalar>(args, row, reader);
    }
  });
}

void cosine_backward(const CosineBackwardArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.context.cosine.dtype, [&](auto zero) {
    using Scalar = decltype(zero);
    RowReader<Scalar> reader(args.context.cosine);
    Acc<Scalar> weights[kBlock];
    for (int64_t row = begin; row < end; ++row) {
      backward_row<Scalar>(args, row, reader, weights);
    }
  });
}

void transform(const TransformArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto zero) {
    for (int64_t k = begin; k < end; ++k) {
      transform_element<decltype(zero)>(args, k);
    }
  });
}

} // namespace torchmargin::cpu
