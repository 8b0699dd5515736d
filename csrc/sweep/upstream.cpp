#include "sweep/upstream.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <limits>
#include <tuple>

#include "ops/target_place.h"
#include "sweep/hard_rows.h"

namespace torchmargin {
namespace {

// The power of two that brings the largest size to [least / 2, least), [1]: gradients scaled by 2^k then pass through
// the same products bit for bit, and tiny ones do not make them denormal. 1 where there is no such power.
at::Tensor power_of_two_scale(const ClassLoop& loop, const at::Tensor& sizes, double least) {
  const at::Tensor one = loop.double_zeros({1}).fill_(1.0);
  if (loop.sizes().rows == 0) {
    return one;
  }
  const at::Tensor largest = sizes.abs().max().view({1});
  // mantissa / largest is 2^-exponent, exactly.
  const at::Tensor scale = std::get<0>(at::frexp(largest)) / largest * least;
  return at::where(at::isfinite(scale).logical_and(largest > 0), scale, one);
}

at::Tensor
choose_operand_scale(const ClassLoop& loop, const UpstreamVectors& upstream, bool with_bias, InputNorms& norms) {
  at::Tensor largest = upstream.others;
  if (loop.operands().unit_vectors) { // what must fit into float16 are the rows
    largest = upstream.weight_factor.abs();
    if (!loop.problem().normalize_input) {
      const at::Tensor& inverse = norms.inverse();
      // NB: a row without an upstream gradient counts for nothing, whatever its length.
      largest = at::where(largest.eq(0).logical_or(inverse.eq(0)), loop.double_zeros({}), largest / inverse);
    }
    if (with_bias) {
      largest = at::maximum(largest, upstream.others.abs());
    }
  }
  return power_of_two_scale(loop, largest, loop.operands().largest_row);
}

// Every weight of a row is divided by f, which no sum of upstream gradients exceeds, and by a power of two that no
// slope exceeds: 16 bits hold what is left.
void divide_by_the_largest(
    const ClassLoop& loop,
    const BackwardRequest& request,
    const at::Tensor& hard,
    UpstreamVectors& upstream) {
  const at::Tensor none = loop.double_zeros({});
  const bool smoothed = upstream.sum.defined();
  const bool sub_centers = loop.centers() > 1; // which of them win differs from row to row: nothing is common to all
  const at::Tensor of_lse = upstream.others;
  at::Tensor largest = of_lse.abs();
  if (smoothed) {
    largest = largest + upstream.sum.abs();
  }
  at::Tensor hardest;
  if (request.grad_hardest_logit.has_value() && loop.problem().hardest > 0) {
    hardest = at::where(request.hardest_class.lt(0), none, request.grad_hardest_logit->to(at::kDouble));
    const at::Tensor common = sub_centers && smoothed ? upstream.sum : none;
    largest = at::maximum(largest, hardest.abs().amax(1) + common.abs());
  } else if (loop.problem().hardest > 0) {
    hardest = loop.double_zeros({loop.sizes().rows, loop.problem().hardest});
  }
  upstream.others = hard.defined() ? largest * hard.select(1, 5) : largest;
  const auto divided = [&](const at::Tensor& by_row) {
    const at::Tensor by = by_row.dim() == 2 ? upstream.others.unsqueeze(1) : upstream.others;
    return at::where(by.eq(0), none, by_row / by).contiguous();
  };
  upstream.head.of_lse = divided(of_lse);
  if (smoothed) {
    upstream.head.of_sum = divided(upstream.sum);
  }
  if (hardest.defined()) {
    upstream.head.hardest = divided(sub_centers && smoothed ? hardest + upstream.sum.unsqueeze(1) : hardest);
  }
  if (sub_centers) {
    upstream.sum = at::Tensor();
  }
}

// By ATen's ops.
UpstreamVectors widen_by_parts(
    const ClassLoop& loop,
    const BackwardRequest& request,
    bool with_bias,
    InputNorms& norms,
    const at::Tensor& hard) {
  const auto widen = [&](const std::optional<at::Tensor>& grad) {
    return grad.has_value() ? grad->to(at::kDouble).contiguous() : loop.double_zeros({loop.sizes().rows});
  };
  const at::Tensor none = loop.double_zeros({});
  UpstreamVectors upstream;
  upstream.others =
      at::where(request.other_lse == -std::numeric_limits<double>::infinity(), none, widen(request.grad_other_lse));
  upstream.own = widen(request.grad_target_logit);
  if (request.grad_logit_sum.has_value()) {
    upstream.sum = widen(request.grad_logit_sum);
    upstream.own = upstream.own + upstream.sum;
  }
  const at::Tensor present = target_place(loop.target(), loop.sizes().classes).present;
  upstream.own = at::where(present, upstream.own, none);
  upstream.bias_sum = upstream.sum;
  if (loop.problem().one_against_all()) { // no row of other classes is empty, and no slope is above the power
    upstream.others = widen(request.grad_other_lse) * power_of_two_above(loop.problem().binary.power);
  } else if (!loop.problem().plain()) {
    divide_by_the_largest(loop, request, hard, upstream);
  }
  upstream.weight_factor = upstream.others * loop.margin().scale;
  upstream.operand_scale = choose_operand_scale(loop, upstream, with_bias, norms);
  return upstream;
}

} // namespace

UpstreamVectors widen_upstream(
    const ClassLoop& loop,
    const BackwardRequest& request,
    bool with_bias,
    InputNorms& norms,
    const at::Tensor& hard) {
  const bool units = loop.operands().unit_vectors;
  const bool by_rows = units && (with_bias || !loop.problem().normalize_input); // as choose_operand_scale() has it
  if (loop.kernels().widen_upstream == nullptr || !loop.problem().plain() || by_rows) {
    return widen_by_parts(loop, request, with_bias, norms, hard);
  }
  const int64_t rows = loop.sizes().rows;
  const auto vector = [&](int64_t size) { return loop.empty({size}, at::kDouble); };
  UpstreamVectors upstream;
  upstream.others = vector(rows);
  upstream.own = vector(rows);
  upstream.weight_factor = vector(rows);
  upstream.operand_scale = vector(1);
  if (request.grad_logit_sum.has_value()) {
    upstream.sum = vector(rows);
  }
  loop.kernels().widen_upstream(
      {.grad_other_lse = raw_vector(request.grad_other_lse),
       .grad_target_logit = raw_vector(request.grad_target_logit),
       .grad_logit_sum = raw_vector(request.grad_logit_sum),
       .other_lse = request.other_lse.const_data_ptr<double>(),
       .target = pointer<int64_t>(loop.target()),
       .rows = rows,
       .classes = loop.sizes().classes,
       .scale = loop.margin().scale,
       .others = pointer<double>(upstream.others),
       .own = pointer<double>(upstream.own),
       .sum = pointer<double>(upstream.sum),
       .weight_factor = pointer<double>(upstream.weight_factor),
       .operand_scale = pointer<double>(upstream.operand_scale),
       .least = loop.operands().largest_row,
       .of_weight_factor = units});
  upstream.bias_sum = upstream.sum;
  return upstream;
}

UpstreamVectors logits_upstream(const ClassLoop& loop, const at::Tensor& grad_logits) {
  const auto [present, place] = target_place(loop.target(), loop.sizes().classes);
  const at::Tensor own = grad_logits.gather(1, place.unsqueeze(1)).squeeze(1).to(at::kDouble);
  UpstreamVectors upstream;
  upstream.others = grad_logits.ne(0).any(1).to(at::kDouble);
  upstream.own = at::where(present, own, loop.double_zeros({}));
  upstream.weight_factor = upstream.others * loop.margin().scale;
  upstream.operand_scale = loop.double_zeros({1}).fill_(1.0);
  return upstream;
}

} // namespace torchmargin
