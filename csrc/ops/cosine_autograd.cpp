// Autograd of the ops on given cosines, arranged as that of the linear ops.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "ops/cosine_problem.h"
#include "ops/differentiable.h"
#include "ops/formula.h"

namespace torchmargin {
namespace {

constexpr size_t kInputs = 3;
constexpr size_t kTensors = 5;

CallArguments arguments_of(TORCHMARGIN_PACKED_COSINE_PARAMETERS) {
  return {{cosine, sample_m2, sample_m3}, {target, sample_margin_weight}, numbers.vec()};
}

CosineProblem problem_of(const Tensors& tensors, const std::vector<double>& numbers) {
  return unpack_cosine_problem(tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], numbers);
}

Tensors results_of(const CosineProblem& p) {
  const CosineResult result = cosine_formula(p);
  return {result.other_lse, result.target_logit, result.logit_sum};
}

MakeFormula formula_of(at::ArrayRef<double> numbers) {
  return [numbers = numbers.vec()](const Tensors& saved, const OptionalTensors& upstream) -> Formula {
    return [problem = problem_of(saved, numbers), upstream](const Tensors& inputs) {
      CosineProblem p = problem;
      p.cosine = without_unused_rows(inputs[0], upstream);
      p.margins.sample_m2 = optional(inputs[1]);
      p.margins.sample_m3 = optional(inputs[2]);
      take_out_unused_rows(p.margins, upstream);
      return results_of(p);
    };
  };
}

CosineTuple margin_cosine_forward_autograd(
    TORCHMARGIN_PACKED_COSINE_PARAMETERS,
    std::optional<int64_t> ignore_index,
    bool with_logit_sum) {
  const CosineProblem problem = unpack_cosine_problem(TORCHMARGIN_PACKED_COSINE_ARGUMENTS);
  const auto below = [&] {
    const CosineResult result = call_cosine_forward(problem, ignore_index, with_logit_sum);
    return Tensors{result.other_lse, result.target_logit, result.logit_sum};
  };
  const auto backward = [numbers = numbers.vec()](
                            const Tensors& grads, const Tensors& saved, const std::vector<bool>& wanted) {
    const CosineGradients gradients = call_cosine_backward(
        problem_of(saved, numbers),
        {.grad_other_lse = optional(grads[0]),
         .grad_target_logit = optional(grads[1]),
         .grad_logit_sum = optional(grads[2]),
         .other_lse = saved[kTensors],
         .wanted = {wanted[0], wanted[1], wanted[2]}});
    return Tensors(gradients.begin(), gradients.end());
  };
  const Tensors results = differentiable_forward(
      "MarginCosineBackward", arguments_of(TORCHMARGIN_PACKED_COSINE_ARGUMENTS), /*outputs=*/3, /*keep=*/{0}, below,
      [&] { return results_of(problem); }, backward);
  return {results[0], results[1], results[2]};
}

CosineTuple margin_cosine_backward_autograd(
    TORCHMARGIN_PACKED_COSINE_PARAMETERS,
    TORCHMARGIN_COSINE_BACKWARD_REQUEST_PARAMETERS) {
  const auto below = [&] {
    const CosineGradients gradients = call_cosine_backward(
        unpack_cosine_problem(TORCHMARGIN_PACKED_COSINE_ARGUMENTS),
        {TORCHMARGIN_UPSTREAM_ARGUMENTS, other_lse, wanted});
    return Tensors(gradients.begin(), gradients.end());
  };
  const Tensors gradients = differentiable_backward(
      "MarginCosineDoubleBackward", arguments_of(TORCHMARGIN_PACKED_COSINE_ARGUMENTS), {TORCHMARGIN_UPSTREAM_ARGUMENTS},
      std::vector<bool>(wanted.begin(), wanted.end()), below, formula_of(numbers));
  static_assert(std::tuple_size_v<CosineTuple> == kInputs);
  return {gradients[0], gradients[1], gradients[2]};
}

at::Tensor margin_transform_autograd(const at::Tensor& cosine, at::ArrayRef<double> numbers) {
  const auto backward = [numbers = numbers.vec()](
                            const Tensors& grads, const Tensors& saved, const std::vector<bool>&) {
    return Tensors{call_transform_backward(grads[0], saved[0], numbers)};
  };
  return differentiable_forward(
      "MarginTransformBackward", {{cosine}, {}, numbers.vec()}, /*outputs=*/1, /*keep=*/{},
      [&] { return Tensors{call_transform(cosine, numbers)}; },
      [&] { return Tensors{transform_formula(cosine, unpack_margin(numbers))}; }, backward)[0];
}

at::Tensor
margin_transform_backward_autograd(const at::Tensor& grad, const at::Tensor& cosine, at::ArrayRef<double> numbers) {
  const MarginParameters margin = unpack_margin(numbers);
  const MakeFormula formula = [margin](const Tensors&, const OptionalTensors&) -> Formula {
    return [margin](const Tensors& inputs) { return Tensors{transform_formula(inputs[0], margin)}; };
  };
  return differentiable_backward(
      "MarginTransformDoubleBackward", {{cosine}, {}, numbers.vec()}, {grad}, {true},
      [&] { return Tensors{call_transform_backward(grad, cosine, numbers)}; }, formula)[0];
}

TORCH_LIBRARY_IMPL(torchmargin, Autograd, library) {
  library.impl("_margin_cosine_forward", margin_cosine_forward_autograd);
  library.impl("_margin_cosine_backward", margin_cosine_backward_autograd);
  library.impl("_margin_transform_forward", margin_transform_autograd);
  library.impl("_margin_transform_backward", margin_transform_backward_autograd);
}

} // namespace
} // namespace torchmargin
