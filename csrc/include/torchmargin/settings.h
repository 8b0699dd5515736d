/// @file
/// The workspace limit: how much memory one call may hold beside its inputs and outputs, and how it would be used.
#pragma once

#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "torchmargin/export.h"

namespace torchmargin {

constexpr int64_t kDefaultWorkspaceLimit = int64_t{256} << 20; ///< bytes

/// Bytes that one call may hold beyond its inputs, outputs, gradients and a few vectors of length B and C: one limit
/// for the CPU and one for CUDA. Read once at the start of a forward or backward.
///
/// The forward keeps products for the backward while they fit; what does not fit is computed again. A limit that
/// cannot hold one tile makes the ops throw.
TORCHMARGIN_API int64_t workspace_limit(c10::DeviceType device = c10::DeviceType::CPU);
/// For all later calls, from any thread. Throws c10::ValueError for bytes < 1 and for other devices than CPU and CUDA.
TORCHMARGIN_API void set_workspace_limit(c10::DeviceType device, int64_t bytes);

/// How a problem is cut up; see plan().
struct Plan {
  int64_t lanes; ///< threads that each work on chunks of their own; 1: all share out each product
  int64_t row_tile; ///< rows in one product
  int64_t class_chunk; ///< classes in one product
  int64_t input_splits; ///< slices of a chunk that grad_input's product is cut into, for GPUs
  c10::ScalarType operand_dtype; ///< what the products read; they accumulate in float32 or float64
  int64_t kept_classes; ///< leading classes whose products are kept for the backward
  int64_t scratch_bytes; ///< workspace beside what is kept
  int64_t workspace_limit;
  bool fits; ///< false: the limit is too small, a call would throw
};

/// What a loss of cosines (normalised, without a bias) would do with contiguous tensors of these sizes under the
/// present limit, number of threads and GPU. Nothing is allocated. compute_dtype: what the op would be given, for
/// float32 only.
TORCHMARGIN_API Plan plan(
    int64_t batch,
    int64_t features,
    int64_t classes,
    c10::ScalarType dtype = c10::ScalarType::Float,
    c10::DeviceType device = c10::DeviceType::CPU,
    std::optional<c10::ScalarType> compute_dtype = std::nullopt);

} // namespace torchmargin
