#include "bindings/introspection.h"

#include <ATen/Parallel.h>

#include <sstream>
#include <stdexcept>

#include "sweep/chunk_plan.h"
#include "sweep/settings.h"
#include "torchmargin/torchmargin.h"

namespace torchmargin::bindings {
namespace {

c10::DeviceType parse_device(const std::string& device_type) {
  if (device_type == "cpu") {
    return c10::DeviceType::CPU;
  }
  if (device_type == "cuda") {
    return c10::DeviceType::CUDA;
  }
  throw std::invalid_argument("torchmargin: expected device type 'cpu' or 'cuda', but got '" + device_type + "'");
}

} // namespace

std::string version() {
  return torchmargin::version();
}

std::string built_for_torch() {
  return torchmargin::built_for_torch();
}

std::vector<std::string> cuda_architectures() {
  std::vector<std::string> names;
  std::istringstream list(TORCHMARGIN_CUDA_ARCHITECTURES); // "8.0 9.0+PTX", empty without CUDA kernels
  for (std::string name; list >> name;) {
    names.push_back(name);
  }
  return names;
}

int64_t get_workspace_limit(const std::string& device_type) {
  return torchmargin::workspace_limit(parse_device(device_type));
}

void set_workspace_limit(const std::string& device_type, int64_t bytes) {
  if (bytes < 1) {
    throw std::invalid_argument(
        "torchmargin: expected the workspace limit to be a positive number of bytes, but got " + std::to_string(bytes));
  }
  torchmargin::set_workspace_limit(parse_device(device_type), bytes);
}

Plan choose_plan(
    int64_t rows,
    int64_t features,
    int64_t classes,
    const std::string& dtype,
    const std::string& device_type) {
  const bool half = dtype == "float16" || dtype == "bfloat16";
  if (!half && dtype != "float32" && dtype != "float64") {
    throw std::invalid_argument(
        "torchmargin: expected dtype float64, float32, bfloat16 or float16, but got '" + dtype + "'");
  }
  if (rows < 0 || features < 1 || classes < 1) {
    throw std::invalid_argument("torchmargin: expected B >= 0, D >= 1 and C >= 1");
  }
  const bool cpu = parse_device(device_type) == c10::DeviceType::CPU;
  if (!cpu && cuda_architectures().empty()) {
    throw std::invalid_argument("torchmargin: this build has no CUDA kernels to plan for");
  }
  const int64_t limit = get_workspace_limit(device_type);
  const SweepSizes sizes{
      rows,
      features,
      classes,
      dtype == "float64" ? 8 : 4,
      half,
      half,
      cpu ? at::get_num_threads() : 1,
      cpu ? kCpuTile : kGpuTile};
  const ChunkPlan plan = choose_chunk_plan(sizes, limit);
  return {
      cpu ? "cpu-sweep" : "cuda-sweep",
      plan.lanes,
      plan.row_tile,
      plan.class_chunk,
      plan.kept_classes,
      plan.scratch_bytes,
      limit,
      plan.fits};
}

} // namespace torchmargin::bindings
