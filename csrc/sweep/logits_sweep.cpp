// The forward sweep of margin_logits: every chunk's products are scaled where they stand in the
// result, and the target pass puts the logits with a margin in their places.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <vector>

#include "ops/target_place.h"
#include "sweep/class_loop.h"
#include "sweep/class_sweep.h"
#include "sweep/products.h"

namespace torchmargin {
namespace {

// Each row's logit of its own class, [B] acc; 0 where it is absent.
at::Tensor target_logits(const ClassLoop& loop) {
  const int64_t rows = loop.sizes().rows;
  const at::Tensor wide = loop.double_zeros({3, rows});
  const at::Tensor others = loop.empty({2, rows});
  const auto result = [&](int64_t index) { return wide.select(0, index).data_ptr<double>(); };
  loop.kernels().target_pass(
      {loop.context(), rows, /*lanes=*/0, /*shift=*/nullptr, /*sum=*/nullptr, /*maximum=*/nullptr,
       /*weight_sum=*/nullptr, /*bias_sum=*/nullptr, result(0), result(1), result(2), others.select(0, 0).data_ptr(),
       others.select(0, 1).data_ptr()},
      loop.acc());
  return wide.select(0, 1).to(loop.acc());
}

} // namespace

LogitsResult sweep_logits(const LinearProblem& problem, const SweepKernels& kernels) {
  const ClassLoop loop(problem, kernels);
  const SweepSizes& sizes = loop.sizes();
  LogitsResult result;
  result.logits = loop.empty({sizes.rows, sizes.classes});
  result.inverse_norms = loop.empty({problem.normalize_weight ? sizes.classes : 0});

  const RowOperand input(loop);
  const at::Tensor factors = row_factors(loop);
  std::vector<at::Tensor> weight_buffers;
  for (int64_t lane = 0; lane < loop.plan().lanes; ++lane) {
    weight_buffers.push_back(loop.weight_buffer());
  }
  loop.for_each_chunk(/*kept_classes=*/0, [&](int64_t lane, Range classes) {
    const at::Tensor weight = loop.load_weight(classes, weight_buffers[lane], result.inverse_norms);
    const at::Tensor column_factors = loop.class_factors(classes, result.inverse_norms);
    loop.for_each_tile([&](Range rows) {
      at::Tensor logits = columns_of(rows_of(result.logits, rows), classes);
      multiply(logits, input.tile(rows), weight.t());
      if (column_factors.defined()) {
        logits.mul_(column_factors);
      }
      if (factors.defined()) {
        logits.mul_(rows_of(factors, rows).unsqueeze(1));
      }
      if (problem.margins.parameters.scale != 1.0) {
        logits.mul_(problem.margins.parameters.scale);
      }
      if (loop.bias().has_value()) {
        logits.add_(rows_of(*loop.bias(), classes));
      }
    });
  });

  const auto [present, place] = target_place(loop.target(), sizes.classes);
  const at::Tensor column = place.unsqueeze(1);
  const at::Tensor own = at::where(present, target_logits(loop), result.logits.gather(1, column).squeeze(1));
  result.logits.scatter_(1, column, own.unsqueeze(1));
  return result;
}

} // namespace torchmargin
