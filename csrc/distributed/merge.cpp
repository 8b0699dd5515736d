#include "distributed/merge.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <limits>

#include "ops/autograd_node.h"

namespace torchmargin {

at::Tensor merge_lse(const at::Tensor& other_lse) {
  at::Tensor merged;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor zero = at::zeros({}, other_lse.options());
    const at::Tensor largest = other_lse.amax(0);
    const at::Tensor shift = at::where(largest.isinf(), zero, largest);
    merged = shift + (other_lse - shift).exp().sum(0).log();
  }
  if (any_requires_grad({other_lse})) {
    // NB: torch.logsumexp's backward is NaN where every shard holds -inf: C = 1, and its row's own class.
    const auto backward = [](const Tensors& grads, const Tensors& saved, const std::vector<bool>&) -> Tensors {
      const at::Tensor& shards = saved[0];
      const at::Tensor zero = at::zeros({}, shards.options());
      const at::Tensor counts = shards.ne(-std::numeric_limits<double>::infinity()).logical_and(grads[0].ne(0));
      return {at::where(counts, grads[0] * (shards - saved[1]).exp(), zero)};
    };
    attach_node({merged}, /*outputs=*/1, {other_lse}, {"MergeLseBackward", {other_lse}, {0}, {}, backward});
  }
  return merged;
}

// NB: sorted by class, and then by logit in a stable sort: the lower class first among equal logits. A shard's list
// holds no NaN.
Hardest merge_hardest(const Hardest& shards) {
  const int64_t most = shards.logit.size(2);
  const auto by_row = [](const at::Tensor& lists) { return lists.transpose(0, 1).flatten(1); }; // [B, S k]
  const at::Tensor logit = by_row(shards.logit);
  const at::Tensor classes = by_row(shards.classes);
  const at::Tensor by_class = classes.argsort(/*stable=*/true, /*dim=*/1);
  const at::Tensor by_logit =
      logit.detach().gather(1, by_class).argsort(/*stable=*/true, /*dim=*/1, /*descending=*/true);
  const at::Tensor order = by_class.gather(1, by_logit);
  const at::Tensor sorted = logit.gather(1, order);
  const at::Tensor displaced = sorted.slice(1, most).t();
  return {
      merge_lse(at::cat({shards.other_lse, displaced})), sorted.slice(1, 0, most),
      classes.gather(1, order).slice(1, 0, most)};
}

Partials merge(const Partials& shards) {
  Partials merged;
  merged.target_logit = shards.target_logit.sum(0);
  if (shards.logit_sum.defined()) {
    merged.logit_sum = shards.logit_sum.sum(0);
  }
  if (shards.hardest_logit.defined()) {
    const Hardest hardest = merge_hardest({shards.other_lse, shards.hardest_logit, shards.hardest_class});
    merged.other_lse = hardest.other_lse;
    merged.hardest_logit = hardest.logit;
    merged.hardest_class = hardest.classes;
  } else {
    merged.other_lse = merge_lse(shards.other_lse);
  }
  return merged;
}

} // namespace torchmargin
