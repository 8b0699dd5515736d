// Autograd of the private linear ops (differentiable.h): which tensors have gradients, which op is the backward, which
// formula the derivatives of gradients come from.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "ops/differentiable.h"
#include "ops/formula.h"
#include "ops/problem.h"

namespace torchmargin {
namespace {

constexpr size_t kInputs = 5;
constexpr size_t kTensors = 9;

CallArguments arguments_of(TORCHMARGIN_PACKED_LINEAR_PARAMETERS) {
  return {
      {input, weight, bias, sample_m2, sample_m3},
      {target, sample_margin_weight, hard_threshold, hard_coefficients},
      numbers.vec()};
}

// The problem again, from the tensors of arguments_of() in their order.
LinearProblem problem_of(const Tensors& tensors, const std::vector<double>& numbers) {
  return unpack_linear_problem(
      tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5], tensors[6], tensors[7], tensors[8],
      numbers);
}

LinearProblem with_inputs(LinearProblem p, const Tensors& inputs) {
  p.input = inputs[0];
  p.weight = inputs[1];
  p.bias = optional(inputs[2]);
  p.margins.sample_m2 = optional(inputs[3]);
  p.margins.sample_m3 = optional(inputs[4]);
  return p;
}

void take_out_unused_rows(LinearProblem& p, const OptionalTensors& upstream) {
  p.input = without_unused_rows(p.input, upstream);
  take_out_unused_rows(p.margins, upstream);
}

// Formulas of the results with gradients; rows without an upstream gradient are taken out.
Tensors lse_results(const LinearProblem& p, const at::Tensor& hardest_class, bool mark_seam) {
  const ForwardResult result = linear_formula(p, hardest_class, mark_seam);
  return {result.other_lse, result.target_logit, result.logit_sum, result.hardest_logit};
}

Tensors logits_results(const LinearProblem& p, const at::Tensor& /*hardest_class*/, bool mark_seam) {
  return {logits_formula(p, mark_seam)};
}

// The hardest classes, if there are any, are saved behind the tensors of the problem: ranked again they could be
// others.
MakeFormula formula_of(
    Tensors (*results)(const LinearProblem&, const at::Tensor&, bool),
    at::ArrayRef<double> numbers) {
  return [results, numbers = numbers.vec()](const Tensors& saved, const OptionalTensors& upstream) -> Formula {
    const at::Tensor hardest_class = saved.size() > kTensors ? saved[kTensors] : at::Tensor();
    return [results, problem = problem_of(saved, numbers), hardest_class, upstream](const Tensors& inputs) {
      LinearProblem p = with_inputs(problem, inputs);
      take_out_unused_rows(p, upstream);
      return results(p, hardest_class, /*mark_seam=*/true);
    };
  };
}

std::array<bool, kInputs> first_of(const std::vector<bool>& wanted) {
  std::array<bool, kInputs> first{};
  std::copy_n(wanted.begin(), kInputs, first.begin());
  return first;
}

Tensors to_vector(const Gradients& gradients) {
  return Tensors(gradients.begin(), gradients.end());
}

Gradients to_gradients(const Tensors& found) {
  Gradients gradients;
  std::copy_n(found.begin(), gradients.size(), gradients.begin());
  return gradients;
}

ForwardTuple linear_margin_forward_autograd(
    TORCHMARGIN_PACKED_LINEAR_PARAMETERS,
    TORCHMARGIN_FORWARD_REQUEST_PARAMETERS) {
  constexpr size_t kHardestClass = 6; // its place among the results; the record is behind it
  constexpr size_t kRecordSize = 6;
  const LinearProblem problem = unpack_linear_problem(TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
  const auto below = [&] {
    const ForwardTuple result = to_tuple(call_linear_forward(problem, {TORCHMARGIN_FORWARD_REQUEST_ARGUMENTS}));
    return std::apply([](const auto&... tensor) { return Tensors{tensor...}; }, result);
  };
  const auto backward = [numbers = numbers.vec()](
                            const Tensors& grads, const Tensors& saved, const std::vector<bool>& wanted) {
    const at::Tensor* const record = &saved[kTensors + 2];
    return to_vector(call_linear_backward(
        problem_of(saved, numbers),
        {.grad_other_lse = optional(grads[0]),
         .grad_target_logit = optional(grads[1]),
         .grad_logit_sum = optional(grads[2]),
         .grad_hardest_logit = optional(grads[3]),
         .other_lse = saved[kTensors],
         .hardest_class = saved[kTensors + 1],
         .record = {record[0], record[1], record[2], record[3], record[4], record[5]},
         .wanted = first_of(wanted)}));
  };
  std::vector<size_t> keep{/*other_lse*/ 0};
  for (size_t i = 0; i <= kRecordSize; ++i) {
    keep.push_back(kHardestClass + i);
  }
  const Tensors r = differentiable_forward(
      "LinearMarginBackward", arguments_of(TORCHMARGIN_PACKED_LINEAR_ARGUMENTS), /*outputs=*/4, std::move(keep), below,
      [&] { return lse_results(problem, /*hardest_class=*/at::Tensor(), /*mark_seam=*/false); }, backward);
  return {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8], r[9], r[10], r[11], r[12]};
}

BackwardTuple linear_margin_backward_autograd(
    TORCHMARGIN_PACKED_LINEAR_PARAMETERS,
    TORCHMARGIN_BACKWARD_REQUEST_PARAMETERS) {
  const auto below = [&] {
    return to_vector(call_linear_backward(
        unpack_linear_problem(TORCHMARGIN_PACKED_LINEAR_ARGUMENTS), {TORCHMARGIN_BACKWARD_REQUEST_ARGUMENTS}));
  };
  CallArguments arguments = arguments_of(TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
  arguments.others.emplace_back(hardest_class);
  return to_tuple(to_gradients(differentiable_backward(
      "LinearMarginDoubleBackward", std::move(arguments), {TORCHMARGIN_UPSTREAM_ARGUMENTS, grad_hardest_logit},
      std::vector<bool>(wanted.begin(), wanted.end()), below, formula_of(lse_results, numbers))));
}

LogitsTuple margin_logits_forward_autograd(TORCHMARGIN_PACKED_LINEAR_PARAMETERS) {
  const LinearProblem problem = unpack_linear_problem(TORCHMARGIN_PACKED_LINEAR_ARGUMENTS);
  const auto below = [&] {
    const LogitsResult result = call_logits_forward(problem);
    return Tensors{result.logits, result.inverse_norms, result.row_state};
  };
  const auto backward = [numbers = numbers.vec()](
                            const Tensors& grads, const Tensors& saved, const std::vector<bool>& wanted) {
    return to_vector(call_logits_backward(
        problem_of(saved, numbers),
        {.grad_logits = grads[0],
         .inverse_norms = saved[kTensors],
         .row_state = saved[kTensors + 1],
         .wanted = first_of(wanted)}));
  };
  const Tensors results = differentiable_forward(
      "MarginLogitsBackward", arguments_of(TORCHMARGIN_PACKED_LINEAR_ARGUMENTS), /*outputs=*/1, /*keep=*/{1, 2}, below,
      [&] { return logits_results(problem, /*hardest_class=*/at::Tensor(), /*mark_seam=*/false); }, backward);
  return {results[0], results[1], results[2]};
}

BackwardTuple margin_logits_backward_autograd(
    TORCHMARGIN_PACKED_LINEAR_PARAMETERS,
    TORCHMARGIN_LOGITS_BACKWARD_REQUEST_PARAMETERS) {
  const auto below = [&] {
    return to_vector(call_logits_backward(
        unpack_linear_problem(TORCHMARGIN_PACKED_LINEAR_ARGUMENTS), {TORCHMARGIN_LOGITS_BACKWARD_REQUEST_ARGUMENTS}));
  };
  return to_tuple(to_gradients(differentiable_backward(
      "MarginLogitsDoubleBackward", arguments_of(TORCHMARGIN_PACKED_LINEAR_ARGUMENTS), {grad_logits},
      std::vector<bool>(wanted.begin(), wanted.end()), below, formula_of(logits_results, numbers))));
}

TORCH_LIBRARY_IMPL(torchmargin, Autograd, library) {
  library.impl("_linear_margin_forward", linear_margin_forward_autograd);
  library.impl("_linear_margin_backward", linear_margin_backward_autograd);
  library.impl("_margin_logits_forward", margin_logits_forward_autograd);
  library.impl("_margin_logits_backward", margin_logits_backward_autograd);
}

} // namespace
} // namespace torchmargin
