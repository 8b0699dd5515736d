// The ops on given cosines: a block a row for the loss, a thread an element for the margin.
#include "kernels/launch.h"
#include "kernels/row_lse.cuh"
#include "kernels/tile.cuh"
#include "sweep/cosine_row.h"
#include "sweep/dispatch.h"

namespace torchmargin::device {
namespace {

// A row of cosines as logits without a margin.
template <typename Scalar, typename T>
struct CosineRow {
  static constexpr int kCount = elements_per_thread<Scalar>();
  Row<const Scalar> cosines;
  T scale;

  __device__ CosineRow(const CosineContext& context, int64_t row)
      : cosines(
            static_cast<const Scalar*>(context.cosine.data) + row * context.cosine.row_stride,
            context.classes,
            context.cosine.column_stride),
        scale(static_cast<T>(context.margin.scale)) {}

  __device__ Elements<T, kCount> operator()(int64_t first) const {
    const auto cosine = cosines.template read<kCount>(first, Scalar(0));
    Elements<T, kCount> z;
    TORCHMARGIN_UNROLL
    for (int e = 0; e < kCount; ++e) {
      z.values[e] = scale * static_cast<T>(cosine.values[e]);
    }
    return z;
  }
};

template <typename Scalar, typename T>
__global__ void cosine_forward_kernel(CosineForwardArgs args) {
  TORCHMARGIN_SHARED(double, scratch, kRowLseScratch);
  TORCHMARGIN_SHARED(double, partial, kWarps);
  const BlockTeam team{static_cast<int>(threadIdx.x), partial};
  const CosineContext& context = args.context;
  const int64_t i = blockIdx.x;
  const CosineRow<Scalar, T> row(context, i);
  const OwnMargin own = own_margin<Scalar>(context, i);
  const RowLse others =
      row_lse<T, CosineRow<Scalar, T>::kCount>(row, context.classes, own.target, /*bounded=*/false, scratch);
  double sum = 0.0;
  if (args.with_logit_sum) {
    for (int64_t j = team.rank; j < context.classes; j += team.size) {
      sum += j == own.target ? 0.0 : static_cast<double>(row.cosines.data[j * row.cosines.stride]);
    }
    sum = team.sum(sum);
  }
  if (team.rank == 0) {
    const double target_logit = own.present ? context.margin.scale * own.value.psi : 0.0;
    OnlineLse total;
    total.combine(others.lse);
    args.other_lse[i] = total.project();
    args.target_logit[i] = target_logit;
    args.logit_sum[i] = args.with_logit_sum ? context.margin.scale * sum + target_logit : 0.0;
  }
}

template <typename Scalar, typename T>
__global__ void cosine_backward_kernel(CosineBackwardArgs args) {
  const CosineContext& context = args.context;
  const int64_t i = blockIdx.x;
  const CosineRow<Scalar, T> row(context, i);
  constexpr int kCount = CosineRow<Scalar, T>::kCount;
  const SplitLse<T> other_lse(args.other_lse[i]);
  // A row without other classes has nothing to give to them.
  const double g_o = args.other_lse[i] == -INFINITY ? 0.0 : args.grad_other_lse[i];
  const double g_z = args.grad_logit_sum[i];
  const OwnMargin own = own_margin<Scalar>(context, i);
  const double g_t = own.present ? args.grad_target_logit[i] + g_z : 0.0;
  const double scale = context.margin.scale;
  if (threadIdx.x == 0) {
    if (args.grad_m2 != nullptr) {
      args.grad_m2[i] = g_t == 0.0 ? 0.0 : g_t * scale * own.value.dm2;
    }
    if (args.grad_m3 != nullptr) {
      args.grad_m3[i] = g_t == 0.0 ? 0.0 : -g_t * scale * own.mu;
    }
  }
  if (args.grad_cosine == nullptr) {
    return;
  }
  const Row<Scalar> out(static_cast<Scalar*>(args.grad_cosine) + i * context.classes, context.classes);
  const T factor = static_cast<T>(scale * g_o);
  const T constant = static_cast<T>(scale * g_z);
  const T at_target = static_cast<T>(g_t == 0.0 ? 0.0 : g_t * scale * own.value.dcosine);
  for (int64_t j = static_cast<int64_t>(threadIdx.x) * kCount; j < context.classes; j += kThreads * kCount) {
    const Elements<T, kCount> z = row(j);
    Elements<Scalar, kCount> gradient;
    TORCHMARGIN_UNROLL
    for (int e = 0; e < kCount; ++e) {
      // Nothing of the others without an upstream gradient, even if the row holds NaN.
      const T other = g_o == 0.0 ? constant : factor * softmax_weight(z.values[e], other_lse) + constant;
      gradient.values[e] = static_cast<Scalar>(j + e == own.target ? at_target : other);
    }
    out.write(j, gradient);
  }
}

template <typename Scalar>
__global__ void transform_kernel(TransformArgs args, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; k < count; k += step) {
    transform_element<Scalar>(args, k);
  }
}

} // namespace

void launch_cosine_forward(const CosineForwardArgs& args, int64_t rows, cudaStream_t stream) {
  if (rows == 0) {
    return;
  }
  with_dtype_and_acc(args.context.cosine.dtype, [&](auto scalar, auto zero) {
    const auto kernel = cosine_forward_kernel<decltype(scalar), decltype(zero)>;
    TORCHMARGIN_LAUNCH(kernel, static_cast<unsigned>(rows), kThreads, stream, args);
  });
}

void launch_cosine_backward(const CosineBackwardArgs& args, int64_t rows, cudaStream_t stream) {
  if (rows == 0) {
    return;
  }
  with_dtype_and_acc(args.context.cosine.dtype, [&](auto scalar, auto zero) {
    const auto kernel = cosine_backward_kernel<decltype(scalar), decltype(zero)>;
    TORCHMARGIN_LAUNCH(kernel, static_cast<unsigned>(rows), kThreads, stream, args);
  });
}

void launch_transform(const TransformArgs& args, int64_t count, cudaStream_t stream) {
  if (count == 0) {
    return;
  }
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  with_dtype(args.dtype, [&](auto scalar) {
    const auto kernel = transform_kernel<decltype(scalar)>;
    TORCHMARGIN_LAUNCH(
        kernel, static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20), kThreads, stream, args, count);
  });
}

} // namespace torchmargin::device
