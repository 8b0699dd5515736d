// The ops on given cosines on the CPU: the gate, the check of the targets' values, the loops.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "cpu/cosine_kernels.h"
#include "cpu/loops.h"
#include "cpu/target_values.h"
#include "ops/cosine_problem.h"
#include "sweep/raw.h"

namespace torchmargin::cpu {
namespace {

// The target is made contiguous by the caller, who keeps it alive.
CosineContext context_of(const CosineProblem& p, const at::Tensor& target) {
  return {
      raw_matrix(p.cosine),    target.const_data_ptr<int64_t>(),  p.cosine.size(1), p.margin, raw_vector(p.sample_m2),
      raw_vector(p.sample_m3), raw_vector(p.sample_margin_weight)};
}

CosineTuple
margin_cosine_forward_cpu(TORCHMARGIN_COSINE_PARAMETERS, std::optional<int64_t> ignore_index, bool with_logit_sum) {
  const CosineProblem problem = make_cosine_problem("_margin_cosine_forward", TORCHMARGIN_COSINE_ARGUMENTS);
  const int64_t rows = cosine.size(0);
  const int64_t classes = cosine.size(1);
  if (ignore_index.has_value()) {
    check_target_values("margin_cross_entropy", target, classes, *ignore_index);
  }
  const at::Tensor own = target.contiguous();
  const auto result = [&] { return at::empty({rows}, cosine.options().dtype(problem.acc())); };
  const CosineTuple results{result(), result(), result()};
  const CosineForwardArgs args{
      context_of(problem, own), with_logit_sum, std::get<0>(results).data_ptr(), std::get<1>(results).data_ptr(),
      std::get<2>(results).data_ptr()};
  at::parallel_for(0, rows, grain(classes), [&](int64_t begin, int64_t end) { cosine_forward(args, begin, end); });
  return results;
}

CosineTuple margin_cosine_backward_cpu(TORCHMARGIN_COSINE_BACKWARD_PARAMETERS) {
  const CosineProblem problem = make_cosine_problem("_margin_cosine_backward", TORCHMARGIN_COSINE_ARGUMENTS);
  const int64_t rows = cosine.size(0);
  const at::TensorOptions wide = cosine.options().dtype(at::kDouble);
  const auto widen = [&](const std::optional<at::Tensor>& grad) {
    return grad.has_value() && grad->defined() ? grad->to(at::kDouble).contiguous() : at::zeros({rows}, wide);
  };
  const at::Tensor own = target.contiguous();
  const at::Tensor lse = other_lse.contiguous();
  const at::Tensor g_o = widen(grad_other_lse), g_t = widen(grad_target_logit), g_z = widen(grad_logit_sum);
  const at::Tensor none = at::empty({0}, cosine.options());
  const auto sample_gradient = [&](size_t index, const std::optional<at::Tensor>& sample) {
    return wanted[index] && sample.has_value() ? at::empty({rows}, wide) : at::Tensor();
  };
  const at::Tensor grad_cosine = wanted[0] ? at::empty({rows, cosine.size(1)}, cosine.options()) : at::Tensor();
  const at::Tensor grad_m2 = sample_gradient(1, problem.sample_m2);
  const at::Tensor grad_m3 = sample_gradient(2, problem.sample_m3);
  const CosineBackwardArgs args{
      context_of(problem, own),
      lse.data_ptr(),
      g_o.const_data_ptr<double>(),
      g_t.const_data_ptr<double>(),
      g_z.const_data_ptr<double>(),
      grad_cosine.defined() ? grad_cosine.data_ptr() : nullptr,
      grad_m2.defined() ? grad_m2.mutable_data_ptr<double>() : nullptr,
      grad_m3.defined() ? grad_m3.mutable_data_ptr<double>() : nullptr};
  at::parallel_for(
      0, rows, grain(cosine.size(1)), [&](int64_t begin, int64_t end) { cosine_backward(args, begin, end); });
  const auto returned = [&](const at::Tensor& gradient, const std::optional<at::Tensor>& of) {
    return gradient.defined() ? gradient.to(of->scalar_type()) : none;
  };
  return {
      returned(grad_cosine, problem.cosine), returned(grad_m2, problem.sample_m2),
      returned(grad_m3, problem.sample_m3)};
}

at::Tensor run_transform(const at::Tensor& cosine, const at::Tensor& grad, const MarginParameters& margin) {
  const at::Tensor from = cosine.contiguous();
  const at::Tensor upstream = grad.defined() ? grad.to(cosine.scalar_type()).contiguous() : at::Tensor();
  const at::Tensor result = at::empty(cosine.sizes(), cosine.options());
  const TransformArgs args{
      margin, cosine.scalar_type(), from.data_ptr(), upstream.defined() ? upstream.data_ptr() : nullptr,
      result.data_ptr()};
  at::parallel_for(0, result.numel(), grain(1), [&](int64_t begin, int64_t end) { transform(args, begin, end); });
  return result;
}

at::Tensor margin_transform_cpu(const at::Tensor& cosine, TORCHMARGIN_MARGIN_PARAMETERS) {
  return run_transform(cosine, at::Tensor(), check_transform("margin_transform", cosine, TORCHMARGIN_MARGIN_ARGUMENTS));
}

at::Tensor
margin_transform_backward_cpu(const at::Tensor& grad, const at::Tensor& cosine, TORCHMARGIN_MARGIN_PARAMETERS) {
  const MarginParameters margin = check_transform("_margin_transform_backward", cosine, TORCHMARGIN_MARGIN_ARGUMENTS);
  TORCH_CHECK(
      grad.sizes() == cosine.sizes(), "_margin_transform_backward: expected grad to have shape ", cosine.sizes(),
      ", but got ", grad.sizes());
  return run_transform(cosine, grad, margin);
}

TORCH_LIBRARY_IMPL(torchmargin, CPU, library) {
  library.impl("_margin_cosine_forward", margin_cosine_forward_cpu);
  library.impl("_margin_cosine_backward", margin_cosine_backward_cpu);
  library.impl("margin_transform", margin_transform_cpu);
  library.impl("_margin_transform_backward", margin_transform_backward_cpu);
}

} // namespace
} // namespace torchmargin::cpu
