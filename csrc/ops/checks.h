// The checks that the gates of the linear and of the cosine ops are made of. Every text names
// the op, the argument, what was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <optional>
#include <string_view>

#include "torchmargin/margin.h"

namespace torchmargin {

// The parameters from their schema types; unknown strings and numbers out of range throw.
MarginParameters make_margin_parameters(
    std::string_view op,
    double scale,
    double m1,
    double m2,
    double m3,
    std::string_view extension,
    double margin_weight,
    std::string_view margin_gradient);

// A C++ caller, or None from Python, may give no tensor where one is needed; nested tensors have no shape.
void check_given(std::string_view op, const char* argument, const at::Tensor& tensor);
void check_floating(std::string_view op, const char* argument, const at::Tensor& tensor);
void check_device(std::string_view op, const char* argument, const at::Tensor& tensor, const at::Tensor& input);
void check_like_input(std::string_view op, const char* argument, const at::Tensor& tensor, const at::Tensor& input);

// What a private op was given beside the problem. Undefined optionals pass.
void check_shape(std::string_view op, const char* argument, const at::Tensor& tensor, at::IntArrayRef shape);
void check_shape(
    std::string_view op,
    const char* argument,
    const std::optional<at::Tensor>& tensor,
    at::IntArrayRef shape);

// target: [B] int64 for an input with B rows.
void check_target(std::string_view op, const at::Tensor& target, const at::Tensor& input);

// sample_m2, sample_m3: [B], float64, acc or like input; sample_margin_weight: 0-dim or [B], no gradient.
void check_samples(
    std::string_view op,
    const at::Tensor& input,
    MarginGradient margin_gradient,
    const std::optional<at::Tensor>& sample_m2,
    const std::optional<at::Tensor>& sample_m3,
    const std::optional<at::Tensor>& sample_margin_weight);

// An undefined tensor in an optional (as C++ callers may pass it) is no tensor.
std::optional<at::Tensor> defined(const std::optional<at::Tensor>& tensor);

// Does autograd want a gradient of it?
bool wants_gradient(const std::optional<at::Tensor>& tensor);

// float64 for float64, else float32: the dtype of sums, logits and losses.
at::ScalarType acc_dtype(at::ScalarType dtype);

// How the schema spells them.
std::string_view extension_name(Extension extension);
std::string_view margin_gradient_name(MarginGradient margin_gradient);

} // namespace torchmargin
