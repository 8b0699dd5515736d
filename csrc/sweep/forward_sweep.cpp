// The forward sweep: the targets first, then one chunk of classes after the other, each tile of rows scored against it
// in a small workspace (or where its products are kept for the backward pass), then the lanes' sums combined. Nothing
// of size B x C exists.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "math/angle.h"
#include "ops/target_place.h"
#include "sweep/class_loop.h"
#include "sweep/row_operand.h"
#include "sweep/sweeps.h"

namespace torchmargin {
namespace {

struct Lane {
  at::Tensor products; // a tile, acc, or with sub-centers a plane of it for each
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

// The running sums of every row, a set for each lane: [lanes, B] each, or [lanes, B, hardest]. `row`: of all lanes'.
class LaneSums {
 public:
  LaneSums(const ClassLoop& loop, bool with_logit_sum)
      : memory_(loop.empty({with_logit_sum ? 4 : 3, loop.plan().lanes, loop.sizes().rows}, at::kDouble)),
        begin_(memory_.data_ptr<double>()),
        size_(loop.plan().lanes * loop.sizes().rows),
        with_logit_sum_(with_logit_sum),
        hardest_(loop.problem().hardest) {
    if (hardest_ > 0) {
      top_logit_ = loop.empty({loop.plan().lanes, loop.sizes().rows, hardest_});
      top_class_ = loop.empty(top_logit_.sizes(), at::kLong);
    }
  }

  RunningSums from(int64_t row) const {
    return {begin_ + row, begin_ + size_ + row, begin_ + 2 * size_ + row};
  }
  double* logit_sum(int64_t row) const {
    return with_logit_sum_ ? begin_ + 3 * size_ + row : nullptr;
  }
  // [3 or 4, lanes, B].
  const at::Tensor& memory() const {
    return memory_;
  }
  void* top_logit(int64_t row) const {
    return hardest_ > 0 ? static_cast<char*>(top_logit_.data_ptr()) + row * hardest_ * top_logit_.element_size()
                        : nullptr;
  }
  int64_t* top_class(int64_t row) const {
    return hardest_ > 0 ? top_class_.data_ptr<int64_t>() + row * hardest_ : nullptr;
  }

 private:
  at::Tensor memory_;
  double* begin_;
  int64_t size_;
  bool with_logit_sum_;
  int64_t hardest_;
  at::Tensor top_logit_, top_class_;
};

// Where fused tiles add their sums: [sets, B] each, or nothing.
class FusedSets {
 public:
  FusedSets(const ClassLoop& loop, bool wanted) : sets_(wanted ? loop.traits().tile.processors : 0) {
    if (wanted) {
      sum_ = loop.double_zeros({sets_, loop.sizes().rows});
      maximum_ = at::full_like(sum_, -std::numeric_limits<double>::infinity());
    }
  }
  double* sum(int64_t row) const {
    return sets_ > 0 ? pointer<double>(sum_) + row : nullptr;
  }
  double* maximum(int64_t row) const {
    return sets_ > 0 ? pointer<double>(maximum_) + row : nullptr;
  }
  void fold(const ClassLoop& loop, bool first, RunningSums sums) const {
    loop.kernels().fold_sets(
        {.rows = loop.sizes().rows,
         .sets = sets_,
         .sum = pointer<double>(sum_),
         .maximum = pointer<double>(maximum_),
         .first = first,
         .sums = sums});
  }

 private:
  int64_t sets_;
  at::Tensor sum_, maximum_;
};

// One against all: the lanes' sums, in order.
void finish_binary(const ClassLoop& loop, const at::Tensor& sums, ForwardResult& result) {
  result.other_lse = sums.select(0, 0).sum(0);
  result.logit_sum = sums.select(0, 1).sum(0);
  result.record.weight_sum = result.logit_sum.clone();
  const at::Tensor maximum = sums.select(0, 2).amax(0).to(loop.acc());
  result.max_other_logit = at::where(result.other_lse.isnan(), result.other_lse.to(loop.acc()), maximum);
  result.hardest_logit = loop.empty({loop.sizes().rows, 0}, at::kDouble);
  result.hardest_class = loop.empty({loop.sizes().rows, 0}, at::kLong);
}

// Of a weight without classes: what merges with other shards and changes nothing.
ForwardResult no_classes(const LinearProblem& problem, const ForwardRequest& request) {
  const int64_t rows = problem.input.size(0);
  const auto options = problem.input.options().dtype(problem.acc()).requires_grad(false);
  const auto wide = options.dtype(at::kDouble);
  constexpr double kNothing = -std::numeric_limits<double>::infinity();
  ForwardResult result;
  result.other_lse = at::full({rows}, problem.one_against_all() ? 0.0 : kNothing, wide);
  result.target_logit = at::zeros({rows}, wide);
  result.logit_sum = at::zeros({rows}, wide);
  result.hardest_logit = at::full({rows, problem.hardest}, kNothing, wide);
  result.target_angle = at::zeros({rows}, options);
  result.max_other_logit = at::full({rows}, kNothing, options);
  result.hardest_class = at::full({rows, problem.hardest}, -1, options.dtype(at::kLong));
  result.record = {
      .kept = at::empty({rows, 0}, options),
      .winners = at::empty({rows, 0}, options.dtype(at::kByte)),
      .inverse_norms = at::empty({0}, options),
      .weight_sum = at::zeros({weight_sum_size(problem, request.with_logit_sum).expect_int()}, wide),
      .row_state = request.row_state.has_value() ? request.row_state->clone(at::MemoryFormat::Contiguous)
                                                 : at::zeros({rows, kRowStateSize}, wide),
      .weight_scale = at::ones({problem.normalize_weight ? 0 : 1}, wide)};
  return result;
}

} // namespace

TargetTuple sweep_targets(const LinearProblem& problem, const Device& device) {
  if (problem.weight.size(0) == 0) {
    const auto wide = problem.input.options().dtype(at::kDouble).requires_grad(false);
    return {at::zeros({problem.input.size(0)}, wide), at::zeros({problem.input.size(0), kRowStateSize}, wide)};
  }
  const ClassLoop loop(problem, device);
  const at::Tensor state = loop.target_rows(/*given_state=*/std::nullopt).state;
  // As angle_of() has it, in float64 whatever acc is.
  const at::Tensor zero = state.slice(1, 0, 2).sqrt().lt(kZeroNorm).any(1);
  const at::Tensor theta = 2.0 * at::atan2(state.select(1, 2).sqrt(), state.select(1, 3).sqrt());
  const at::Tensor right = at::full({}, right_angle().theta, state.options());
  const at::Tensor present = target_place(loop.target(), loop.sizes().classes).present;
  return {at::where(present, at::where(zero, right, theta), at::zeros({}, state.options())), state};
}

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
  record.winners = loop.empty({sizes.rows, loop.centers() > 1 ? record.kept.size(1) : 0}, at::kByte);
  record.inverse_norms = loop.empty({problem.normalize_weight ? problem.weight.size(0) : 0});
  record.weight_scale = loop.weight_scale().defined()
      ? loop.weight_scale()
      : loop.double_zeros({problem.normalize_weight ? 0 : 1}).fill_(1.0);

  const ClassLoop::TargetRows targets = loop.target_rows(request.row_state);
  record.row_state = targets.state;
  result.target_logit = targets.logit;
  result.target_angle = targets.angle;

  // NB: with sub-centers which weights count differs from row to row.
  const bool with_weight_sum = request.with_logit_sum && loop.centers() == 1 && !problem.one_against_all();
  const at::Tensor hard = loop.hard_rows(record.row_state);
  const LaneSums sums(loop, /*with_logit_sum=*/request.with_logit_sum && (hard.defined() || loop.centers() > 1));
  const int64_t sum_sets = loop.traits().sum_sets;
  const at::Tensor weight_sums = loop.double_zeros({lane_count * sum_sets, with_weight_sum ? sizes.features : 0});
  const RowOperand input(loop, record.row_state);
  InputNorms norms(loop);
  const at::Tensor factors = row_factors(loop, norms);
  const bool fused = loop.fused() && kept < sizes.classes;
  std::vector<Lane> lanes = make_lanes(loop, /*with_products=*/(kept < sizes.classes && !fused) || loop.centers() > 1);
  const FusedSets sets(loop, fused);
  loop.for_each_chunk(kept, [&](int64_t lane, Range classes) {
    const at::Tensor weight = loop.load_weight(
        classes, lanes[lane].weight_buffer, record.inverse_norms,
        pointer<double>(weight_sums.select(0, lane * sum_sets)));
    loop.for_each_tile([&](Range rows) {
      Tile tile = loop.tile(
          rows, classes, record, factors, classes.begin < kept, lanes[lane].products, /*winner_buffer=*/at::Tensor());
      tile.row_operand = input.tile(rows);
      tile.class_operand = weight;
      const int64_t first = lane * sizes.rows + rows.begin;
      loop.steps().score(
          loop.kernels(), tile,
          {.sums = sums.from(first),
           .bounded = loop.bounded(),
           .first = !lanes[lane].begun,
           .hard = hard_row(hard, rows.begin),
           .logit_sum = sums.logit_sum(first),
           .sum_of_changes = loop.centers() == 1,
           .hardest = problem.hardest,
           .top_logit = sums.top_logit(first),
           .top_class = sums.top_class(first),
           .binary = problem.binary,
           .binary_bias = problem.bias.has_value() ? loop.bias()->data_ptr() : nullptr,
           .set_sum = sets.sum(rows.begin),
           .set_maximum = sets.maximum(rows.begin),
           .set_stride = sizes.rows});
    });
    lanes[lane].begun = lanes[lane].begun || !fused || classes.begin < kept; // a fused tile's sums are elsewhere
  });
  if (fused) {
    sets.fold(loop, /*first=*/!lanes[0].begun, sums.from(0));
    lanes[0].begun = true;
  }

  // NB: a lane without a chunk would leave its running sums unwritten; the plan gives each several.
  TORCH_INTERNAL_ASSERT(std::all_of(lanes.begin(), lanes.end(), [](const Lane& lane) { return lane.begun; }));
  if (problem.one_against_all()) {
    finish_binary(loop, sums.memory(), result);
    return result;
  }
  record.weight_sum = with_weight_sum && weight_sums.size(0) > 1 ? weight_sums.sum(0) : weight_sums.select(0, 0);
  result.hardest_logit = loop.empty({sizes.rows, problem.hardest}, at::kDouble);
  result.hardest_class = loop.empty({sizes.rows, problem.hardest}, at::kLong);
  if (problem.hardest > 0) {
    loop.kernels().merge_hardest(
        {.context = loop.context(),
         .rows = sizes.rows,
         .state = row_state(record.row_state),
         .lanes = lane_count,
         .hardest = problem.hardest,
         .top_logit = sums.top_logit(0),
         .top_class = sums.top_class(0),
         .sums = sums.from(0),
         .hardest_logit = pointer<double>(result.hardest_logit),
         .hardest_class = pointer<int64_t>(result.hardest_class)},
        loop.acc());
  }
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
       .max_other_logit = result.max_other_logit.data_ptr(),
       .more_logit_sum = sums.logit_sum(0)},
      loop.acc());
  return result;
}

} // namespace torchmargin
