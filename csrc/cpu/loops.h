// What the CPU's kernels share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sweep/dispatch.h"

namespace torchmargin::cpu {

// Rows per task, so that a task has some ten thousand elements.
inline int64_t grain(int64_t row_size) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(row_size, 1));
}

} // namespace torchmargin::cpu
