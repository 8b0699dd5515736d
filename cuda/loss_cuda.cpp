// The private loss op on CUDA: a kernel each way, where ATen's ops would be a dozen.
#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "kernels/launch.h"
#include "ops/loss_op.h"
#include "ops/loss_rows.h"
#include "sweep/raw.h"

namespace torchmargin::cuda {
namespace {

at::Tensor margin_loss_cuda(TORCHMARGIN_LOSS_OP_PARAMETERS) {
  constexpr std::string_view op = "_margin_loss";
  const c10::cuda::CUDAGuard guard(other_lse.device());
  const LossInputs in(op, other_lse, target_logit, target, reduction);
  const LossRows<double> mean(op, "mean_logit", mean_logit.has_value() ? *mean_logit : other_lse, in.rows);
  const auto options = other_lse.options().requires_grad(false).dtype(wide ? at::kDouble : at::kFloat);
  const at::Tensor loss = in.reduced ? at::empty({}, options) : at::empty({in.rows}, options);
  LossArgs args{};
  args.rows = in.rows;
  args.other_lse = in.other.data();
  args.target_logit = in.own.data();
  args.mean_logit = mean_logit.has_value() ? mean.data() : nullptr;
  args.target = in.labels.data();
  args.label_smoothing = label_smoothing;
  args.ignore_index = ignore_index;
  args.reduced = in.reduced;
  args.mean = in.kind == Reduction::mean;
  args.wide = wide;
  args.loss = loss.data_ptr();
  device::launch_loss(args, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return loss;
}

LossGradientTuple margin_loss_backward_cuda(TORCHMARGIN_LOSS_BACKWARD_OP_PARAMETERS) {
  constexpr std::string_view op = "_margin_loss_backward";
  const c10::cuda::CUDAGuard guard(other_lse.device());
  const LossInputs in(op, other_lse, target_logit, target, reduction);
  in.check_grad(op, grad);
  const LossGradientTuple gradients = empty_loss_gradients(other_lse);
  LossGradientArgs args{};
  args.rows = in.rows;
  args.grad = raw_vector(grad);
  args.other_lse = in.other.data();
  args.target_logit = in.own.data();
  args.target = in.labels.data();
  args.label_smoothing = label_smoothing;
  args.ignore_index = ignore_index;
  args.mean = in.kind == Reduction::mean;
  args.to_other = std::get<0>(gradients).data_ptr<double>();
  args.to_own = std::get<1>(gradients).data_ptr<double>();
  args.to_mean = std::get<2>(gradients).data_ptr<double>();
  device::launch_loss_gradient(args, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return gradients;
}

TORCH_LIBRARY_IMPL(torchmargin, CUDA, library) {
  library.impl("_margin_loss", margin_loss_cuda);
  library.impl("_margin_loss_backward", margin_loss_backward_cuda);
}

} // namespace
} // namespace torchmargin::cuda
