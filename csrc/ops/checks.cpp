#include "ops/checks.h"

#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include "plan/operands.h"

namespace torchmargin {

void check_given(std::string_view op, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK(
      tensor.defined(), op, ": expected ", argument, " to be a tensor, but got none (None, or undefined in C++)");
  TORCH_CHECK(
      !tensor.is_nested(), op, ": expected ", argument,
      " to be a dense tensor, but got a nested one; convert it with to_padded_tensor()");
}

void check_floating(std::string_view op, const char* argument, const at::Tensor& tensor) {
  check_given(op, argument, tensor);
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK(
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op, ": expected ",
      argument, " to be float64, float32, bfloat16 or float16, but got ", dtype);
}

void check_device(std::string_view op, const char* argument, const at::Tensor& tensor, const at::Tensor& input) {
  TORCH_CHECK(
      tensor.device() == input.device(), op, ": expected ", argument, " on the device of input, ", input.device(),
      ", but got ", tensor.device());
  TORCH_CHECK(
      tensor.layout() == at::kStrided, op, ": expected ", argument, " to be a dense tensor, but got layout ",
      tensor.layout());
}

void check_like_input(std::string_view op, const char* argument, const at::Tensor& tensor, const at::Tensor& input) {
  check_floating(op, argument, tensor);
  check_device(op, argument, tensor, input);
  TORCH_CHECK(
      tensor.scalar_type() == input.scalar_type(), op, ": expected ", argument, " to have the dtype of input, ",
      input.scalar_type(), ", but got ", tensor.scalar_type());
}

void check_shape(std::string_view op, const char* argument, const at::Tensor& tensor, c10::SymIntArrayRef shape) {
  TORCH_CHECK(
      tensor.defined() && tensor.sym_sizes() == shape, op, ": expected ", argument, " to have shape ", shape,
      ", but got ", tensor.defined() ? tensor.sym_sizes() : c10::SymIntArrayRef());
}

void check_upstream(
    std::string_view op,
    const char* argument,
    const std::optional<at::Tensor>& grad,
    const at::Tensor& input,
    c10::SymIntArrayRef shape) {
  // NB: compiled autograd traces with gradients of unknown shape, which are replaced before anything runs.
  if (grad.has_value() && grad->defined() && !input.is_meta()) {
    check_floating(op, argument, *grad); // kernels read it where it is
    check_device(op, argument, *grad, input);
    check_shape(op, argument, *grad, shape);
  }
}

void check_returned(
    std::string_view op,
    const char* argument,
    const at::Tensor& tensor,
    const at::Tensor& input,
    c10::SymIntArrayRef shape,
    at::ScalarType dtype) {
  check_shape(op, argument, tensor, shape);
  check_device(op, argument, tensor, input);
  TORCH_CHECK(
      tensor.scalar_type() == dtype, op, ": expected ", argument, " as the forward returned it, in ", dtype,
      ", but got ", tensor.scalar_type());
}

void check_target(std::string_view op, const at::Tensor& target, const at::Tensor& input) {
  check_given(op, "target", target);
  check_device(op, "target", target, input);
  TORCH_CHECK(
      target.scalar_type() != at::kInt, op,
      ": expected target to be int64, but got int32; convert it with target.long()");
  TORCH_CHECK(
      target.scalar_type() == at::kLong, op, ": expected target to be class indices of dtype int64, but got ",
      target.scalar_type());
  TORCH_CHECK(
      target.dim() == 1 && target.sym_size(0) == input.sym_size(0), op, ": expected target to have shape [",
      input.sym_size(0), "], but got ", target.sym_sizes());
}

std::optional<at::Tensor> defined(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? tensor : std::nullopt;
}

bool wants_gradient(const std::optional<at::Tensor>& tensor) {
  return c10::GradMode::is_enabled() && tensor.has_value() && tensor->requires_grad();
}

bool has_contiguous_rows(const at::Tensor& matrix) {
  return matrix.stride(1) == 1 && matrix.stride(0) >= matrix.size(1);
}

at::ScalarType acc_dtype(at::ScalarType dtype) {
  return product_dtype(dtype);
}

} // namespace torchmargin
