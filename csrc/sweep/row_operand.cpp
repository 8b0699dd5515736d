#include "sweep/row_operand.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/util/Exception.h>

namespace torchmargin {

RowOperand::RowOperand(const ClassLoop& loop, const at::Tensor& row_state)
    : RowOperand(
          loop,
          row_state,
          // bfloat16 goes in as it is; row_factors() has the rest.
          loop.operands().unit_vectors || (loop.problem().normalize_input && loop.operands().dtype == loop.acc()),
          /*factor=*/nullptr,
          /*operand_scale=*/nullptr) {}

RowOperand::RowOperand(
    const ClassLoop& loop,
    const at::Tensor& row_state,
    const double* factor,
    const double* operand_scale)
    : RowOperand(loop, row_state, loop.problem().normalize_input, factor, operand_scale) {}

RowOperand::RowOperand(
    const ClassLoop& loop,
    const at::Tensor& row_state,
    bool to_unit,
    const double* factor,
    const double* operand_scale)
    : loop_(loop),
      state_(torchmargin::row_state(row_state)),
      to_unit_(to_unit),
      factor_(factor),
      operand_scale_(operand_scale),
      whole_(loop.plan().whole_operands(loop.sizes().rows)) {
  TORCH_INTERNAL_ASSERT(whole_ || loop.plan().lanes == 1);
  if (!to_unit && factor == nullptr && reads_in_place(loop.problem().input, loop.operands())) {
    return;
  }
  const SweepSizes& sizes = loop.sizes();
  const at::Tensor padded =
      loop.empty({whole_ ? sizes.rows : loop.plan().row_tile, sizes.padded(sizes.features)}, loop.operands().dtype);
  buffer_ = columns_of(padded, {0, sizes.features});
  if (whole_) {
    loop.for_each_tile([&](Range rows) { load(rows, rows_of(buffer_, rows)); });
  }
}

at::Tensor RowOperand::tile(Range rows) const {
  if (!buffer_.defined()) {
    return rows_of(loop_.problem().input, rows);
  }
  if (whole_) {
    return rows_of(buffer_, rows);
  }
  const at::Tensor to = rows_of(buffer_, {0, rows.count});
  load(rows, to);
  return to;
}

void RowOperand::load(Range rows, const at::Tensor& to) const {
  at::Tensor from = rows_of(loop_.problem().input, rows);
  if (!loop_.traits().reads_any_rows && !(from.scalar_type() == loop_.acc() && from.stride(1) == 1)) {
    from = to.copy_(from);
  }
  loop_.kernels().load_rows(
      {.rows = raw_matrix(from),
       .row_count = rows.count,
       .features = loop_.sizes().features,
       .measured = to_unit_,
       .out = to.data_ptr(),
       .out_dtype = loop_.operands().dtype,
       .out_row_stride = to.stride(0),
       .to_unit = to_unit_,
       .state = state_ + rows.begin,
       .row_factor = factor_ == nullptr ? nullptr : factor_ + rows.begin,
       .operand_scale = operand_scale_},
      loop_.acc());
}

namespace {

// The norms of the rows, or beside them the sum of factor_i A_i.
at::Tensor measure_rows(const ClassLoop& loop, bool measured, const double* factor, double* sum) {
  const at::Tensor norms = loop.empty({loop.sizes().rows});
  loop.for_each_tile([&](Range rows) {
    at::Tensor from = rows_of(loop.problem().input, rows);
    if (!loop.traits().reads_any_rows) {
      from = from.to(loop.acc()).contiguous();
    }
    loop.kernels().load_rows(
        {.rows = raw_matrix(from),
         .row_count = rows.count,
         .features = loop.sizes().features,
         .measured = measured,
         .row_factor = factor == nullptr ? nullptr : factor + rows.begin,
         .inverse_norms = rows_of(norms, rows).data_ptr(),
         .sum = sum},
        loop.acc());
  });
  return norms;
}

} // namespace

const at::Tensor& InputNorms::inverse() {
  if (!inverse_.defined()) {
    inverse_ = measure_rows(loop_, /*measured=*/true, /*factor=*/nullptr, /*sum=*/nullptr);
  }
  return inverse_;
}

void InputNorms::add_rows(const double* factor, double* sum) {
  const bool measured = loop_.problem().normalize_input;
  const at::Tensor norms = measure_rows(loop_, measured, factor, sum);
  if (measured) {
    inverse_ = norms;
  }
}

at::Tensor row_factors(const ClassLoop& loop, InputNorms& norms) {
  const LinearProblem& p = loop.problem();
  if (!loop.operands().unit_vectors) {
    const bool raw = p.normalize_input && loop.operands().dtype != loop.acc();
    return raw ? norms.inverse() : at::Tensor();
  }
  if (p.normalize_input && p.normalize_weight) {
    return at::Tensor();
  }
  at::Tensor factors;
  if (p.normalize_input) {
    factors = loop.empty({loop.sizes().rows}).fill_(1.0);
  } else {
    const at::Tensor& inverse = norms.inverse();
    factors = at::where(inverse == 0, inverse, inverse.reciprocal()); // a zero row's length is 0
  }
  return p.normalize_weight ? factors : factors.div_(loop.weight_scale().to(loop.acc()));
}

} // namespace torchmargin
