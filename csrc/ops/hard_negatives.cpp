#include "ops/hard_negatives.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>

#include "ops/target_place.h"

namespace torchmargin {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

at::Tensor number_like(const at::Tensor& tensor, double value) {
  return at::full({}, value, tensor.options().requires_grad(false));
}

// log of the sum of exp over the columns. A row that holds NaN is NaN, without a gradient (0 * NaN would reach what has
// no upstream one); one of nothing but -infinity is that, without a gradient.
at::Tensor lse_of_columns(const at::Tensor& parts) {
  const at::Tensor values = parts.detach();
  const at::Tensor unknown = values.isnan().any(1, /*keepdim=*/true);
  const at::Tensor zero = number_like(parts, 0.0);
  const at::Tensor largest = values.amax(1, /*keepdim=*/true);
  const at::Tensor shift = at::where(largest.isfinite(), largest, zero);
  const at::Tensor sum = (at::where(unknown, zero, parts) - shift).exp().sum(1, /*keepdim=*/true);
  const at::Tensor none = sum.detach().eq(0);
  const at::Tensor lse = at::where(none, number_like(parts, -kInfinity), at::where(none, zero + 1, sum).log() + shift);
  return at::where(unknown, number_like(parts, std::nan("")), lse).squeeze(1);
}

} // namespace

void check_hardest_margin(std::string_view op, const LinearProblem& problem, double hardest_margin) {
  TORCH_CHECK(
      hardest_margin >= 0 && hardest_margin <= kPi, op, ": expected hardest_margin in [0, pi] (radians), but got ",
      hardest_margin);
  if (hardest_margin == 0) {
    return;
  }
  TORCH_CHECK(
      problem.hardest > 0, op,
      ": expected hardest > 0 with hardest_margin, which is theirs, but got hardest = ", problem.hardest);
  TORCH_CHECK(
      problem.normalize_input && problem.normalize_weight, op,
      ": expected normalize_input and normalize_weight with hardest_margin, an angle has no length");
}

void check_coefficient_values(const LinearProblem& problem, bool all_finite) {
  if (!problem.hard_coefficients.has_value()) {
    return;
  }
  const at::Tensor& coefficients = *problem.hard_coefficients;
  at::Tensor good = coefficients.isfinite();
  if (!all_finite) {
    const at::Tensor last = at::arange(3, coefficients.options().dtype(at::kLong)).eq(2);
    good = good.logical_or(last.logical_and(coefficients.eq(-kInfinity)));
  }
  at::_assert_async(
      good.all(),
      all_finite ? "torchmargin: expected finite hard_coefficients with label_smoothing"
                 : "torchmargin: expected finite hard_coefficients, but for d = -infinity");
}

at::Tensor plain_margin(const Margins& margins, const at::Tensor& target_angle) {
  const MarginParameters& margin = margins.parameters;
  const auto widened = [](const std::optional<at::Tensor>& sample) { return sample->detach().to(at::kDouble); };
  at::Tensor phi = target_angle.to(at::kDouble) * margin.m1 + margin.m2;
  if (margins.sample_m2.has_value()) {
    phi = phi + widened(margins.sample_m2);
  }
  const at::Tensor plain = phi.cos() - margin.m3;
  return margins.sample_m3.has_value() ? plain - widened(margins.sample_m3) : plain;
}

at::Tensor changed_cosines(
    const LinearProblem& p,
    const at::Tensor& cosines,
    const at::Tensor& own,
    const at::Tensor& target_angle) {
  at::Tensor threshold;
  if (p.hard_threshold.has_value()) {
    threshold = p.hard_threshold->to(at::kDouble);
  } else { // nothing is hard where the target is absent
    const at::Tensor plain = plain_margin(p.margins, target_angle);
    threshold = at::where(target_place(p.target, p.classes()).present, plain, number_like(plain, kInfinity));
  }
  threshold = at::where(threshold < 1.0, threshold, number_like(threshold, kInfinity)).to(cosines.scalar_type());
  threshold = threshold.dim() == 0 ? threshold : threshold.unsqueeze(1);
  const at::Tensor hard = cosines.detach().gt(threshold).logical_and(own.logical_not());
  const auto coefficient = [&](int64_t k) {
    return p.hard_coefficients->to(cosines.scalar_type()).slice(-1, k, k + 1); // [1] or [B, 1]
  };
  // NB: a row of NaN without an upstream gradient would have 0 * NaN of the side that is not taken.
  const at::Tensor c = at::where(hard, cosines, number_like(cosines, 0.0));
  return at::where(hard, (coefficient(0) * c + coefficient(1)) * c + coefficient(2), cosines);
}

at::Tensor rank_hardest(const at::Tensor& logits, const at::Tensor& own, int64_t hardest) {
  const at::Tensor nothing = number_like(logits, -kInfinity);
  const at::Tensor ranked = at::where(own.logical_or(logits.isnan()), nothing, logits).detach();
  const auto [values, classes] = at::sort(ranked, /*stable=*/true, /*dim=*/1, /*descending=*/true);
  const at::Tensor none = at::full({}, -1, classes.options());
  const at::Tensor chosen = at::where(values.eq(nothing), none, classes).slice(1, 0, hardest);
  const c10::SymInt missing = c10::SymInt(hardest) - chosen.sym_size(1);
  return at::constant_pad_nd_symint(chosen, {c10::SymInt(0), missing}, -1);
}

at::Tensor among(const at::Tensor& chosen, const c10::SymInt& classes) {
  const at::Tensor nobody = at::scalar_tensor(at::Scalar(classes), chosen.options()); // a column of their own
  const at::Tensor none = at::zeros_symint({chosen.sym_size(0), classes + 1}, chosen.options().dtype(at::kBool));
  return none.scatter(1, at::where(chosen.lt(0), nobody, chosen), true).slice_symint(1, 0, classes);
}

at::Tensor own_class(const at::Tensor& target, const c10::SymInt& classes) {
  return at::arange(at::Scalar(classes), target.options()).unsqueeze(0).eq(target.unsqueeze(1));
}

at::Tensor with_hardest_margin(const at::Tensor& logits, double scale, double margin) {
  const at::Tensor cosine = logits / scale;
  const at::Tensor values = cosine.detach();
  const at::Tensor past = values < std::cos(margin); // theta > margin
  const at::Tensor inside = past.logical_and(values > -1.0); // there the sine has a slope
  const at::Tensor one = number_like(values, 1.0);
  // NB: as in changed_cosines(); and 0 * infinity, where there is no class.
  const at::Tensor c = at::where(inside, cosine, one - one);
  const at::Tensor nearer = c * std::cos(margin) + ((1.0 - c) * (1.0 + c)).sqrt() * std::sin(margin);
  const at::Tensor end = at::where(past, number_like(values, -std::cos(margin)), one);
  const at::Tensor stays = values.isnan().logical_or(values.eq(-kInfinity));
  return at::where(stays, logits, at::where(inside, nearer, end) * scale);
}

OtherSums with_hardest(const OtherSums& sums, const at::Tensor& hardest_logit, double scale, double margin) {
  if (hardest_logit.sym_size(1) == 0) {
    return sums;
  }
  if (margin == 0) {
    return {lse_of_columns(at::cat({sums.other_lse.unsqueeze(1), hardest_logit}, 1)), sums.logit_sum};
  }
  const at::Tensor nearer = with_hardest_margin(hardest_logit, scale, margin);
  const at::Tensor there = hardest_logit.detach().isfinite();
  const at::Tensor zero = number_like(hardest_logit, 0.0);
  const at::Tensor change = at::where(there, nearer, zero) - at::where(there, hardest_logit, zero);
  return {lse_of_columns(at::cat({sums.other_lse.unsqueeze(1), nearer}, 1)), sums.logit_sum + change.sum(1)};
}

// NB: [B, C K] cosines for a moment, beside the result.
at::Tensor head_logits(const LinearProblem& p, double hardest_margin) {
  const auto [present, place] = target_place(p.target, p.classes());
  // Each center as a class of its own, the target's being the nearest.
  LinearProblem centers = p;
  centers.sub_centers = 1;
  centers.hardest = 0;
  centers.hard_threshold = std::nullopt;
  centers.hard_coefficients = std::nullopt;
  centers.bias = std::nullopt;
  centers.margins.parameters.scale = 1.0;
  at::Tensor angle;
  at::Tensor nearest;
  if (p.hard_coefficients.has_value() || p.sub_centers > 1) { // the coefficients' values are checked there as well
    const at::NoGradGuard no_grad;
    at::Tensor state;
    std::tie(angle, state) = call_target_rows(p);
    nearest = state.select(1, 4).to(at::kLong);
    centers.target = at::where(present, place * p.sub_centers + nearest, at::full({}, -1, place.options()));
  }
  const at::Tensor own = own_class(p.target, p.classes());
  at::Tensor cosines = call_logits_forward(centers).logits;
  if (p.sub_centers > 1) {
    const at::Tensor of_centers = cosines.view_symint({p.input.sym_size(0), p.classes(), c10::SymInt(p.sub_centers)});
    const at::Tensor largest = of_centers.detach().argmax(2);
    cosines = of_centers.gather(2, at::where(own, nearest.unsqueeze(1), largest).unsqueeze(2)).squeeze(2);
  }
  if (p.hard_coefficients.has_value()) {
    cosines = changed_cosines(p, cosines, own, angle);
  }
  const double scale = p.margins.parameters.scale;
  at::Tensor logits = cosines * scale;
  if (p.hardest > 0 && hardest_margin > 0) {
    const at::Tensor chosen = among(rank_hardest(logits, own, p.hardest), p.classes());
    logits = at::where(chosen, with_hardest_margin(logits, scale, hardest_margin), logits);
  }
  return p.bias.has_value() ? logits + p.bias->to(p.acc()) : logits;
}

} // namespace torchmargin
