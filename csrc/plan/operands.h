// In which dtype and form the products read embeddings and weights: a pure function of the
// dtypes. The CPU always takes acc; a GPU takes 16 bits where the caller allows them.
#pragma once

#include <c10/core/ScalarType.h>

#include <optional>

#include "plan/device_traits.h"

namespace torchmargin {

struct OperandFormat {
  c10::ScalarType dtype; // acc, float16 or bfloat16
  // Operands are unit vectors whatever is normalised, and lengths join the logits afterwards: float16, whose
  // error suits unit vectors best and whose range holds little else. (Weights that are not normalised
  // are brought below 1 by one power of two instead.) false: rows as the formula has them, or as they are given.
  bool unit_vectors = false;
  // Q is stored times this power of two, and the largest row of the operand of grad_weight is brought to the other
  // one: float16 holds numbers from 6e-8 to 65504 only.
  double softmax_scale = 1.0;
  double largest_row = 1.0;
};

// float64 for float64, else float32: sums, logits, products.
constexpr c10::ScalarType product_dtype(c10::ScalarType dtype) {
  return dtype == c10::ScalarType::Double ? c10::ScalarType::Double : c10::ScalarType::Float;
}

constexpr OperandFormat wide_operands(c10::ScalarType dtype) {
  return {product_dtype(dtype)};
}

// dtype: of input and weight; compute_dtype: what the caller allows for float32 ones.
constexpr OperandFormat
choose_operands(const DeviceTraits& device, c10::ScalarType dtype, std::optional<c10::ScalarType> compute_dtype) {
  using c10::ScalarType;
  if (!device.narrow_products) {
    return wide_operands(dtype);
  }
  if (dtype == ScalarType::BFloat16) {
    return {ScalarType::BFloat16};
  }
  const bool narrow_allowed = compute_dtype == ScalarType::Half || compute_dtype == ScalarType::BFloat16;
  if (dtype == ScalarType::Half || (dtype == ScalarType::Float && narrow_allowed)) {
    return {ScalarType::Half, /*unit_vectors=*/true, /*softmax_scale=*/0x1p15, /*largest_row=*/0x1p10};
  }
  return wide_operands(dtype);
}

} // namespace torchmargin
