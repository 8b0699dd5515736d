// The checks that the gates of the linear and of the cosine ops are made of. Every text names
// the op, the argument, what was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <optional>
#include <string_view>

namespace torchmargin {

// A C++ caller, or None from Python, may give no tensor where one is needed; nested tensors have no shape.
void check_given(std::string_view op, const char* argument, const at::Tensor& tensor);
void check_floating(std::string_view op, const char* argument, const at::Tensor& tensor);
void check_device(std::string_view op, const char* argument, const at::Tensor& tensor, const at::Tensor& input);
void check_like_input(std::string_view op, const char* argument, const at::Tensor& tensor, const at::Tensor& input);

// What a private op was given beside the problem: a tensor of this shape, a gradient of this shape or none, a result of
// the forward.
void check_shape(std::string_view op, const char* argument, const at::Tensor& tensor, c10::SymIntArrayRef shape);
void check_upstream(
    std::string_view op,
    const char* argument,
    const std::optional<at::Tensor>& grad,
    const at::Tensor& input,
    c10::SymIntArrayRef shape);
void check_returned(
    std::string_view op,
    const char* argument,
    const at::Tensor& tensor,
    const at::Tensor& input,
    c10::SymIntArrayRef shape,
    at::ScalarType dtype);

// target: [B] int64 for an input with B rows.
void check_target(std::string_view op, const at::Tensor& target, const at::Tensor& input);

// An undefined tensor in an optional (as C++ callers may pass it) is no tensor.
std::optional<at::Tensor> defined(const std::optional<at::Tensor>& tensor);

// Does autograd want a gradient of it?
bool wants_gradient(const std::optional<at::Tensor>& tensor);

// float64 for float64, else float32: the dtype of sums, logits and losses.
at::ScalarType acc_dtype(at::ScalarType dtype);

// Can a product read its rows as they are?
bool has_contiguous_rows(const at::Tensor& matrix);

} // namespace torchmargin
