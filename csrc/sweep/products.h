// The products of the sweep: ATen's, with 16-bit operands accumulated and returned in float32.
#pragma once

#include <ATen/core/Tensor.h>

namespace torchmargin {

// out [M, N] = a [M, K] b [K, N], added to it if `accumulate`. a and b are of out's dtype, or of 16 bits for a float32
// `out`.
void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate = false);

// outs [S, M, N] += a [M, K] b [K, N], where each of S equal slices of K goes to an `out` of its own: more output
// tiles for a GPU. Their sum, in order, is the product.
void multiply_split(const at::Tensor& outs, const at::Tensor& a, const at::Tensor& b);

} // namespace torchmargin
