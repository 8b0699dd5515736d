// The loss of each row from the core's results, and its reduction: arithmetic on [B] vectors
// that the linear and the cosine loss share.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

namespace torchmargin {

enum class Reduction { none, mean, sum };

struct CrossEntropyOptions {
  double label_smoothing;
  int64_t ignore_index;
  Reduction reduction;
};

CrossEntropyOptions make_cross_entropy_options(
    std::string_view op,
    double label_smoothing,
    int64_t ignore_index,
    std::string_view reduction);

struct CrossEntropy {
  at::Tensor valid; // [B] bool, false where the row is ignored
  at::Tensor loss; // reduced
};

// other_lse, target_logit, logit_sum: [B] acc; logit_sum is read only if there is smoothing.
CrossEntropy cross_entropy(
    const at::Tensor& other_lse,
    const at::Tensor& target_logit,
    const at::Tensor& logit_sum,
    const at::Tensor& target,
    const c10::SymInt& classes,
    const CrossEntropyOptions& options);

} // namespace torchmargin
