// The loss of every row and its slopes, in float64: what is reduced by one block, in the same order every time.
#include "kernels/device.cuh"
#include "kernels/launch.h"
#include "math/row_loss.h"
#include "sweep/target_rows.h"

namespace torchmargin::device {
namespace {

__device__ void write_loss(const LossArgs& args, int64_t i, double loss) {
  if (args.wide) {
    static_cast<double*>(args.loss)[i] = loss;
  } else {
    static_cast<float*>(args.loss)[i] = static_cast<float>(loss);
  }
}

__global__ void loss_kernel(LossArgs args) {
  TORCHMARGIN_SHARED(double, partial, kWarps);
  double total = 0.0;
  double count = 0.0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < args.rows; i += step) {
    double loss = 0.0;
    if (args.target[i] != args.ignore_index) { // NB: an ignored row is 0 whatever it holds
      loss = softplus(args.other_lse[i] - args.target_logit[i]);
      if (args.mean_logit != nullptr) {
        loss += args.label_smoothing * (args.target_logit[i] - args.mean_logit[i]);
      }
      count += 1.0;
    }
    total += loss;
    if (!args.reduced) {
      write_loss(args, i, loss);
    }
  }
  if (args.reduced) {
    const BlockTeam team{static_cast<int>(threadIdx.x), partial};
    total = team.sum(total);
    count = team.sum(count);
    if (threadIdx.x == 0) {
      write_loss(args, 0, args.mean ? total / count : total);
    }
  }
}

__global__ void loss_gradient_kernel(LossGradientArgs args) {
  TORCHMARGIN_SHARED(double, partial, kWarps);
  double count = 1.0;
  if (args.mean) {
    count = 0.0;
    for (int64_t i = threadIdx.x; i < args.rows; i += kThreads) {
      count += args.target[i] != args.ignore_index ? 1.0 : 0.0;
    }
    count = BlockTeam{static_cast<int>(threadIdx.x), partial}.sum(count);
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < args.rows; i += step) {
    const bool ignored = args.target[i] == args.ignore_index;
    const double g = ignored ? 0.0 : matrix_element(args.grad, i, 0) / count;
    const RowLossGradient row = row_loss_gradient(g, args.other_lse[i] - args.target_logit[i], args.label_smoothing);
    args.to_other[i] = row.other;
    args.to_own[i] = row.own;
    args.to_mean[i] = row.mean;
  }
}

// No more of them than that, for each may count all rows.
unsigned blocks_for(int64_t rows) {
  constexpr int64_t kMost = 64;
  const int64_t blocks = (rows + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < kMost ? blocks : kMost);
}

} // namespace

void launch_loss(const LossArgs& args, cudaStream_t stream) {
  TORCHMARGIN_LAUNCH(loss_kernel, args.reduced ? 1U : blocks_for(args.rows), kThreads, stream, args);
}

void launch_loss_gradient(const LossGradientArgs& args, cudaStream_t stream) {
  TORCHMARGIN_LAUNCH(loss_gradient_kernel, blocks_for(args.rows), kThreads, stream, args);
}

} // namespace torchmargin::device
