// The workspace limit, one per device type: the library's only mutable global.
#pragma once

#include <c10/core/DeviceType.h>

#include <cstdint>

#include "torchmargin/export.h"

namespace torchmargin {

constexpr int64_t kDefaultWorkspaceLimit = int64_t{256} << 20; // bytes

// Bytes that one call may hold beyond its inputs, outputs, gradients and a few
// vectors of length B and C. Read once at the start of a forward or backward.
TORCHMARGIN_API int64_t workspace_limit(c10::DeviceType device);
TORCHMARGIN_API void set_workspace_limit(c10::DeviceType device, int64_t bytes);

} // namespace torchmargin
