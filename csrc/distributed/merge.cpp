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

Partials merge(const Partials& shards) {
  Partials merged;
  merged.other_lse = merge_lse(shards.other_lse);
  merged.target_logit = shards.target_logit.sum(0);
  if (shards.logit_sum.defined()) {
    merged.logit_sum = shards.logit_sum.sum(0);
  }
  return merged;
}

} // namespace torchmargin
