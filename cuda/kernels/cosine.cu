// The ops on given cosines: a block a row for the loss, a thread an element for the margin.
#include "kernels/launch.h"
#include "kernels/row_lse.cuh"
#include "kernels/tile.cuh"
#include "sweep/cosine_row.h"
#include "sweep/dispatch.h"

namespace torchmargin::device {
namespace {

template <typename Scalar>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

// A row of cosines as logits without a margin.
template <typename Scalar, typename T>
struct CosineRow {
  const Scalar* data;
  int64_t stride;
  T scale;

  __device__ CosineRow(const CosineContext& context, int64_t row)
      : data(static_cast<const Scalar*>(context.cosine.data) + row * context.cosine.row_stride),
        stride(context.cosine.column_stride),
        scale(static_cast<T>(context.margin.scale)) {}

  __device__ T cosine(int64_t j) const {
    return static_cast<T>(data[j * stride]);
  }
  __device__ T operator()(int64_t j) const {
    return scale * cosine(j);
  }
};

template <typename Scalar, typename T>
__global__ void cosine_forward_kernel(CosineForwardArgs args) {
  TORCHMARGIN_SHARED(double, partial, kWarps);
  const BlockTeam team{static_cast<int>(threadIdx.x), partial};
  const CosineContext& context = args.context;
  const int64_t i = blockIdx.x;
  const CosineRow<Scalar, T> row(context, i);
  const OwnMargin own = own_margin<Scalar>(context, i);
  const RowLse others = row_lse<T>(row, context.classes, own.target, /*bounded=*/false, team);
  double sum = 0.0;
  if (args.with_logit_sum) {
    for (int64_t j = team.rank; j < context.classes; j += team.size) {
      sum += j == own.target ? 0.0 : static_cast<double>(row.cosine(j));
    }
    sum = team.sum(sum);
  }
  if (team.rank == 0) {
    const double target_logit = own.present ? context.margin.scale * own.value.psi : 0.0;
    OnlineLse total;
    total.combine(others.lse);
    static_cast<T*>(args.other_lse)[i] = static_cast<T>(total.project());
    static_cast<T*>(args.target_logit)[i] = static_cast<T>(target_logit);
    static_cast<T*>(args.logit_sum)[i] =
        static_cast<T>(args.with_logit_sum ? context.margin.scale * sum + target_logit : 0.0);
  }
}

template <typename Scalar, typename T>
__global__ void cosine_backward_kernel(CosineBackwardArgs args) {
  const CosineContext& context = args.context;
  const int64_t i = blockIdx.x;
  const CosineRow<Scalar, T> row(context, i);
  const T other_lse = static_cast<const T*>(args.other_lse)[i];
  // A row without other classes has nothing to give to them.
  const double g_o = isinf(other_lse) && other_lse < T(0) ? 0.0 : args.grad_other_lse[i];
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
  Scalar* const out = static_cast<Scalar*>(args.grad_cosine) + i * context.classes;
  const T factor = static_cast<T>(scale * g_o);
  const T constant = static_cast<T>(scale * g_z);
  for (int64_t j = threadIdx.x; j < context.classes; j += kThreads) {
    T value = constant;
    if (j == own.target) {
      value = static_cast<T>(g_t == 0.0 ? 0.0 : g_t * scale * own.value.dcosine);
    } else if (g_o != 0.0) { // nothing otherwise, even if the row holds NaN
      value = factor * softmax_weight(row(j), other_lse) + constant;
    }
    out[j] = static_cast<Scalar>(value);
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
  with_dtype(args.context.cosine.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const auto kernel = cosine_forward_kernel<Scalar, typename AccOf<Scalar>::type>;
    TORCHMARGIN_LAUNCH(kernel, static_cast<unsigned>(rows), kThreads, stream, args);
  });
}

void launch_cosine_backward(const CosineBackwardArgs& args, int64_t rows, cudaStream_t stream) {
  if (rows == 0) {
    return;
  }
  with_dtype(args.context.cosine.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const auto kernel = cosine_backward_kernel<Scalar, typename AccOf<Scalar>::type>;
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
    TORCHMARGIN_LAUNCH(kernel, static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20), kThreads, stream, args, count);
  });
}

} // namespace torchmargin::device
