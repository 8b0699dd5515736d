// Who works on one row together: one thread on a CPU, a warp or a block on a GPU. Row bodies
// go over their elements from `rank` in steps of `size`; only `sum` meets the others.
#pragma once

#include "math/host_device.h"

namespace torchmargin {

struct Alone {
  static constexpr int rank = 0;
  static constexpr int size = 1;

  // The sum of every member's value, the same bits for all of them.
  TORCHMARGIN_HOST_DEVICE double sum(double value) const {
    return value;
  }
};

} // namespace torchmargin
