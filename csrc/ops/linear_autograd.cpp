// Autograd of the private linear ops: the node of a forward calls the registered backward op,
// the node of that one differentiates the op's formula. Forward-mode AD evaluates the formula.
#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "ops/autograd_node.h"
#include "ops/double_backward.h"
#include "ops/formula.h"
#include "ops/problem.h"

namespace torchmargin {
namespace {

constexpr size_t kTensors = 7;

OptionalTensors differentiable_inputs(const LinearProblem& p) {
  return {p.input, p.weight, p.bias, p.sample_m2, p.sample_m3};
}

// All tensors of a problem, and the problem again from its numbers and them.
OptionalTensors tensors_of(const LinearProblem& p) {
  return {p.input, p.weight, p.bias, p.sample_m2, p.sample_m3, p.target, p.sample_margin_weight};
}

LinearProblem with_tensors(LinearProblem p, const Tensors& tensors) {
  p.input = tensors[0];
  p.weight = tensors[1];
  p.bias = optional(tensors[2]);
  p.sample_m2 = optional(tensors[3]);
  p.sample_m3 = optional(tensors[4]);
  if (tensors.size() >= kTensors) {
    p.target = tensors[5];
    p.sample_margin_weight = optional(tensors[6]);
  }
  return p;
}

LinearProblem without_tensors(const LinearProblem& p) {
  return with_tensors(p, Tensors(kTensors));
}

std::vector<double> numbers_of(const LinearProblem& p) {
  std::vector<double> numbers = numbers_of(p.margin);
  numbers.push_back(p.normalize_input);
  numbers.push_back(p.normalize_weight);
  numbers.push_back(static_cast<double>(p.compute_dtype.value_or(at::ScalarType::Undefined)));
  return numbers;
}

Tensors results_of(const ForwardResult& result) {
  return {result.other_lse, result.target_logit, result.logit_sum};
}

void take_out_unused_rows(LinearProblem& p, const OptionalTensors& upstream) {
  p.input = without_unused_rows(p.input, upstream);
  for (auto* sample : {&p.sample_m2, &p.sample_m3, &p.sample_margin_weight}) {
    *sample = without_unused_rows(*sample, upstream);
  }
}

// The formula of the three differentiable results; rows without an upstream gradient are taken out.
Formula lse_formula(const LinearProblem& problem, const OptionalTensors& upstream) {
  return [=](const Tensors& inputs) {
    LinearProblem p = with_tensors(problem, inputs);
    take_out_unused_rows(p, upstream);
    return results_of(linear_formula(p, /*mark_seam=*/true));
  };
}

Formula logits_formula_of(const LinearProblem& problem, const OptionalTensors& upstream) {
  return [=](const Tensors& inputs) {
    LinearProblem p = with_tensors(problem, inputs);
    take_out_unused_rows(p, upstream);
    return Tensors{logits_formula(p, /*mark_seam=*/true)};
  };
}

template <size_t N>
std::array<bool, N> first_of(const std::vector<bool>& wanted) {
  std::array<bool, N> first{};
  std::copy_n(wanted.begin(), N, first.begin());
  return first;
}

ForwardTuple linear_margin_forward_autograd(
    TORCHMARGIN_LINEAR_PARAMETERS,
    std::optional<int64_t> ignore_index,
    bool with_logit_sum,
    int64_t kept_classes) {
  const LinearProblem problem = make_linear_problem("_linear_margin_forward", TORCHMARGIN_LINEAR_ARGUMENTS);
  ForwardResult result;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    result = call_linear_forward(problem, {ignore_index, with_logit_sum, kept_classes});
  }
  if (any_has_tangent(tensors_of(problem))) {
    const ForwardResult formula = linear_formula(problem, /*mark_seam=*/false);
    result.other_lse = formula.other_lse;
    result.target_logit = formula.target_logit;
    result.logit_sum = formula.logit_sum;
  } else if (any_requires_grad(differentiable_inputs(problem))) {
    OptionalTensors saved = tensors_of(problem);
    saved.insert(saved.end(), {result.kept, result.inverse_norms, result.weight_sum});
    const auto run = [numbers = without_tensors(problem)](
                         const Tensors& grads, const Tensors& tensors, const std::vector<bool>& wanted) {
      const Gradients gradients = call_linear_backward(
          with_tensors(numbers, tensors),
          {optional(grads[0]), optional(grads[1]), optional(grads[2]), /*other_lse=*/tensors[kTensors + 3],
           /*kept=*/tensors[kTensors], /*inverse_norms=*/tensors[kTensors + 1],
           /*weight_sum=*/tensors[kTensors + 2], first_of<5>(wanted)});
      return Tensors(gradients.begin(), gradients.end());
    };
    attach_node(
        results_of(result), differentiable_inputs(problem),
        {"LinearMarginBackward", std::move(saved), /*saved_results=*/{0}, numbers_of(problem), run});
  }
  return to_tuple(result);
}

// What both backward ops do around their call below autograd: `upstream` are the gradients they got.
template <typename MakeFormula, typename Call>
Gradients differentiable_gradients(
    const char* name,
    const LinearProblem& problem,
    const OptionalTensors& upstream,
    const std::array<bool, 5>& wanted,
    MakeFormula make_formula,
    Call call) {
  OptionalTensors inputs = differentiable_inputs(problem);
  const size_t count = inputs.size();
  inputs.insert(inputs.end(), upstream.begin(), upstream.end());
  if (any_has_tangent(inputs)) {
    const Tensors found = formula_gradients(
        differentiable_inputs(problem), upstream, std::vector<bool>(wanted.begin(), wanted.end()),
        make_formula(problem, upstream));
    Gradients gradients;
    for (size_t i = 0; i < gradients.size(); ++i) {
      gradients[i] = found[i].defined() ? found[i] : at::empty({0}, problem.input.options().requires_grad(false));
    }
    return gradients;
  }
  Gradients gradients;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    gradients = call();
  }
  if (any_requires_grad(inputs)) {
    OptionalTensors saved = tensors_of(problem);
    saved.insert(saved.end(), upstream.begin(), upstream.end());
    const auto run = [numbers = without_tensors(problem), count, make_formula](
                         const Tensors& grads, const Tensors& tensors, const std::vector<bool>& needed) {
      const LinearProblem p = with_tensors(numbers, tensors);
      OptionalTensors given;
      for (size_t i = kTensors; i < tensors.size(); ++i) {
        given.push_back(optional(tensors[i]));
      }
      return second_derivatives(
          differentiable_inputs(p), given, Tensors(grads.begin(), grads.begin() + count), needed,
          make_formula(p, given));
    };
    attach_node(
        Tensors(gradients.begin(), gradients.end()), inputs,
        {name, std::move(saved), /*saved_results=*/{}, numbers_of(problem), run});
  }
  return gradients;
}

BackwardTuple linear_margin_backward_autograd(TORCHMARGIN_LINEAR_BACKWARD_PARAMETERS) {
  const LinearProblem problem = make_linear_problem("_linear_margin_backward", TORCHMARGIN_LINEAR_ARGUMENTS);
  return to_tuple(differentiable_gradients(
      "LinearMarginDoubleBackward", problem, {grad_other_lse, grad_target_logit, grad_logit_sum}, wanted, lse_formula,
      [&] {
        return call_linear_backward(
            problem,
            {grad_other_lse, grad_target_logit, grad_logit_sum, other_lse, kept, inverse_norms, weight_sum, wanted});
      }));
}

std::tuple<at::Tensor, at::Tensor> margin_logits_forward_autograd(TORCHMARGIN_LINEAR_PARAMETERS) {
  const LinearProblem problem = make_linear_problem("_margin_logits_forward", TORCHMARGIN_LINEAR_ARGUMENTS);
  LogitsResult result;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    result = call_logits_forward(problem);
  }
  if (any_has_tangent(tensors_of(problem))) {
    result.logits = logits_formula(problem, /*mark_seam=*/false);
  } else if (any_requires_grad(differentiable_inputs(problem))) {
    OptionalTensors saved = tensors_of(problem);
    saved.emplace_back(result.inverse_norms);
    const auto run = [numbers = without_tensors(problem)](
                         const Tensors& grads, const Tensors& tensors, const std::vector<bool>& wanted) {
      const Gradients gradients = call_logits_backward(
          with_tensors(numbers, tensors), {grads[0], /*inverse_norms=*/tensors[kTensors], first_of<5>(wanted)});
      return Tensors(gradients.begin(), gradients.end());
    };
    attach_node(
        {result.logits}, differentiable_inputs(problem),
        {"MarginLogitsBackward", std::move(saved), /*saved_results=*/{}, numbers_of(problem), run});
  }
  return {result.logits, result.inverse_norms};
}

BackwardTuple margin_logits_backward_autograd(TORCHMARGIN_LOGITS_BACKWARD_PARAMETERS) {
  const LinearProblem problem = make_linear_problem("_margin_logits_backward", TORCHMARGIN_LINEAR_ARGUMENTS);
  return to_tuple(
      differentiable_gradients("MarginLogitsDoubleBackward", problem, {grad_logits}, wanted, logits_formula_of, [&] {
        return call_logits_backward(problem, {grad_logits, inverse_norms, wanted});
      }));
}

TORCH_LIBRARY_IMPL(torchmargin, Autograd, library) {
  library.impl("_linear_margin_forward", linear_margin_forward_autograd);
  library.impl("_linear_margin_backward", linear_margin_backward_autograd);
  library.impl("_margin_logits_forward", margin_logits_forward_autograd);
  library.impl("_margin_logits_backward", margin_logits_backward_autograd);
}

} // namespace
} // namespace torchmargin
