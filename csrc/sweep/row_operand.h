// The rows of the input as an operand of the products, and what the products lack of them.
#pragma once

#include <ATen/core/Tensor.h>

#include "sweep/class_loop.h"

namespace torchmargin {

// A_i or what stands for it (see OperandFormat), or A_i times a factor of each row. Loaded once for all rows, or a
// tile at a time, as the plan says.
class RowOperand {
 public:
  // The operand of the logits. `row_state` [B, 4]: the rows' norms are known by it.
  RowOperand(const ClassLoop& loop, const at::Tensor& row_state);
  // A_i factor_i operand_scale; a row with factor 0 is 0, whatever it holds.
  RowOperand(const ClassLoop& loop, const at::Tensor& row_state, const double* factor, const double* operand_scale);

  // [row_count, D]; valid until the next call. NB: only where all rows are loaded may lanes call it side by side.
  at::Tensor tile(Range rows) const;

 private:
  RowOperand(
      const ClassLoop& loop,
      const at::Tensor& row_state,
      bool to_unit,
      const double* factor,
      const double* operand_scale);
  void load(Range rows, const at::Tensor& to) const;

  const ClassLoop& loop_;
  const RowState* state_;
  bool to_unit_; // rows are brought to unit length
  const double* factor_;
  const double* operand_scale_;
  bool whole_;
  at::Tensor buffer_; // [B or row_tile, D], or undefined: the input is read where it is
};

// 1 / |x_i| of every row [B] acc, taken when first asked for.
class InputNorms {
 public:
  explicit InputNorms(const ClassLoop& loop) : loop_(loop) {}

  const at::Tensor& inverse();
  // `sum` [D] += factor_i A_i.
  void add_rows(const double* factor, double* sum);

 private:
  const ClassLoop& loop_;
  at::Tensor inverse_;
};

// What the raw products of RowOperand(loop) lack of the row, [B] acc; undefined: nothing.
at::Tensor row_factors(const ClassLoop& loop, InputNorms& norms);

} // namespace torchmargin
