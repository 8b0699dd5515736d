#include "ops/checks.h"

#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <array>
#include <cmath>
#include <string>
#include <utility>

#include "sweep/operands.h"

namespace torchmargin {
namespace {

struct Name {
  std::string_view text;
  int value;
};
constexpr std::array<Name, 6> kExtensions{
    {{"none", int(Extension::none)},
     {"linear", int(Extension::linear)},
     {"easy", int(Extension::easy)},
     {"clip", int(Extension::clip)},
     {"monotonic", int(Extension::monotonic)},
     {"continuous", int(Extension::continuous)}}};
constexpr std::array<Name, 2> kMarginGradients{
    {{"exact", int(MarginGradient::exact)}, {"straight_through", int(MarginGradient::straight_through)}}};

template <typename Enum, size_t N>
Enum parse(std::string_view op, const char* argument, std::string_view text, const std::array<Name, N>& names) {
  std::string known;
  for (const Name& name : names) {
    if (name.text == text) {
      return static_cast<Enum>(name.value);
    }
    known += (known.empty() ? "'" : ", '") + std::string(name.text) + "'";
  }
  TORCH_CHECK(false, op, ": expected ", argument, " to be one of ", known, ", but got '", text, "'");
}

void check_finite(std::string_view op, const char* argument, double value) {
  TORCH_CHECK(std::isfinite(value), op, ": expected ", argument, " to be finite, but got ", value);
}

void check_parameters(std::string_view op, const MarginParameters& margin) {
  check_finite(op, "scale", margin.scale);
  check_finite(op, "m1", margin.m1);
  check_finite(op, "m2", margin.m2);
  check_finite(op, "m3", margin.m3);
  TORCH_CHECK(margin.scale > 0, op, ": expected scale > 0, but got ", margin.scale);
  TORCH_CHECK(margin.m1 > 0, op, ": expected m1 > 0, but got ", margin.m1);
  TORCH_CHECK(
      margin.margin_weight >= 0 && margin.margin_weight <= 1, op, ": expected margin_weight in [0, 1], but got ",
      margin.margin_weight);
  TORCH_CHECK(
      margin.m1 == 1.0 ||
          (margin.extension != Extension::linear && margin.extension != Extension::continuous &&
           margin.extension != Extension::easy),
      op, ": expected m1 = 1 with extension '", extension_name(margin.extension), "', but got m1 = ", margin.m1);
}

void check_sample(
    std::string_view op,
    const char* argument,
    const at::Tensor& sample,
    const at::Tensor& input,
    bool scalar_allowed) {
  check_floating(op, argument, sample);
  check_device(op, argument, sample, input);
  const bool row_wise = sample.dim() == 1 && sample.sym_size(0) == input.sym_size(0);
  TORCH_CHECK(
      row_wise || (scalar_allowed && sample.dim() == 0), op, ": expected ", argument, " to have shape [",
      input.sym_size(0), "]", scalar_allowed ? " or to be 0-dimensional" : "", ", but got ", sample.sym_sizes());
  const at::ScalarType acc = acc_dtype(input.scalar_type());
  const at::ScalarType dtype = sample.scalar_type();
  TORCH_CHECK(
      dtype == at::kDouble || dtype == acc || dtype == input.scalar_type(), op, ": expected ", argument, " to be ",
      acc == at::kDouble ? "Double" : "Float or Double",
      acc == input.scalar_type() ? "" : " or to have the dtype of input", ", but got ", dtype);
}

} // namespace

MarginParameters make_margin_parameters(
    std::string_view op,
    double scale,
    double m1,
    double m2,
    double m3,
    std::string_view extension,
    double margin_weight,
    std::string_view margin_gradient) {
  const MarginParameters margin{
      scale,
      m1,
      m2,
      m3,
      parse<Extension>(op, "extension", extension, kExtensions),
      margin_weight,
      parse<MarginGradient>(op, "margin_gradient", margin_gradient, kMarginGradients)};
  check_parameters(op, margin);
  return margin;
}

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

void check_shape(std::string_view op, const char* argument, const at::Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK(
      tensor.sizes() == shape, op, ": expected ", argument, " to have shape ", shape, ", but got ", tensor.sizes());
}

void check_shape(
    std::string_view op,
    const char* argument,
    const std::optional<at::Tensor>& tensor,
    at::IntArrayRef shape) {
  if (tensor.has_value() && tensor->defined()) {
    check_shape(op, argument, *tensor, shape);
  }
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

void check_samples(
    std::string_view op,
    const at::Tensor& input,
    MarginGradient margin_gradient,
    const std::optional<at::Tensor>& sample_m2,
    const std::optional<at::Tensor>& sample_m3,
    const std::optional<at::Tensor>& sample_margin_weight) {
  const bool straight = margin_gradient == MarginGradient::straight_through;
  for (const auto& [argument, sample] : {std::pair{"sample_m2", &sample_m2}, std::pair{"sample_m3", &sample_m3}}) {
    if (sample->has_value()) {
      check_sample(op, argument, **sample, input, /*scalar_allowed=*/false);
      TORCH_CHECK(
          !(straight && wants_gradient(*sample)), op, ": expected ", argument,
          " not to require grad with margin_gradient 'straight_through', which gives it none; detach it or use "
          "'exact'");
    }
  }
  if (sample_margin_weight.has_value()) {
    check_sample(op, "sample_margin_weight", *sample_margin_weight, input, /*scalar_allowed=*/true);
    TORCH_CHECK(
        !wants_gradient(sample_margin_weight), op,
        ": expected sample_margin_weight not to require grad, there is no gradient to it; detach it");
  }
}

std::optional<at::Tensor> defined(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? tensor : std::nullopt;
}

bool wants_gradient(const std::optional<at::Tensor>& tensor) {
  return c10::GradMode::is_enabled() && tensor.has_value() && tensor->requires_grad();
}

std::string_view extension_name(Extension extension) {
  return kExtensions[static_cast<size_t>(extension)].text;
}

std::string_view margin_gradient_name(MarginGradient margin_gradient) {
  return kMarginGradients[static_cast<size_t>(margin_gradient)].text;
}

at::ScalarType acc_dtype(at::ScalarType dtype) {
  return product_dtype(dtype);
}

} // namespace torchmargin
