// The loss of each row from the core's results, and its reduction: arithmetic on [B] vectors
// that the linear and the cosine loss share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
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

// other_lse, target_logit, logit_sum: [B] float64; logit_sum is read only if there is smoothing. All arithmetic is
// float64 and the reduced loss is rounded once, to acc.
CrossEntropy cross_entropy(
    const at::Tensor& other_lse,
    const at::Tensor& target_logit,
    const at::Tensor& logit_sum,
    const at::Tensor& target,
    const c10::SymInt& classes,
    at::ScalarType acc,
    const CrossEntropyOptions& options);

// The private op between them: the loss of each row [B], 0 where the row is ignored. mean_logit: Z / C, if there is
// smoothing. See row_loss.cpp.
at::Tensor call_row_loss(
    const at::Tensor& other_lse,
    const at::Tensor& target_logit,
    const std::optional<at::Tensor>& mean_logit,
    const at::Tensor& target,
    double label_smoothing,
    int64_t ignore_index);

} // namespace torchmargin
