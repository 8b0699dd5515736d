// Autograd of the ops on given cosines, arranged as that of the linear ops.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "ops/autograd_node.h"
#include "ops/cosine_problem.h"
#include "ops/double_backward.h"
#include "ops/formula.h"

namespace torchmargin {
namespace {

constexpr size_t kTensors = 5;
constexpr size_t kInputs = 3;

OptionalTensors differentiable_inputs(const CosineProblem& p) {
  return {p.cosine, p.sample_m2, p.sample_m3};
}

OptionalTensors tensors_of(const CosineProblem& p) {
  return {p.cosine, p.sample_m2, p.sample_m3, p.target, p.sample_margin_weight};
}

CosineProblem with_tensors(CosineProblem p, const Tensors& tensors) {
  p.cosine = tensors[0];
  p.sample_m2 = optional(tensors[1]);
  p.sample_m3 = optional(tensors[2]);
  if (tensors.size() >= kTensors) {
    p.target = tensors[3];
    p.sample_margin_weight = optional(tensors[4]);
  }
  return p;
}

Tensors results_of(const CosineResult& result) {
  return {result.other_lse, result.target_logit, result.logit_sum};
}

Formula cosine_formula_of(const CosineProblem& problem, const OptionalTensors& upstream) {
  return [=](const Tensors& inputs) {
    CosineProblem p = with_tensors(problem, inputs);
    p.cosine = without_unused_rows(p.cosine, upstream);
    for (auto* sample : {&p.sample_m2, &p.sample_m3, &p.sample_margin_weight}) {
      *sample = without_unused_rows(*sample, upstream);
    }
    return results_of(cosine_formula(p));
  };
}

CosineTuple margin_cosine_forward_autograd(
    TORCHMARGIN_COSINE_PARAMETERS,
    std::optional<int64_t> ignore_index,
    bool with_logit_sum) {
  const CosineProblem problem = make_cosine_problem("_margin_cosine_forward", TORCHMARGIN_COSINE_ARGUMENTS);
  CosineResult result;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    result = call_cosine_forward(problem, ignore_index, with_logit_sum);
  }
  if (any_has_tangent(tensors_of(problem))) {
    result = cosine_formula(problem);
  } else if (any_requires_grad(differentiable_inputs(problem))) {
    const auto run = [numbers = with_tensors(problem, Tensors(kTensors))](
                         const Tensors& grads, const Tensors& tensors, const std::vector<bool>& wanted) {
      const CosineGradients gradients = call_cosine_backward(
          with_tensors(numbers, tensors),
          {optional(grads[0]),
           optional(grads[1]),
           optional(grads[2]),
           /*other_lse=*/tensors[kTensors],
           {wanted[0], wanted[1], wanted[2]}});
      return Tensors(gradients.begin(), gradients.end());
    };
    attach_node(
        results_of(result), differentiable_inputs(problem),
        {"MarginCosineBackward", tensors_of(problem), /*saved_results=*/{0}, numbers_of(problem.margin), run});
  }
  return {result.other_lse, result.target_logit, result.logit_sum};
}

CosineTuple margin_cosine_backward_autograd(TORCHMARGIN_COSINE_BACKWARD_PARAMETERS) {
  const CosineProblem problem = make_cosine_problem("_margin_cosine_backward", TORCHMARGIN_COSINE_ARGUMENTS);
  const OptionalTensors upstream{grad_other_lse, grad_target_logit, grad_logit_sum};
  OptionalTensors inputs = differentiable_inputs(problem);
  inputs.insert(inputs.end(), upstream.begin(), upstream.end());
  if (any_has_tangent(inputs)) {
    Tensors found = formula_gradients(
        differentiable_inputs(problem), upstream, std::vector<bool>(wanted.begin(), wanted.end()),
        cosine_formula_of(problem, upstream));
    for (at::Tensor& gradient : found) {
      gradient = gradient.defined() ? gradient : at::empty({0}, cosine.options().requires_grad(false));
    }
    return {found[0], found[1], found[2]};
  }
  CosineGradients gradients;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    gradients = call_cosine_backward(problem, {grad_other_lse, grad_target_logit, grad_logit_sum, other_lse, wanted});
  }
  if (any_requires_grad(inputs)) {
    OptionalTensors saved = tensors_of(problem);
    saved.insert(saved.end(), upstream.begin(), upstream.end());
    const auto run = [numbers = with_tensors(problem, Tensors(kTensors))](
                         const Tensors& grads, const Tensors& tensors, const std::vector<bool>& needed) {
      const CosineProblem p = with_tensors(numbers, tensors);
      const OptionalTensors given{
          optional(tensors[kTensors]), optional(tensors[kTensors + 1]), optional(tensors[kTensors + 2])};
      return second_derivatives(
          differentiable_inputs(p), given, Tensors(grads.begin(), grads.begin() + kInputs), needed,
          cosine_formula_of(p, given));
    };
    attach_node(
        Tensors(gradients.begin(), gradients.end()), inputs,
        {"MarginCosineDoubleBackward", std::move(saved), /*saved_results=*/{}, numbers_of(problem.margin), run});
  }
  return {gradients[0], gradients[1], gradients[2]};
}

at::Tensor margin_transform_autograd(const at::Tensor& cosine, TORCHMARGIN_MARGIN_PARAMETERS) {
  const MarginParameters margin = check_transform("margin_transform", cosine, TORCHMARGIN_MARGIN_ARGUMENTS);
  if (any_has_tangent({cosine})) {
    return transform_formula(cosine, margin);
  }
  at::Tensor result;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    result = call_transform(cosine, margin);
  }
  if (any_requires_grad({cosine})) {
    const auto run = [margin](const Tensors& grads, const Tensors& tensors, const std::vector<bool>&) {
      return Tensors{call_transform_backward(grads[0], tensors[0], margin)};
    };
    attach_node({result}, {cosine}, {"MarginTransformBackward", {cosine}, {}, numbers_of(margin), run});
  }
  return result;
}

at::Tensor
margin_transform_backward_autograd(const at::Tensor& grad, const at::Tensor& cosine, TORCHMARGIN_MARGIN_PARAMETERS) {
  const MarginParameters margin = check_transform("_margin_transform_backward", cosine, TORCHMARGIN_MARGIN_ARGUMENTS);
  const Formula formula = [margin](const Tensors& inputs) { return Tensors{transform_formula(inputs[0], margin)}; };
  if (any_has_tangent({grad, cosine})) {
    return formula_gradients({cosine}, {grad}, {true}, formula)[0];
  }
  at::Tensor result;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    result = call_transform_backward(grad, cosine, margin);
  }
  if (any_requires_grad({grad, cosine})) {
    const auto run = [formula](const Tensors& grads, const Tensors& tensors, const std::vector<bool>& needed) {
      const Tensors found = second_derivatives({tensors[1]}, {tensors[0]}, grads, {needed[1], needed[0]}, formula);
      return Tensors{found[1], found[0]};
    };
    attach_node(
        {result}, {grad, cosine}, {"MarginTransformDoubleBackward", {grad, cosine}, {}, numbers_of(margin), run});
  }
  return result;
}

TORCH_LIBRARY_IMPL(torchmargin, Autograd, library) {
  library.impl("_margin_cosine_forward", margin_cosine_forward_autograd);
  library.impl("_margin_cosine_backward", margin_cosine_backward_autograd);
  library.impl("margin_transform", margin_transform_autograd);
  library.impl("_margin_transform_backward", margin_transform_backward_autograd);
}

} // namespace
} // namespace torchmargin
