// The check of the targets' values where absent targets are not allowed.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

namespace torchmargin::cpu {

// Only ignore_index may lie outside [0, classes); IndexError otherwise.
void check_target_values(std::string_view op, const at::Tensor& target, int64_t classes, int64_t ignore_index);

} // namespace torchmargin::cpu
