// What the CPU's kernels share: the choice of acc and the size of a task.
#pragma once

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

namespace torchmargin::cpu {

// Calls body(T()) with T = double or float.
template <typename Body>
void with_acc(c10::ScalarType acc, Body body) {
  acc == c10::ScalarType::Double ? body(double()) : body(float());
}

// Rows per task, so that a task has some ten thousand elements.
inline int64_t grain(int64_t row_size) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(row_size, 1));
}

} // namespace torchmargin::cpu
