// The forward sweep: one chunk of classes after the other, product of a tile of rows with
// it into a small workspace (or to where it is kept for the backward pass), one fused pass
// over that. Nothing of size B x C exists.
#include <ATen/Functions.h>

#include <limits>
#include <vector>

#include "sweep/class_loop.h"
#include "sweep/class_sweep.h"
#include "sweep/products.h"

namespace torchmargin {
namespace {

struct Lane {
  at::Tensor scratch; // a tile of logits, acc
  at::Tensor weight_buffer; // [class_chunk, D], if weights are converted
};

std::vector<Lane> make_lanes(const ClassLoop& loop, bool with_scratch) {
  std::vector<Lane> lanes(loop.plan().lanes);
  for (Lane& lane : lanes) {
    if (with_scratch) {
      lane.scratch = loop.tile_buffer(loop.acc());
    }
    lane.weight_buffer = loop.weight_buffer();
  }
  return lanes;
}

} // namespace

ForwardResult sweep_forward(const LinearProblem& problem, const ForwardRequest& request, const SweepKernels& kernels) {
  const ClassLoop loop(problem, kernels);
  const SweepSizes& sizes = loop.sizes();
  const int64_t lane_count = loop.plan().lanes;

  ForwardResult result;
  result.kept = loop.empty({sizes.rows, kept_columns(request.kept_classes, sizes.classes)});
  result.inverse_norms = loop.empty({problem.normalize_weight ? sizes.classes : 0});

  // Each lane's running (shift, sum) and maximum of every row, and its sum of weights.
  const at::Tensor shift = loop.double_zeros({lane_count, sizes.rows}).fill_(-std::numeric_limits<double>::infinity());
  const at::Tensor sum = loop.double_zeros({lane_count, sizes.rows});
  const at::Tensor maximum = shift.clone();
  const at::Tensor weight_sums = loop.double_zeros({lane_count, request.with_logit_sum ? sizes.features : 0});

  const RowOperand input(loop);
  const at::Tensor factors = row_factors(loop);
  const std::vector<Lane> lanes = make_lanes(loop, /*with_scratch=*/request.kept_classes < sizes.classes);
  loop.for_each_chunk(request.kept_classes, [&](int64_t lane, Range classes) {
    const at::Tensor weight = loop.load_weight(
        classes, lanes[lane].weight_buffer, result.inverse_norms, pointer<double>(weight_sums.select(0, lane)));
    loop.for_each_tile([&](Range rows) {
      const at::Tensor logits = classes.begin < request.kept_classes ? columns_of(rows_of(result.kept, rows), classes)
                                                                     : loop.tile_in(lanes[lane].scratch, rows, classes);
      multiply(logits, input.tile(rows), weight.t());
      const auto of_tile = [&](const at::Tensor& state) {
        return state.data_ptr<double>() + lane * sizes.rows + rows.begin;
      };
      kernels.accumulate_chunk(
          {loop.describe(logits, rows, classes, result.inverse_norms, factors), loop.bounded(), of_tile(shift),
           of_tile(sum), of_tile(maximum)},
          loop.acc());
    });
  });

  result.weight_sum = weight_sums.sum(0);
  const at::Tensor bias_sum = problem.bias.has_value() ? loop.bias()->sum(at::kDouble) : at::Tensor();
  for (at::Tensor* vector : {&result.other_lse, &result.target_logit, &result.logit_sum}) {
    *vector = loop.empty({sizes.rows}, at::kDouble);
  }
  for (at::Tensor* vector : {&result.target_angle, &result.max_other_logit}) {
    *vector = loop.empty({sizes.rows});
  }
  kernels.target_pass(
      {loop.context(), sizes.rows, lane_count, pointer<double>(shift), pointer<double>(sum), pointer<double>(maximum),
       pointer<double>(result.weight_sum), pointer<double>(bias_sum), result.other_lse.data_ptr<double>(),
       result.target_logit.data_ptr<double>(), result.logit_sum.data_ptr<double>(), result.target_angle.data_ptr(),
       result.max_other_logit.data_ptr()},
      loop.acc());
  return result;
}

} // namespace torchmargin
