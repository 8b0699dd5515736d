// What _C shows of the library, in plain C++ types.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include "torchmargin/export.h"

namespace torchmargin::bindings {

// How a problem would be cut up: see plan/chunk_plan.h.
struct Plan {
  std::string path; // which implementation would run
  int64_t lanes;
  int64_t row_tile;
  int64_t class_chunk;
  int64_t input_splits;
  std::string operand_dtype; // "float32", ...: what the products read
  int64_t kept_classes;
  int64_t scratch_bytes;
  int64_t workspace_limit;
  bool fits;
};

TORCHMARGIN_API std::string version();
TORCHMARGIN_API std::string built_for_torch();
// "sm_90", "compute_90", ...; empty for a build without CUDA.
TORCHMARGIN_API std::vector<std::string> cuda_architectures();
// device_type is "cpu" or "cuda"; anything else, or bytes < 1, is std::invalid_argument.
TORCHMARGIN_API int64_t get_workspace_limit(const std::string& device_type);
TORCHMARGIN_API void set_workspace_limit(const std::string& device_type, int64_t bytes);
// dtype is "float64", "float32", "bfloat16" or "float16"; compute_dtype one of the last three, or empty.
TORCHMARGIN_API Plan choose_plan(
    int64_t rows,
    int64_t features,
    int64_t classes,
    const std::string& dtype,
    const std::string& device_type,
    const std::string& compute_dtype);

// The plan of float32 parameters with float16 products on a GPU that need not be here: see plan/device_traits.h.
TORCHMARGIN_API Plan choose_plan_for_gpu(
    int64_t rows,
    int64_t features,
    int64_t classes,
    int64_t processors,
    int64_t l2_bytes,
    bool fused_tiles);

// The table of presets.h: of each loss, by the name of its module, what it comes with by the names of the options.
using Published = std::map<std::string, std::variant<bool, int64_t, double, std::string>>;
TORCHMARGIN_API std::map<std::string, Published> published_losses();

} // namespace torchmargin::bindings
