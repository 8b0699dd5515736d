// Labels gathered from ranks: what a device's check of their values needs to know.
#pragma once

#include <cstdint>
#include <limits>
#include <string>

namespace torchmargin {

// The label of every row of a rank that refused its arguments: no rank goes on.
constexpr int64_t kRefusedLabel = std::numeric_limits<int64_t>::min();

inline std::string refusal_of(int64_t rank) {
  return "class_parallel: rank " + std::to_string(rank) + " of the group refused its arguments; its own error says why";
}

} // namespace torchmargin
