// The merge of what shards of the classes found for the same rows.
#pragma once

#include <ATen/core/Tensor.h>

namespace torchmargin {

// Partials of shards, [S, B] float64 each, and merged, [B] float64.
struct Partials {
  at::Tensor other_lse;
  at::Tensor target_logit;
  at::Tensor logit_sum; // undefined where there is no smoothing
};
Partials merge(const Partials& shards);

// log of the sum of exp over the first dimension: [S, B] to [B]. Shards of nothing (-inf) have no gradient, nor has a
// row without an upstream one, whatever it holds.
at::Tensor merge_lse(const at::Tensor& other_lse);

} // namespace torchmargin
