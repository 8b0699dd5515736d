#include "plan/sweep_plan.h"

#include <ATen/Parallel.h>

#include "torchmargin/settings.h"

namespace torchmargin {

namespace {

// What the sums of fused tiles take, in the forward: less than a backward's tile of weights, but for very many rows.
int64_t set_bytes(int64_t rows, const DeviceTraits& device) {
  return 2 * static_cast<int64_t>(sizeof(double)) * device.tile.processors * rows;
}

} // namespace

SweepPlan make_sweep_plan(const PlanRequest& request, const DeviceTraits& device, c10::DeviceType limit_of) {
  const c10::ScalarType acc = product_dtype(request.dtype);
  SweepPlan plan;
  plan.limit = workspace_limit(limit_of);
  plan.operands =
      request.wide ? wide_operands(request.dtype) : choose_operands(device, request.dtype, request.compute_dtype);
  plan.sizes = {
      .rows = request.rows,
      .features = request.features,
      .classes = request.classes,
      .acc_bytes = static_cast<int64_t>(c10::elementSize(acc)),
      .operand_bytes = static_cast<int64_t>(c10::elementSize(plan.operands.dtype)),
      .convert_weight = plan.operands.unit_vectors || plan.operands.dtype != request.dtype || !request.weight_in_rows,
      .widen_gradients = acc != request.dtype,
      .threads = device.lanes && !at::in_parallel_region() ? at::get_num_threads() : 1,
      .preferred = device.tile,
      .centers = request.centers,
      .fused = request.fused && device.fused_tiles && c10::elementSize(plan.operands.dtype) == 2 &&
          set_bytes(request.rows, device) <= plan.limit / 4};
  plan.chunks = choose_chunk_plan(plan.sizes, plan.limit, request.calls);
  return plan;
}

} // namespace torchmargin
