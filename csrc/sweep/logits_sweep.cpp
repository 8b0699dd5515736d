// The sweeps of margin_logits: every chunk's products are scaled where they stand in the result, and the logits with a
// margin put in their places; backwards, the given gradients take the place of the softmax weights.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <vector>

#include "ops/target_place.h"
#include "sweep/gradient_sweep.h"
#include "sweep/sweeps.h"
#include "sweep/tile_steps.h"

namespace torchmargin {
namespace {

// Products to logits, where they stand.
void scale_products(
    const ClassLoop& loop,
    at::Tensor tile,
    const at::Tensor& class_factors,
    const at::Tensor& factors) {
  if (class_factors.defined()) {
    tile.mul_(class_factors);
  }
  if (factors.defined()) {
    tile.mul_(factors.unsqueeze(1));
  }
  if (loop.margin().scale != 1.0) {
    tile.mul_(loop.margin().scale);
  }
}

} // namespace

LogitsResult sweep_logits(const LinearProblem& problem, const Device& device) {
  refuse_no_classes("_margin_logits_forward", problem);
  const ClassLoop loop(problem, device);
  const SweepSizes& sizes = loop.sizes();
  LogitsResult result;
  result.logits = loop.empty({sizes.rows, sizes.classes});
  result.inverse_norms = loop.empty({problem.normalize_weight ? sizes.classes : 0});
  const ClassLoop::TargetRows targets = loop.target_rows(/*given_state=*/std::nullopt);
  result.row_state = targets.state;

  const RowOperand input(loop, result.row_state);
  InputNorms norms(loop);
  const at::Tensor factors = row_factors(loop, norms);
  std::vector<at::Tensor> weight_buffers;
  for (int64_t lane = 0; lane < loop.plan().lanes; ++lane) {
    weight_buffers.push_back(loop.weight_buffer());
  }
  loop.for_each_chunk(/*kept_classes=*/0, [&](int64_t lane, Range classes) {
    const at::Tensor weight = loop.load_weight(classes, weight_buffers[lane], result.inverse_norms);
    const at::Tensor class_factors = loop.class_factors(classes, result.inverse_norms);
    loop.for_each_tile([&](Range rows) {
      const at::Tensor logits = columns_of(rows_of(result.logits, rows), classes);
      multiply(logits, input.tile(rows), weight.t());
      scale_products(loop, logits, class_factors, factors.defined() ? rows_of(factors, rows) : factors);
      if (loop.bias().has_value()) {
        logits.add_(rows_of(*loop.bias(), classes));
      }
    });
  });

  const auto [present, place] = target_place(loop.target(), sizes.classes);
  const at::Tensor column = place.unsqueeze(1);
  const at::Tensor own = at::where(present, targets.logit.to(loop.acc()), result.logits.gather(1, column).squeeze(1));
  result.logits.scatter_(1, column, own.unsqueeze(1));
  return result;
}

Gradients
sweep_logits_backward(const LinearProblem& problem, const LogitsBackwardRequest& request, const Device& device) {
  refuse_no_classes("_margin_logits_backward", problem);
  // Gradients may have any range, so they are multiplied in acc.
  const ClassLoop loop(problem, device, Operands::wide);
  const at::Tensor inverse_norms = request.inverse_norms.contiguous();
  const at::Tensor row_state = request.row_state.contiguous();
  const UpstreamVectors upstream = logits_upstream(loop, request.grad_logits);
  GradientSweep sweep(loop, {inverse_norms, row_state, /*weight_sum=*/at::Tensor()}, upstream, request.wanted);
  if (!sweep.wants_products()) {
    return sweep.finish();
  }
  InputNorms norms(loop);
  sweep.run(/*kept_classes=*/0, norms, [&](const WeightsWanted& wanted) {
    const auto& [lane, rows, classes, weight, weights, times_class_factors, of_bias] = wanted;
    weights.copy_(columns_of(rows_of(request.grad_logits, rows), classes));
    const at::Tensor columns = at::arange(classes.begin, classes.begin + classes.count, loop.target().options());
    const at::Tensor own = columns.unsqueeze(0).eq(rows_of(loop.target(), rows).unsqueeze(1));
    weights.masked_fill_(own, 0.0);
    if (times_class_factors) {
      multiply_by_class_factors(loop, weights, classes, inverse_norms);
    }
  });
  return sweep.finish();
}

} // namespace torchmargin
