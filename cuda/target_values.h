// The check of the targets' values where absent targets are not allowed.
#pragma once

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

namespace torchmargin::cuda {

// Only ignore_index may lie outside [0, classes). A device-side assertion, as nll_loss has it: no
// synchronisation, and a CUDA graph may capture it.
inline void assert_target_values(const at::Tensor& target, int64_t classes, int64_t ignore_index) {
  if (target.numel() > 0) {
    const at::Tensor good = target.ge(0).logical_and(target.lt(classes)).logical_or(target.eq(ignore_index));
    at::_assert_async(good.all(), "torchmargin: expected target values in [0, C) or ignore_index");
  }
}

} // namespace torchmargin::cuda
