// The merge of what shards of the classes found for the same rows.
#pragma once

#include <ATen/core/Tensor.h>

namespace torchmargin {

// Partials of shards, [S, B] float64 each, and merged, [B] float64; the hardest [S, B, k] and [B, k], of classes of all
// shards (int64), -infinity and -1 where there is no class.
struct Partials {
  at::Tensor other_lse;
  at::Tensor target_logit;
  at::Tensor logit_sum; // undefined where there is no smoothing
  at::Tensor hardest_logit = {}; // undefined where none are asked for
  at::Tensor hardest_class = {};
};
Partials merge(const Partials& shards);

// log of the sum of exp over the first dimension: [S, B] to [B]. Shards of nothing (-inf) have no gradient, nor has a
// row without an upstream one, whatever it holds.
at::Tensor merge_lse(const at::Tensor& other_lse);

// The k hardest of all shards, the larger and then the lower class first; the others join other_lse.
struct Hardest {
  at::Tensor other_lse; // [S, B], [B]
  at::Tensor logit; // [S, B, k], [B, k]
  at::Tensor classes;
};
Hardest merge_hardest(const Hardest& shards);

} // namespace torchmargin
