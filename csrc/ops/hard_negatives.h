// What heads do to a row's other classes, where it is arithmetic on [B, k] or [B, C] tensors: in ATen's ops, which
// autograd differentiates. Which classes are hard, and which are the hardest, are constants to it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>

#include "ops/problem.h"

namespace torchmargin {

// hardest_margin: radians, of problem.hardest classes.
void check_hardest_margin(std::string_view op, const LinearProblem& problem, double hardest_margin);

// An error at once on the CPU, a device-side assertion on CUDA. NB: d = -infinity takes classes out of the sum of
// exponentials, and would make that of the logits, which label smoothing needs, infinite.
void check_coefficient_values(const LinearProblem& problem, bool all_finite);

// cos(m1 theta + m2) - m3 of each row, [B] float64, from its angle: the threshold of a row for which none is given.
// It has neither the margin's extension nor its weight, as the papers have it.
at::Tensor plain_margin(const Margins& margins, const at::Tensor& target_angle);

// Cosines [B, C] with those of hard negatives changed. own: [B, C] bool, each row's own class; angle: [B] float64.
at::Tensor changed_cosines(
    const LinearProblem& problem,
    const at::Tensor& cosines,
    const at::Tensor& own,
    const at::Tensor& target_angle);

// The classes of the largest other logits, [B, hardest], the larger and then the lower class first; -1 where there are
// none: neither NaN nor -infinity is one.
at::Tensor rank_hardest(const at::Tensor& logits, const at::Tensor& own, int64_t hardest);

// [B, C] bool: which classes are among each row's `chosen` [B, k], of which -1 is none.
at::Tensor among(const at::Tensor& chosen, const c10::SymInt& classes);

// [B, C] bool: each row's own class, where it is one of them.
at::Tensor own_class(const at::Tensor& target, const c10::SymInt& classes);

// scale cos(max(theta - margin, 0)) of logits scale cos(theta), of any shape; -infinity and NaN stay.
at::Tensor with_hardest_margin(const at::Tensor& logits, double scale, double margin);

struct OtherSums {
  at::Tensor other_lse; // [B] each
  at::Tensor logit_sum;
};
// The sums with the hardest classes in them, after their margin. hardest_logit: [B, k]; k = 0 changes nothing.
OtherSums with_hardest(const OtherSums& sums, const at::Tensor& hardest_logit, double scale, double margin);

// margin_logits of a problem that is not plain.
at::Tensor head_logits(const LinearProblem& problem, double hardest_margin);

} // namespace torchmargin
