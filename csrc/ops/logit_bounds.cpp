#include "ops/logit_bounds.h"

#include <cmath>

namespace torchmargin {
namespace {

// Products read bfloat16 rows where they are: they must begin at 16 bytes. Others are copied.
bool can_begin_at_16_bytes(const at::Tensor& matrix) {
  if (matrix.scalar_type() != at::kBFloat16 || !has_contiguous_rows(matrix)) {
    return true;
  }
  const auto stride = matrix.sym_stride(0).maybe_as_int();
  return stride.has_value() && *stride % 8 == 0;
}

} // namespace

bool sums_are_bounded(const LinearProblem& problem) {
  const double scale = problem.margins.parameters.scale;
  const auto rows_of_weight = problem.weight.sym_size(0).maybe_as_int();
  const double classes =
      rows_of_weight.has_value() ? static_cast<double>(*rows_of_weight / problem.sub_centers) : INFINITY;
  return problem.normalize_input && problem.normalize_weight && !problem.bias.has_value() && scale <= 71.0 &&
      scale * 1.4426950408889634 + std::log2(classes) < 127.0;
}

bool fits_fused_tiles(const LinearProblem& problem) {
  return problem.plain() && sums_are_bounded(problem) && problem.margins.parameters.scale > 0.0 &&
      can_begin_at_16_bytes(problem.input) && can_begin_at_16_bytes(problem.weight);
}

} // namespace torchmargin
