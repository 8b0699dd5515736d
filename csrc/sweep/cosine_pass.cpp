#include "sweep/cosine_pass.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/util/Exception.h>

#include "sweep/raw.h"

namespace torchmargin {
namespace {

// The target is made contiguous by the caller, who keeps it alive.
CosineContext context_of(const CosineProblem& p, const at::Tensor& target) {
  return {
      raw_matrix(p.cosine),
      pointer<int64_t>(target),
      p.cosine.size(1),
      p.margins.parameters,
      raw_vector(p.margins.sample_m2),
      raw_vector(p.margins.sample_m3),
      raw_vector(p.margins.sample_margin_weight)};
}

} // namespace

CosineResult cosine_pass(const CosineProblem& problem, bool with_logit_sum, const CosineKernels& kernels) {
  const int64_t rows = problem.cosine.size(0);
  const at::Tensor target = problem.target.contiguous();
  const auto vector = [&] { return at::empty({rows}, problem.cosine.options().dtype(at::kDouble)); };
  const CosineResult result{vector(), vector(), vector()};
  kernels.forward(
      {context_of(problem, target), with_logit_sum, result.other_lse.data_ptr<double>(),
       result.target_logit.data_ptr<double>(), result.logit_sum.data_ptr<double>()},
      rows);
  return result;
}

CosineGradients
cosine_backward_pass(const CosineProblem& problem, const CosineBackwardRequest& request, const CosineKernels& kernels) {
  const int64_t rows = problem.cosine.size(0);
  const at::TensorOptions wide = problem.cosine.options().dtype(at::kDouble);
  const auto widen = [&](const std::optional<at::Tensor>& grad) {
    return grad.has_value() && grad->defined() ? grad->to(at::kDouble).contiguous() : at::zeros({rows}, wide);
  };
  const at::Tensor target = problem.target.contiguous();
  const at::Tensor other_lse = request.other_lse.contiguous();
  const at::Tensor g_o = widen(request.grad_other_lse);
  const at::Tensor g_t = widen(request.grad_target_logit);
  const at::Tensor g_z = widen(request.grad_logit_sum);
  const auto sample_gradient = [&](size_t index, const std::optional<at::Tensor>& sample) {
    return request.wanted[index] && sample.has_value() ? at::empty({rows}, wide) : at::Tensor();
  };
  const at::Tensor grad_cosine =
      request.wanted[0] ? at::empty(problem.cosine.sizes(), problem.cosine.options()) : at::Tensor();
  const at::Tensor grad_m2 = sample_gradient(1, problem.margins.sample_m2);
  const at::Tensor grad_m3 = sample_gradient(2, problem.margins.sample_m3);
  kernels.backward(
      {context_of(problem, target), other_lse.data_ptr<double>(), pointer<double>(g_o), pointer<double>(g_t),
       pointer<double>(g_z), pointer(grad_cosine), pointer<double>(grad_m2), pointer<double>(grad_m3)},
      rows);
  const auto returned = [&](const at::Tensor& gradient, const std::optional<at::Tensor>& of) {
    return gradient.defined() ? gradient.to(of->scalar_type()) : at::empty({0}, problem.cosine.options());
  };
  return {
      returned(grad_cosine, problem.cosine), returned(grad_m2, problem.margins.sample_m2),
      returned(grad_m3, problem.margins.sample_m3)};
}

at::Tensor transform_pass(
    const at::Tensor& cosine,
    const std::optional<at::Tensor>& grad,
    const MarginParameters& margin,
    const CosineKernels& kernels) {
  at::Tensor upstream;
  if (grad.has_value()) {
    upstream = grad->to(cosine.scalar_type()).contiguous();
  }
  const at::Tensor from = cosine.contiguous();
  const at::Tensor result = at::empty(cosine.sizes(), cosine.options());
  kernels.transform({margin, cosine.scalar_type(), pointer(from), pointer(upstream), pointer(result)}, result.numel());
  return result;
}

} // namespace torchmargin
