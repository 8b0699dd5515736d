// The forward sweep: the targets first, then one chunk of classes after the other, each tile of rows scored against it
// in a small workspace (or where its products are kept for the backward pass), then the lanes' sums combined. Nothing
// of size B x C exists.
#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "sweep/class_loop.h"
#include "sweep/row_operand.h"
#include "sweep/sweeps.h"

namespace torchmargin {
namespace {

struct Lane {
  at::Tensor products; // a tile, acc
  at::Tensor weight_buffer; // [class_chunk, D], if weights are converted
  bool begun = false; // its running sums hold something
};

std::vector<Lane> make_lanes(const ClassLoop& loop, bool with_products) {
  std::vector<Lane> lanes(loop.plan().lanes);
  for (Lane& lane : lanes) {
    if (with_products) {
      lane.products = loop.tile_buffer(loop.acc());
    }
    lane.weight_buffer = loop.weight_buffer();
  }
  return lanes;
}

// The running sums of every row, a set for each lane: [lanes, B] each.
class LaneSums {
 public:
  explicit LaneSums(const ClassLoop& loop)
      : memory_(loop.empty({3, loop.plan().lanes, loop.sizes().rows}, at::kDouble)),
        begin_(memory_.data_ptr<double>()),
        size_(loop.plan().lanes * loop.sizes().rows) {}

  RunningSums from(int64_t row) const {
    return {begin_ + row, begin_ + size_ + row, begin_ + 2 * size_ + row};
  }

 private:
  at::Tensor memory_;
  double* begin_;
  int64_t size_;
};

// Of a weight without classes: what merges with other shards and changes nothing.
ForwardResult no_classes(const LinearProblem& problem, const ForwardRequest& request) {
  const int64_t rows = problem.input.size(0);
  const auto options = problem.input.options().dtype(problem.acc()).requires_grad(false);
  const auto wide = options.dtype(at::kDouble);
  constexpr double kNothing = -std::numeric_limits<double>::infinity();
  ForwardResult result;
  result.other_lse = at::full({rows}, kNothing, wide);
  result.target_logit = at::zeros({rows}, wide);
  result.logit_sum = at::zeros({rows}, wide);
  result.target_angle = at::zeros({rows}, options);
  result.max_other_logit = at::full({rows}, kNothing, options);
  result.record = {
      .kept = at::empty({rows, 0}, options),
      .inverse_norms = at::empty({0}, options),
      .weight_sum = at::zeros({request.with_logit_sum ? problem.input.size(1) : 0}, wide),
      .row_state = request.row_state.has_value() ? request.row_state->clone(at::MemoryFormat::Contiguous)
                                                 : at::zeros({rows, kRowStateSize}, wide),
      .weight_scale = at::ones({problem.normalize_weight ? 0 : 1}, wide)};
  return result;
}

} // namespace

ForwardResult sweep_forward(const LinearProblem& problem, const ForwardRequest& request, const Device& device) {
  if (problem.weight.size(0) == 0) {
    return no_classes(problem, request);
  }
  const ClassLoop loop(problem, device);
  const SweepSizes& sizes = loop.sizes();
  const int64_t lane_count = loop.plan().lanes;
  const int64_t kept = request.kept_classes;
  ForwardResult result;
  ForwardRecord& record = result.record;
  record.kept = loop.empty({sizes.rows, kept_columns(kept, sizes.classes)});
  record.inverse_norms = loop.empty({problem.normalize_weight ? sizes.classes : 0});
  record.weight_scale = loop.weight_scale().defined()
      ? loop.weight_scale()
      : loop.double_zeros({problem.normalize_weight ? 0 : 1}).fill_(1.0);

  const ClassLoop::TargetRows targets = loop.target_rows(request.row_state);
  record.row_state = targets.state;
  result.target_logit = targets.logit;
  result.target_angle = targets.angle;

  const LaneSums sums(loop);
  const at::Tensor weight_sums = loop.double_zeros({lane_count, request.with_logit_sum ? sizes.features : 0});
  const RowOperand input(loop, record.row_state);
  InputNorms norms(loop);
  const at::Tensor factors = row_factors(loop, norms);
  std::vector<Lane> lanes = make_lanes(loop, /*with_products=*/kept < sizes.classes);
  loop.for_each_chunk(kept, [&](int64_t lane, Range classes) {
    const at::Tensor weight = loop.load_weight(
        classes, lanes[lane].weight_buffer, record.inverse_norms, pointer<double>(weight_sums.select(0, lane)));
    loop.for_each_tile([&](Range rows) {
      const at::Tensor products = classes.begin < kept ? columns_of(rows_of(record.kept, rows), classes)
                                                       : loop.tile_in(lanes[lane].products, rows, classes);
      const Tile tile{
          input.tile(rows), weight, products, loop.describe(products, rows, classes, record.inverse_norms, factors)};
      loop.steps().score(
          loop.kernels(), tile,
          {.sums = sums.from(lane * sizes.rows + rows.begin), .bounded = loop.bounded(), .first = !lanes[lane].begun});
    });
    lanes[lane].begun = true;
  });

  // NB: a lane without a chunk would leave its running sums unwritten; the plan gives each several.
  TORCH_INTERNAL_ASSERT(std::all_of(lanes.begin(), lanes.end(), [](const Lane& lane) { return lane.begun; }));
  record.weight_sum = request.with_logit_sum && lane_count > 1 ? weight_sums.sum(0) : weight_sums.select(0, 0);
  const at::Tensor bias_sum = problem.bias.has_value() ? loop.bias()->sum(at::kDouble) : at::Tensor();
  result.other_lse = loop.empty({sizes.rows}, at::kDouble);
  result.logit_sum = loop.empty({sizes.rows}, at::kDouble);
  result.max_other_logit = loop.empty({sizes.rows});
  loop.kernels().combine_rows(
      {.context = loop.context(),
       .rows = sizes.rows,
       .state = row_state(record.row_state),
       .target_logit = result.target_logit.data_ptr<double>(),
       .lanes = lane_count,
       .sums = sums.from(0),
       .weight_sum = pointer<double>(record.weight_sum),
       .bias_sum = pointer<double>(bias_sum),
       .other_lse = result.other_lse.data_ptr<double>(),
       .logit_sum = result.logit_sum.data_ptr<double>(),
       .max_other_logit = result.max_other_logit.data_ptr()},
      loop.acc());
  return result;
}

} // namespace torchmargin
