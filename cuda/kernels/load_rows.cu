// Inverse norms of rows, rows scaled in place, and their sum: a warp a row.
#include "kernels/device.cuh"
#include "kernels/launch.h"
#include "math/angle.h"
#include "sweep/dispatch.h"

namespace torchmargin::device {
namespace {

template <typename T>
__global__ void load_rows_kernel(LoadRowsArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (i >= args.row_count) {
    return; // the whole warp
  }
  const WarpTeam team{static_cast<int>(threadIdx.x % kWarp)};
  T* const row = static_cast<T*>(args.rows) + i * args.row_stride;
  double factor = 1.0;
  if (args.normalize) {
    double square = 0.0;
    for (int64_t k = team.rank; k < args.features; k += team.size) {
      square += static_cast<double>(row[k]) * static_cast<double>(row[k]);
    }
    factor = inverse_norm(team.sum(square));
  }
  if (args.inverse_norms != nullptr && team.rank == 0) {
    static_cast<T*>(args.inverse_norms)[i] = static_cast<T>(factor);
  }
  if (!args.scale_in_place) {
    return;
  }
  const double operand_scale = args.operand_scale != nullptr ? *args.operand_scale : 1.0;
  const double given = args.row_factor != nullptr ? args.row_factor[i] * operand_scale : 1.0;
  // NB: a row without a gradient is 0 even if it holds NaN.
  const bool nothing = given == 0.0 || (args.operand_scale != nullptr && fabs(given) < 0x1p-90);
  for (int64_t k = team.rank; k < args.features; k += team.size) {
    row[k] = nothing ? T(0) : static_cast<T>(static_cast<double>(row[k]) * (factor * given));
  }
}

// A thread a feature: the order of the sum is that of the rows.
template <typename T>
__global__ void sum_rows_kernel(LoadRowsArgs args) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= args.features) {
    return;
  }
  const T* const rows = static_cast<const T*>(args.rows);
  const T* const weights =
      args.scale_in_place || !args.normalize ? nullptr : static_cast<const T*>(args.inverse_norms);
  double sum = args.sum[k];
  for (int64_t i = 0; i < args.row_count; ++i) {
    const double factor = weights != nullptr ? static_cast<double>(weights[i]) : 1.0;
    sum += static_cast<double>(rows[i * args.row_stride + k]) * factor;
  }
  args.sum[k] = sum;
}

} // namespace

void launch_load_rows(const LoadRowsArgs& args, c10::ScalarType acc, cudaStream_t stream) {
  if (args.row_count == 0) {
    return;
  }
  with_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    if (args.inverse_norms != nullptr || args.scale_in_place) {
      TORCHMARGIN_LAUNCH(load_rows_kernel<T>, warp_blocks(args.row_count), kThreads, stream, args);
    }
    if (args.sum != nullptr) {
      const unsigned blocks = static_cast<unsigned>((args.features + kThreads - 1) / kThreads);
      TORCHMARGIN_LAUNCH(sum_rows_kernel<T>, blocks, kThreads, stream, args);
    }
  });
}

} // namespace torchmargin::device
