// The upstream gradients as the sweep needs them, one row at a time. For a thread on a CPU and for many on a GPU.
#pragma once

#include <cmath>
#include <limits>

#include "math/host_device.h"
#include "sweep/kernels.h"
#include "sweep/target_rows.h"

namespace torchmargin {

// Writes row i; what it has to say about the operand's scale comes back.
TORCHMARGIN_HOST_DEVICE inline double widen_row(const WidenUpstreamArgs& args, int64_t i) {
  const bool alone = args.other_lse[i] == -std::numeric_limits<double>::infinity();
  const bool present = args.target[i] >= 0 && args.target[i] < args.classes;
  const double g_z = vector_element(args.grad_logit_sum, i, 0.0);
  const double g_o = alone ? 0.0 : vector_element(args.grad_other_lse, i, 0.0);
  args.others[i] = g_o;
  args.weight_factor[i] = args.scale * g_o;
  args.own[i] = present ? vector_element(args.grad_target_logit, i, 0.0) + g_z : 0.0;
  if (args.sum != nullptr) {
    args.sum[i] = g_z;
  }
  return std::fabs(args.of_weight_factor ? args.scale * g_o : g_o);
}

// The larger of two sizes; NaN is the largest.
TORCHMARGIN_HOST_DEVICE inline double larger_size(double size, double other) {
  return other > size || std::isnan(other) ? other : size;
}

// From the largest size of all rows, exactly.
TORCHMARGIN_HOST_DEVICE inline double operand_scale_of(const WidenUpstreamArgs& args, double largest) {
  int exponent = 0;
  std::frexp(largest, &exponent);
  const double scale = std::ldexp(args.least, -exponent);
  return largest > 0.0 && std::isfinite(largest) && std::isfinite(scale) ? scale : 1.0;
}

} // namespace torchmargin
