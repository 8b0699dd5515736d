// The margin of a problem: its parameters, and what differs from row to row. The linear and the cosine problem share
// it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "ops/arguments.h"
#include "torchmargin/margin.h"

namespace torchmargin {

struct Margins {
  MarginParameters parameters;
  std::optional<at::Tensor> sample_m2 = std::nullopt; // [B], float64, acc or like input
  std::optional<at::Tensor> sample_m3 = std::nullopt; // [B], float64, acc or like input
  std::optional<at::Tensor> sample_margin_weight = std::nullopt; // 0-dim or [B], dtypes as above, no gradient
};

// The arguments of a public op; strings that are unknown throw.
Margins make_margins(std::string_view op, TORCHMARGIN_MARGINS_PARAMETERS);

// Numbers out of range, and margins of rows that do not fit `input` ([B, ...]), throw.
void check_margins(std::string_view op, const Margins& margins, const at::Tensor& input);
void check_parameters(std::string_view op, const MarginParameters& parameters);

// How the schema spells them.
Extension parse_extension(std::string_view op, std::string_view text);
MarginGradient parse_margin_gradient(std::string_view op, std::string_view text);
std::string_view extension_name(Extension extension);
std::string_view margin_gradient_name(MarginGradient margin_gradient);

} // namespace torchmargin
