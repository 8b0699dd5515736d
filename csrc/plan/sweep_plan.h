// From the sizes, dtypes and strides of a problem, the device's traits and the workspace limit to the plan of its
// sweep. Whoever needs a plan (the ops, to know what to keep; the sweep; torchmargin::plan) makes it here.
#pragma once

#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "plan/chunk_plan.h"
#include "plan/device_traits.h"
#include "plan/operands.h"

namespace torchmargin {

struct PlanRequest {
  int64_t rows; // B
  int64_t features; // D
  int64_t classes; // C
  c10::ScalarType dtype; // of input and weight
  std::optional<c10::ScalarType> compute_dtype; // as the ops take it
  bool weight_in_rows = true; // the features of a class are contiguous
  bool wide = false; // products are made in acc, whatever is allowed
  int64_t calls = 1; // that hold what they keep at the same time
  int64_t centers = 1; // K: weights of each class
  bool fused = false; // its tiles are fit for FusedTileArgs, if the device has such
};

struct SweepPlan {
  OperandFormat operands;
  SweepSizes sizes;
  ChunkPlan chunks;
  int64_t limit; // bytes
};

// `limit_of`: whose workspace limit counts.
SweepPlan make_sweep_plan(const PlanRequest& request, const DeviceTraits& device, c10::DeviceType limit_of);

} // namespace torchmargin
