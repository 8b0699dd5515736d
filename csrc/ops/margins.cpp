#include "ops/margins.h"

#include <c10/util/Exception.h>

#include <array>
#include <cmath>
#include <string>
#include <utility>

#include "ops/checks.h"

namespace torchmargin {
namespace {

template <typename Enum>
struct Name {
  std::string_view text;
  Enum value;
};
constexpr std::array<Name<Extension>, 6> kExtensions{
    {{"none", Extension::none},
     {"linear", Extension::linear},
     {"easy", Extension::easy},
     {"clip", Extension::clip},
     {"monotonic", Extension::monotonic},
     {"continuous", Extension::continuous}}};
constexpr std::array<Name<MarginGradient>, 2> kMarginGradients{
    {{"exact", MarginGradient::exact}, {"straight_through", MarginGradient::straight_through}}};

// Names are found by their value as an index.
template <typename Names>
constexpr bool in_order(const Names& names) {
  for (size_t i = 0; i < names.size(); ++i) {
    if (static_cast<size_t>(names[i].value) != i) {
      return false;
    }
  }
  return true;
}
static_assert(in_order(kExtensions) && in_order(kMarginGradients));

template <typename Enum, size_t N>
Enum parse(std::string_view op, const char* argument, std::string_view text, const std::array<Name<Enum>, N>& names) {
  std::string known;
  for (const Name<Enum>& name : names) {
    if (name.text == text) {
      return name.value;
    }
    known += (known.empty() ? "'" : ", '") + std::string(name.text) + "'";
  }
  TORCH_CHECK(false, op, ": expected ", argument, " to be one of ", known, ", but got '", text, "'");
}

void check_finite(std::string_view op, const char* argument, double value) {
  TORCH_CHECK(std::isfinite(value), op, ": expected ", argument, " to be finite, but got ", value);
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

Margins make_margins(std::string_view op, TORCHMARGIN_MARGINS_PARAMETERS) {
  return {
      .parameters =
          {.scale = scale,
           .m1 = m1,
           .m2 = m2,
           .m3 = m3,
           .extension = parse_extension(op, extension),
           .margin_weight = margin_weight,
           .margin_gradient = parse_margin_gradient(op, margin_gradient)},
      .sample_m2 = defined(sample_m2),
      .sample_m3 = defined(sample_m3),
      .sample_margin_weight = defined(sample_margin_weight)};
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

void check_margins(std::string_view op, const Margins& margins, const at::Tensor& input) {
  const bool straight = margins.parameters.margin_gradient == MarginGradient::straight_through;
  for (const auto& [argument, sample] :
       {std::pair{"sample_m2", &margins.sample_m2}, std::pair{"sample_m3", &margins.sample_m3}}) {
    if (sample->has_value()) {
      check_sample(op, argument, **sample, input, /*scalar_allowed=*/false);
      TORCH_CHECK(
          !(straight && wants_gradient(*sample)), op, ": expected ", argument,
          " not to require grad with margin_gradient 'straight_through', which gives it none; detach it or use "
          "'exact'");
    }
  }
  if (margins.sample_margin_weight.has_value()) {
    check_sample(op, "sample_margin_weight", *margins.sample_margin_weight, input, /*scalar_allowed=*/true);
    TORCH_CHECK(
        !wants_gradient(margins.sample_margin_weight), op,
        ": expected sample_margin_weight not to require grad, there is no gradient to it; detach it");
  }
}

Extension parse_extension(std::string_view op, std::string_view text) {
  return parse(op, "extension", text, kExtensions);
}

MarginGradient parse_margin_gradient(std::string_view op, std::string_view text) {
  return parse(op, "margin_gradient", text, kMarginGradients);
}

std::string_view extension_name(Extension extension) {
  return kExtensions[static_cast<size_t>(extension)].text;
}

std::string_view margin_gradient_name(MarginGradient margin_gradient) {
  return kMarginGradients[static_cast<size_t>(margin_gradient)].text;
}

} // namespace torchmargin
