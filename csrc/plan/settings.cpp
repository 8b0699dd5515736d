#include "torchmargin/settings.h"

#include <c10/util/Exception.h>

#include <atomic>

#include "plan/sweep_plan.h"

namespace torchmargin {
namespace {

std::atomic<int64_t>& limit_of(c10::DeviceType device) {
  static std::atomic<int64_t> cpu{kDefaultWorkspaceLimit};
  static std::atomic<int64_t> cuda{kDefaultWorkspaceLimit};
  // Meta tensors are planned as CPU tensors are.
  return device == c10::DeviceType::CUDA ? cuda : cpu;
}

void check_device_type(const char* what, c10::DeviceType device) {
  TORCH_CHECK_VALUE(
      device == c10::DeviceType::CPU || device == c10::DeviceType::CUDA, "torchmargin: expected ", what,
      " for cpu or cuda, but got device type ", device);
}

} // namespace

int64_t workspace_limit(c10::DeviceType device) {
  return limit_of(device).load(std::memory_order_relaxed);
}

void set_workspace_limit(c10::DeviceType device, int64_t bytes) {
  check_device_type("a workspace limit", device);
  TORCH_CHECK_VALUE(
      bytes > 0, "torchmargin: expected the workspace limit to be a positive number of bytes, but got ", bytes);
  limit_of(device).store(bytes, std::memory_order_relaxed);
}

Plan plan(
    int64_t batch,
    int64_t features,
    int64_t classes,
    c10::ScalarType dtype,
    c10::DeviceType device,
    std::optional<c10::ScalarType> compute_dtype) {
  using c10::ScalarType;
  check_device_type("a plan", device);
  TORCH_CHECK_VALUE(
      batch >= 0 && features >= 1 && classes >= 1,
      "torchmargin: expected B >= 0, D >= 1 and C >= 1, but got B = ", batch, ", D = ", features, ", C = ", classes);
  const auto narrow = [](ScalarType type) {
    return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
  };
  TORCH_CHECK_VALUE(
      dtype == ScalarType::Double || narrow(dtype),
      "torchmargin: expected dtype float64, float32, bfloat16 or float16, but got ", dtype);
  TORCH_CHECK_VALUE(
      !compute_dtype.has_value() || (dtype == ScalarType::Float && narrow(*compute_dtype)),
      "torchmargin: expected compute_dtype float16, bfloat16 or float32, with dtype float32 only, but got ",
      compute_dtype.value_or(ScalarType::Undefined), " with ", dtype);
  const SweepPlan made = make_sweep_plan(
      {.rows = batch,
       .features = features,
       .classes = classes,
       .dtype = dtype,
       .compute_dtype = compute_dtype,
       .fused = dtype != ScalarType::BFloat16 || features % 8 == 0},
      traits_of(c10::Device(device)), device);
  const ChunkPlan& chosen = made.chunks;
  return {
      .lanes = chosen.lanes,
      .row_tile = chosen.row_tile,
      .class_chunk = chosen.class_chunk,
      .input_splits = chosen.input_splits,
      .operand_dtype = made.operands.dtype,
      .kept_classes = chosen.kept_classes,
      .scratch_bytes = chosen.scratch_bytes,
      .workspace_limit = made.limit,
      .fits = chosen.fits};
}

} // namespace torchmargin
