// CUDA as the private ops see it (csrc/sweep/linear_ops.h), beside the sweep.
#pragma once

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/cuda/CUDAGuard.h>

#include <string_view>

namespace torchmargin::cuda {

struct OnCuda {
  using Guard = c10::cuda::CUDAGuard;

  // Only ignore_index may lie outside [0, classes). A device-side assertion, as nll_loss has it: no
  // synchronisation, and a CUDA graph may capture it.
  static void
  check_target_values(std::string_view /*op*/, const at::Tensor& target, int64_t classes, int64_t ignore_index) {
    if (target.numel() > 0) {
      const at::Tensor good = target.ge(0).logical_and(target.lt(classes)).logical_or(target.eq(ignore_index));
      at::_assert_async(good.all(), "torchmargin: expected target values in [0, C) or ignore_index");
    }
  }
};

} // namespace torchmargin::cuda
