// The backward sweep of the loss: each tile's products are taken from what the forward kept or made again, and turned
// into the softmax weights Q of the other classes; gradient_sweep.h does the rest.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "sweep/gradient_sweep.h"
#include "sweep/hard_rows.h"
#include "sweep/sweeps.h"

namespace torchmargin {
namespace {

BackwardRequest contiguous(BackwardRequest request) {
  ForwardRecord& record = request.record;
  for (at::Tensor* tensor :
       {&request.other_lse, &request.hardest_class, &record.kept, &record.winners, &record.inverse_norms,
        &record.weight_sum, &record.row_state}) {
    *tensor = tensor->contiguous();
  }
  return request;
}

// Zeros: results of a weight without classes depend on nothing.
Gradients no_classes(const LinearProblem& problem, const std::array<bool, 5>& wanted) {
  const std::array<std::optional<at::Tensor>, 5> inputs{
      problem.input, problem.weight, problem.bias, problem.margins.sample_m2, problem.margins.sample_m3};
  Gradients gradients;
  for (size_t i = 0; i < inputs.size(); ++i) {
    gradients[i] = wanted[i] && inputs[i].has_value()
        ? at::zeros(inputs[i]->sizes(), inputs[i]->options().requires_grad(false))
        : at::empty({0}, problem.input.options().requires_grad(false));
  }
  return gradients;
}

// One against all: every class of every row has the same bias. 0 * NaN is 0 for a row without an upstream gradient.
at::Tensor gradient_of_one_bias(const BackwardRequest& request, const UpstreamVectors& upstream) {
  const at::Tensor none = at::zeros({}, upstream.own.options());
  if (!request.grad_other_lse.has_value()) {
    return upstream.own.sum();
  }
  const at::Tensor grad = request.grad_other_lse->to(at::kDouble);
  return at::where(grad.eq(0), none, grad * request.record.weight_sum).sum() + upstream.own.sum();
}

// What the rows' classes weigh where that is not Q alone.
void weigh_as_head(const HeadWeights& head, bool of_bias, const ClassLoop& loop, Range rows, Weighing& weighing) {
  if (head.of_lse.defined()) {
    weighing.of_lse = pointer<double>(head.of_lse) + rows.begin;
    weighing.of_sum = head.of_sum.defined() && !of_bias ? pointer<double>(head.of_sum) + rows.begin : nullptr;
    weighing.sum_of_changes = loop.centers() == 1;
    weighing.slopes = !of_bias;
  }
}

} // namespace

Gradients sweep_backward(const LinearProblem& problem, const BackwardRequest& given, const Device& device) {
  if (problem.weight.size(0) == 0) {
    return no_classes(problem, given.wanted);
  }
  const BackwardRequest request = contiguous(given);
  const ForwardRecord& record = request.record;
  const ClassLoop loop(problem, device, Operands::as_allowed, record.weight_scale);
  InputNorms norms(loop);
  const bool with_bias = request.wanted[2] && problem.bias.has_value() && !problem.one_against_all();
  const at::Tensor hard = loop.hard_rows(record.row_state);
  const UpstreamVectors upstream = widen_upstream(loop, request, with_bias, norms, hard);
  std::array<bool, 5> wanted_of_sweep = request.wanted;
  wanted_of_sweep[2] = with_bias;
  GradientSweep sweep(loop, {record.inverse_norms, record.row_state, record.weight_sum}, upstream, wanted_of_sweep);
  const auto finish = [&] {
    Gradients gradients = sweep.finish();
    if (problem.one_against_all() && request.wanted[2] && problem.bias.has_value()) {
      gradients[2] = gradient_of_one_bias(request, upstream).to(problem.bias->scalar_type());
    }
    return gradients;
  };
  if (!sweep.wants_products()) {
    return finish();
  }
  const int64_t kept = std::min(record.kept.size(1), loop.sizes().classes);
  const at::Tensor factors = row_factors(loop, norms);

  // A, where products have to be made again, and where to: the weights' own memory if they are acc.
  std::optional<RowOperand> input;
  std::vector<at::Tensor> products_buffers;
  std::vector<at::Tensor> winner_buffers;
  if (kept < loop.sizes().classes) {
    input.emplace(loop, record.row_state);
    for (int64_t lane = 0; lane < loop.plan().lanes && !loop.fused(); ++lane) {
      products_buffers.push_back(
          loop.operands().dtype == loop.acc() ? sweep.weights_buffer(lane) : loop.tile_buffer(loop.acc()));
      winner_buffers.push_back(loop.winner_buffer());
    }
  }
  sweep.run(kept, norms, [&](const WeightsWanted& wanted) {
    const auto& [lane, rows, classes, weight, weights, times_class_factors, of_bias] = wanted;
    const bool made = classes.begin < kept; // and only read
    Tile tile = loop.tile(
        rows, classes, record, factors, made, made || loop.fused() ? at::Tensor() : products_buffers[lane],
        made || loop.fused() ? at::Tensor() : winner_buffers[lane]);
    tile.class_operand = weight;
    if (!made) {
      tile.row_operand = input->tile(rows);
    }
    Weighing weighing{
        .other_lse = request.other_lse.data_ptr<double>() + rows.begin,
        .upstream = upstream.others.data_ptr<double>() + rows.begin,
        .times_class_factors = times_class_factors,
        .scale = loop.operands().softmax_scale};
    weigh_as_head(upstream.head, of_bias, loop, rows, weighing);
    weighing.hard = hard_row(hard, rows.begin);
    if (upstream.head.hardest.defined()) {
      weighing.hardest = {
          problem.hardest, pointer<int64_t>(request.hardest_class) + rows.begin * problem.hardest,
          pointer<double>(upstream.head.hardest) + rows.begin * problem.hardest};
    }
    weighing.binary = problem.binary;
    weighing.binary_bias = problem.one_against_all() && problem.bias.has_value() ? loop.bias()->data_ptr() : nullptr;
    weighing.binary_factor = 1.0 / power_of_two_above(problem.binary.power); // the other half of it is in `upstream`
    loop.steps().weigh(loop.kernels(), tile, weighing, weights);
  });
  return finish();
}

} // namespace torchmargin
