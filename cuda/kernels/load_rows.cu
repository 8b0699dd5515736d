// Rows as operands of the products and their inverse norms: a warp a row. Their sum: a warp 32 features of some rows.
#include "kernels/device.cuh"
#include "kernels/launch.h"
#include "math/angle.h"
#include "math/logit.h"
#include "sweep/dispatch.h"

namespace torchmargin::device {
namespace {

// The factor of a row with row_factor f: 0 where f is 0, and where what is left of it would only make products
// denormal.
__device__ double given_factor(const LoadRowsArgs& args, int64_t i) {
  const double scale = args.operand_scale != nullptr ? *args.operand_scale : 1.0;
  if (args.row_factor == nullptr) {
    return scale;
  }
  const double factor = args.row_factor[i] * scale;
  return args.operand_scale != nullptr && fabs(factor) < kSmallestFactor ? 0.0 : factor;
}

template <typename Scalar, typename T, typename Out>
__global__ void load_rows_kernel(LoadRowsArgs args) {
  constexpr int kCount = elements_per_thread<Scalar, Out>();
  // A factor that float32 holds is exact enough for 16 bits.
  using Product = std::conditional_t<sizeof(Out) == 2, float, double>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (i >= args.row_count) {
    return; // the whole warp
  }
  const WarpTeam team{static_cast<int>(threadIdx.x % kWarp)};
  const int64_t first = static_cast<int64_t>(team.rank) * kCount;
  constexpr int64_t kStep = kWarp * kCount;
  const Row<const Scalar> row(
      static_cast<const Scalar*>(args.rows.data) + i * args.rows.row_stride, args.features, args.rows.column_stride);
  // What a lane sees first stays in its registers.
  constexpr int kHeld = sizeof(Scalar) == 8 ? 1 : 2;
  Elements<Scalar, kCount> held[kHeld];
  TORCHMARGIN_UNROLL
  for (int part = 0; part < kHeld; ++part) {
    held[part] = row.template read<kCount>(first + part * kStep, Scalar(0));
  }
  // body(k, elements) for all of a lane's features.
  const auto for_each = [&](auto body) {
    TORCHMARGIN_UNROLL
    for (int part = 0; part < kHeld; ++part) {
      body(first + part * kStep, held[part]);
    }
    for (int64_t k = first + kHeld * kStep; k < args.features; k += kStep) {
      body(k, row.template read<kCount>(k, Scalar(0)));
    }
  };
  double inverse = 1.0;
  if (args.measured && args.given_norms != nullptr) {
    inverse = static_cast<double>(static_cast<const T*>(args.given_norms)[i]);
  } else if (args.measured) {
    double square = 0.0;
    for_each([&](int64_t /*k*/, const Elements<Scalar, kCount>& x) {
      TORCHMARGIN_UNROLL
      for (int e = 0; e < kCount; ++e) {
        const double value = static_cast<double>(x.values[e]);
        square += value * value;
      }
    });
    inverse = inverse_norm(team.sum(square));
  }
  if (args.inverse_norms != nullptr && team.rank == 0) {
    static_cast<T*>(args.inverse_norms)[i] = static_cast<T>(inverse);
  }
  if (args.out == nullptr) {
    return;
  }
  const double given = given_factor(args, i);
  const bool nothing = given == 0.0; // NB: even if the row holds NaN
  const Product factor = static_cast<Product>(args.to_unit ? inverse * given : given);
  const Row<Out> out(static_cast<Out*>(args.out) + i * args.out_row_stride, args.features);
  for_each([&](int64_t k, const Elements<Scalar, kCount>& x) {
    Elements<Out, kCount> y;
    TORCHMARGIN_UNROLL
    for (int e = 0; e < kCount; ++e) {
      y.values[e] = nothing ? Out(0) : static_cast<Out>(static_cast<Product>(x.values[e]) * factor);
    }
    if (k < args.features) {
      out.write(k, y);
    }
  });
}

constexpr int kSumThreads = 1024;
constexpr int kSumWarps = kSumThreads / kWarp;

// Every warp of a set's block adds rows in rising order, and the warps' sums are added in order.
template <typename Scalar, typename T>
__global__ void sum_rows_kernel(LoadRowsArgs args) {
  TORCHMARGIN_SHARED(double, partial, kSumThreads);
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const Scalar* const rows = static_cast<const Scalar*>(args.rows.data);
  const T* const norms = args.measured ? static_cast<const T*>(args.inverse_norms) : nullptr;
  const int64_t step = kSumWarps * args.sum_sets;
  double sum = 0.0;
  for (int64_t i = warp * args.sum_sets + blockIdx.y; i < args.row_count && k < args.features; i += step) {
    const double given = args.row_factor != nullptr ? args.row_factor[i] : 1.0;
    if (given != 0.0) {
      const double value = static_cast<double>(rows[i * args.rows.row_stride + k * args.rows.column_stride]);
      sum += value * (norms != nullptr ? given * static_cast<double>(norms[i]) : given);
    }
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (warp == 0 && k < args.features) {
    double& set = args.sum[blockIdx.y * args.features + k];
    double total = set;
    for (int other = 0; other < kSumWarps; ++other) {
      total += partial[other * kWarp + lane];
    }
    set = total;
  }
}

// Calls body(Out()) for the dtypes that such rows are loaded to.
template <typename Scalar, typename T, typename Body>
void with_out(c10::ScalarType out, Body body) {
  if constexpr (std::is_same_v<Scalar, float> || std::is_same_v<Scalar, c10::Half>) {
    if (out == c10::ScalarType::Half) {
      return body(c10::Half());
    }
  }
  if constexpr (std::is_same_v<Scalar, c10::BFloat16>) {
    if (out == c10::ScalarType::BFloat16) {
      return body(c10::BFloat16());
    }
  }
  body(T());
}

} // namespace

void launch_load_rows(const LoadRowsArgs& args, c10::ScalarType /*acc*/, cudaStream_t stream) {
  if (args.row_count == 0) {
    return;
  }
  with_dtype_and_acc(args.rows.dtype, [&](auto scalar, auto zero) {
    using Scalar = decltype(scalar);
    using T = decltype(zero);
    if (args.inverse_norms != nullptr || args.out != nullptr) {
      with_out<Scalar, T>(args.out_dtype, [&](auto out) {
        const auto kernel = load_rows_kernel<Scalar, T, decltype(out)>;
        TORCHMARGIN_LAUNCH(kernel, warp_blocks(args.row_count), kThreads, stream, args);
      });
    }
    if (args.sum != nullptr) {
      const dim3 blocks(
          static_cast<unsigned>((args.features + kWarp - 1) / kWarp), static_cast<unsigned>(args.sum_sets));
      const auto kernel = sum_rows_kernel<Scalar, T>;
      TORCHMARGIN_LAUNCH(kernel, blocks, kSumThreads, stream, args);
    }
  });
}

} // namespace torchmargin::device
