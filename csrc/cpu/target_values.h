// The CPU as the private ops see it (sweep/linear_ops.h), beside the sweep.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

namespace torchmargin::cpu {

struct OnCpu {
  struct Guard {
    explicit Guard(const at::Device& /*device*/) {}
  };
  // Only ignore_index may lie outside [0, classes); IndexError otherwise.
  static void check_target_values(std::string_view op, const at::Tensor& target, int64_t classes, int64_t ignore_index);
};

} // namespace torchmargin::cpu
