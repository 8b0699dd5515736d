// The loss from the core's results: an op on [B] vectors that the linear and the cosine loss share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <optional>
#include <string_view>

namespace torchmargin {

enum class Reduction { none, mean, sum };

struct CrossEntropyOptions {
  double label_smoothing;
  int64_t ignore_index;
  Reduction reduction;
  std::optional<at::Tensor> class_weight; // [C], checked: see class_weight.h
};

CrossEntropyOptions make_cross_entropy_options(
    std::string_view op,
    double label_smoothing,
    int64_t ignore_index,
    std::string_view reduction,
    const std::optional<at::Tensor>& class_weight = std::nullopt);

// other_lse, target_logit, logit_sum: [B] float64; logit_sum is read only if there is smoothing. All arithmetic is
// float64 and the reduced loss is rounded once, to acc. See cross_entropy.cpp.
at::Tensor cross_entropy(
    const at::Tensor& other_lse,
    const at::Tensor& target_logit,
    const at::Tensor& logit_sum,
    const at::Tensor& target,
    const c10::SymInt& classes,
    at::ScalarType acc,
    const CrossEntropyOptions& options);

} // namespace torchmargin
