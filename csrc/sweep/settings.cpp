#include "sweep/settings.h"

#include <c10/util/Exception.h>

#include <atomic>

namespace torchmargin {
namespace {

std::atomic<int64_t>& limit_of(c10::DeviceType device) {
  static std::atomic<int64_t> cpu{kDefaultWorkspaceLimit};
  static std::atomic<int64_t> cuda{kDefaultWorkspaceLimit};
  // Meta tensors are planned as CPU tensors are.
  return device == c10::DeviceType::CUDA ? cuda : cpu;
}

} // namespace

int64_t workspace_limit(c10::DeviceType device) {
  return limit_of(device).load(std::memory_order_relaxed);
}

void set_workspace_limit(c10::DeviceType device, int64_t bytes) {
  TORCH_CHECK_VALUE(
      device == c10::DeviceType::CPU || device == c10::DeviceType::CUDA,
      "torchmargin: expected a workspace limit for cpu or cuda, but got device type ", device);
  TORCH_CHECK_VALUE(
      bytes > 0, "torchmargin: expected the workspace limit to be a positive number of bytes, but got ", bytes);
  limit_of(device).store(bytes, std::memory_order_relaxed);
}

} // namespace torchmargin
