// The backward sweep of the loss: each tile's products are taken from what the forward kept or made again, and turned
// into the softmax weights Q of the other classes; gradient_sweep.h does the rest.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "sweep/gradient_sweep.h"
#include "sweep/sweeps.h"

namespace torchmargin {
namespace {

BackwardRequest contiguous(BackwardRequest request) {
  ForwardRecord& record = request.record;
  for (at::Tensor* tensor :
       {&request.other_lse, &record.kept, &record.inverse_norms, &record.weight_sum, &record.row_state}) {
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

} // namespace

Gradients sweep_backward(const LinearProblem& problem, const BackwardRequest& given, const Device& device) {
  if (problem.weight.size(0) == 0) {
    return no_classes(problem, given.wanted);
  }
  const BackwardRequest request = contiguous(given);
  const ForwardRecord& record = request.record;
  const ClassLoop loop(problem, device, Operands::as_allowed, record.weight_scale);
  InputNorms norms(loop);
  const bool with_bias = request.wanted[2] && problem.bias.has_value();
  const UpstreamVectors upstream = widen_upstream(loop, request, with_bias, norms);
  GradientSweep sweep(loop, {record.inverse_norms, record.row_state, record.weight_sum}, upstream, request.wanted);
  if (!sweep.wants_products()) {
    return sweep.finish();
  }
  const int64_t kept = std::min(record.kept.size(1), loop.sizes().classes);
  const at::Tensor factors = row_factors(loop, norms);

  // A, where products have to be made again, and where to: the weights' own memory if they are acc.
  std::optional<RowOperand> input;
  std::vector<at::Tensor> products_buffers;
  if (kept < loop.sizes().classes) {
    input.emplace(loop, record.row_state);
    for (int64_t lane = 0; lane < loop.plan().lanes; ++lane) {
      products_buffers.push_back(
          loop.operands().dtype == loop.acc() ? sweep.weights_buffer(lane) : loop.tile_buffer(loop.acc()));
    }
  }
  sweep.run(kept, norms, [&](const WeightsWanted& wanted) {
    const auto& [lane, rows, classes, weight, weights, times_class_factors] = wanted;
    const bool made = classes.begin < kept; // and only read
    const at::Tensor products =
        made ? columns_of(rows_of(record.kept, rows), classes) : loop.tile_in(products_buffers[lane], rows, classes);
    const Tile tile{
        made ? at::Tensor() : input->tile(rows), weight, products,
        loop.describe(products, rows, classes, record.inverse_norms, factors)};
    loop.steps().weigh(
        loop.kernels(), tile,
        {.other_lse = request.other_lse.data_ptr<double>() + rows.begin,
         .upstream = upstream.others.data_ptr<double>() + rows.begin,
         .times_class_factors = times_class_factors,
         .scale = loop.operands().softmax_scale},
        weights);
  });
  return sweep.finish();
}

} // namespace torchmargin
