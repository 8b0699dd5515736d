#include "ops/formula.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <cmath>
#include <limits>
#include <vector>

#include "math/angle.h"
#include "ops/hard_negatives.h"
#include "ops/target_place.h"

namespace torchmargin {
namespace {

constexpr double kPi = 3.14159265358979323846;

at::Tensor number_like(const at::Tensor& tensor, double value) {
  return at::full({}, value, tensor.options());
}

// The margin of each row, in float64.
struct RowMargins {
  at::Tensor m2, m3, mu; // [B] or 0-dim
  bool plain; // no angle is added: E is the cosine itself
};

RowMargins row_margins(const Margins& margins, const at::Tensor& like) {
  const MarginParameters& margin = margins.parameters;
  const auto widened = [&](const std::optional<at::Tensor>& sample, double otherwise) {
    return sample.has_value() ? sample->to(at::kDouble) : at::full({}, otherwise, like.options().dtype(at::kDouble));
  };
  return {
      widened(margins.sample_m2, 0.0) + margin.m2, widened(margins.sample_m3, 0.0) + margin.m3,
      widened(margins.sample_margin_weight, 1.0) * margin.margin_weight,
      margin.m1 == 1.0 && margin.m2 == 0.0 && !margins.sample_m2.has_value()};
}

at::Tensor extended_cosine(
    const MarginParameters& margin,
    const at::Tensor& theta,
    const at::Tensor& cosine,
    const at::Tensor& acute,
    const RowMargins& row) {
  if (row.plain) {
    return cosine;
  }
  const at::Tensor phi = margin.m1 * theta + row.m2;
  switch (margin.extension) {
    case Extension::none:
      return phi.cos();
    case Extension::linear:
      return at::where(phi <= kPi, phi.cos(), cosine - row.m2 * row.m2.sin());
    case Extension::continuous:
      return at::where(phi <= kPi, phi.cos(), cosine - (1 - row.m2.cos()));
    case Extension::easy:
      return at::where(acute, phi.cos(), cosine);
    case Extension::clip:
      return phi.clamp(0.0, kPi).cos();
    case Extension::monotonic:
      break;
  }
  const at::Tensor k = (phi / kPi).floor().detach();
  return (1 - 2 * at::remainder(k, 2)) * phi.cos() - 2 * k;
}

// acute: is theta below a right angle? NB: the cosine of a right angle that was rounded is 6e-17.
at::Tensor psi(
    const MarginParameters& margin,
    const at::Tensor& theta,
    const at::Tensor& cosine,
    const at::Tensor& acute,
    const RowMargins& row) {
  const at::Tensor value = cosine + row.mu * (extended_cosine(margin, theta, cosine, acute, row) - row.m3 - cosine);
  return margin.margin_gradient == MarginGradient::straight_through ? cosine + (value - cosine).detach() : value;
}

at::Tensor norms(const at::Tensor& rows) {
  return at::linalg_vector_norm(rows, 2, at::IntArrayRef{1});
}

// Rows of unit length; a zero row stays zero and has no gradient.
at::Tensor unit(const at::Tensor& rows) {
  const at::Tensor length = norms(rows).unsqueeze(1);
  const at::Tensor zero = length < kZeroNorm;
  const at::Tensor one = number_like(rows, 1.0);
  return at::where(zero, number_like(rows, 0.0), rows / at::where(zero, one, length));
}

// The angle between rows of unit length, or a right one where `zero`.
struct AngleFormula {
  at::Tensor delta, sigma, theta;

  AngleFormula(const at::Tensor& unit_x, const at::Tensor& unit_w, const at::Tensor& zero)
      : delta(norms(unit_x - unit_w)),
        sigma(norms(unit_x + unit_w)),
        theta(at::where(zero, at::full({}, kPi / 2, unit_x.options()), 2 * at::atan2(delta, sigma))) {}
};

// Rows of a matrix, or numbers of a vector. NB: not index_select, whose derivative adds by atomics on a GPU, in any
// order; embedding's sorts.
at::Tensor rows_at(const at::Tensor& matrix, const at::Tensor& places) {
  return matrix.dim() == 1 ? at::embedding(matrix.unsqueeze(1), places).squeeze(1) : at::embedding(matrix, places);
}

// The row of the weight that stands for each row's class, `place`: its nearest center.
at::Tensor nearest_center(const LinearProblem& p, const at::Tensor& place) {
  if (p.sub_centers == 1) {
    return place;
  }
  const at::Tensor x = p.input.detach().to(at::kDouble);
  std::vector<at::Tensor> angles;
  for (int64_t k = 0; k < p.sub_centers; ++k) {
    const at::Tensor w = p.weight.detach().index_select(0, place * p.sub_centers + k).to(at::kDouble);
    angles.push_back(AngleFormula(unit(x), unit(w), (norms(x) < kZeroNorm).logical_or(norms(w) < kZeroNorm)).theta);
  }
  return place * p.sub_centers + at::argmin(at::stack(angles, 1), 1);
}

// g(c) = 2 ((c + 1) / 2)^power - 1; see math/one_against_all.h.
at::Tensor curve_of(double power, const at::Tensor& c) {
  if (power == 1.0) {
    return c;
  }
  const at::Tensor half = (c + 1.0) * 0.5;
  return 2.0 * (power == std::floor(power) ? half : half.clamp_min(0.0)).pow(power) - 1.0;
}

// N(c) of the other classes.
at::Tensor negative_curve(const BinaryForm& form, const at::Tensor& c) {
  if (form.kind != BinaryKind::angle) {
    const at::Tensor curve = curve_of(form.power, c);
    return form.kind == BinaryKind::cosine ? curve + form.margin : curve;
  }
  const at::Tensor square = (1.0 - c) * (1.0 + c);
  const at::Tensor inside = square.detach() > 0;
  const at::Tensor one = number_like(c, 1.0);
  const at::Tensor sine = at::where(inside, at::where(inside, square, one).sqrt(), square.detach() * 0.0);
  return curve_of(form.power, c * std::cos(form.margin) + sine * std::sin(form.margin));
}

// theta and t of every row, float64; 0 where the target is absent.
struct TargetFormula {
  at::Tensor theta;
  at::Tensor logit;
};

TargetFormula target_formula(const LinearProblem& p, bool mark_seam) {
  const auto [present, place] = target_place(p.target, p.classes());
  const at::Tensor x = p.input.to(at::kDouble);
  const at::Tensor w = rows_at(p.weight, nearest_center(p, place)).to(at::kDouble);
  const at::Tensor unit_x = unit(x);
  const at::Tensor unit_w = unit(w);
  const at::Tensor alpha = p.normalize_input ? at::ones({}, x.options()) : norms(x);
  const at::Tensor beta = p.normalize_weight ? at::ones({}, x.options()) : norms(w);
  const RowMargins row = row_margins(p.margins, p.input);

  const at::Tensor zero_x = norms(x) < kZeroNorm;
  const at::Tensor zero_w = norms(w) < kZeroNorm;
  const auto [delta, sigma, theta] = AngleFormula(unit_x, unit_w, zero_x.logical_or(zero_w));
  at::Tensor value;
  if (row.plain) { // a bilinear form less a constant: no angle, no seam
    value =
        ((p.normalize_input ? unit_x : x) * (p.normalize_weight ? unit_w : w)).sum(1) - alpha * beta * row.mu * row.m3;
  } else {
    value = alpha * beta * psi(p.margins.parameters, theta, theta.cos(), /*acute=*/theta < kPi / 2, row);
    if (mark_seam) {
      at::Tensor seam = at::minimum(delta, sigma) <= kParallel;
      seam = p.normalize_input ? seam : seam.logical_or(zero_x);
      seam = p.normalize_weight ? seam : seam.logical_or(zero_w);
      value = value * at::where(seam, std::numeric_limits<double>::quiet_NaN(), at::ones({}, x.options()));
    }
  }
  if (p.one_against_all()) {
    value = curve_of(p.binary.power, value);
    value = p.binary.kind == BinaryKind::cosine ? value - p.binary.margin : value;
  }
  value = p.margins.parameters.scale * value;
  if (p.bias.has_value()) {
    value = value + (p.bias->dim() == 0 ? *p.bias : rows_at(*p.bias, place)).to(at::kDouble);
  }
  const at::Tensor none = at::zeros({}, x.options());
  return {at::where(present, theta, none).detach(), at::where(present, value, none)};
}

// A_i . B_j, [B, C] acc; with sub-centers the largest of each class.
at::Tensor products_of(const LinearProblem& p) {
  const at::Tensor x = p.input.to(p.acc());
  const at::Tensor w = p.weight.to(p.acc());
  const at::Tensor products = at::mm(p.normalize_input ? unit(x) : x, (p.normalize_weight ? unit(w) : w).t());
  if (p.sub_centers == 1) {
    return products;
  }
  const at::Tensor of_centers = products.view_symint({p.input.sym_size(0), p.classes(), p.sub_centers});
  return of_centers.gather(2, of_centers.detach().argmax(2, /*keepdim=*/true)).squeeze(2);
}

at::Tensor with_bias(const LinearProblem& p, const at::Tensor& logits) {
  return p.bias.has_value() ? logits + p.bias->to(p.acc()) : logits;
}

// The logits without a margin, [B, C] acc.
at::Tensor plain_logits(const LinearProblem& p) {
  return with_bias(p, p.margins.parameters.scale * products_of(p));
}

// The three differentiable results, float64, from logits without a margin and the target's own (float64).
CosineResult results_of(const at::Tensor& logits, const at::Tensor& own, const at::Tensor& target_logit) {
  const at::Tensor minus_infinity = number_like(logits, -std::numeric_limits<double>::infinity());
  const at::Tensor others = at::where(own, minus_infinity, logits);
  const at::Tensor sum = logits.masked_fill(own, 0.0).sum(1);
  // NB: logsumexp of nothing but -inf is -inf, and its derivatives are NaN. Here they are 0.
  const at::Tensor none = others.eq(minus_infinity).all(1);
  const at::Tensor some = at::where(none.unsqueeze(1), number_like(logits, 0.0), others);
  const at::Tensor lse = at::where(none, minus_infinity, at::logsumexp(some, at::IntArrayRef{1}));
  return {lse.to(at::kDouble), target_logit, sum.to(at::kDouble) + target_logit};
}

// One against all: the sums that stand in other_lse and logit_sum.
ForwardResult
binary_formula(const LinearProblem& p, const TargetFormula& target, const at::Tensor& products, const at::Tensor& own) {
  const double scale = p.margins.parameters.scale;
  const at::Tensor zero = number_like(products, 0.0);
  at::Tensor z = scale * negative_curve(p.binary, products);
  z = p.bias.has_value() ? z + p.bias->to(p.acc()) : z;
  const auto sum = [&](const at::Tensor& of_classes) {
    return at::where(own, zero, of_classes).sum(1, /*keepdim=*/false, at::kDouble);
  };
  ForwardResult result;
  result.other_lse = sum(at::logaddexp(zero, z));
  result.target_logit = target.logit;
  result.logit_sum = sum(z.sigmoid());
  result.hardest_logit = products.slice(1, 0, 0).to(at::kDouble);
  result.target_angle = target.theta.to(p.acc());
  result.max_other_logit =
      (scale * products.detach()).masked_fill(own, -std::numeric_limits<double>::infinity()).amax(at::IntArrayRef{1});
  return result;
}

} // namespace

ForwardResult linear_formula(const LinearProblem& p, const at::Tensor& hardest_class, bool mark_seam) {
  if (p.weight.sym_size(0) == 0) { // a sum over no feature: zeros that are part of the graph
    ForwardResult nothing;
    nothing.target_logit = p.input.narrow(1, 0, 0).sum(1, /*keepdim=*/false, at::kDouble);
    nothing.other_lse = nothing.target_logit - std::numeric_limits<double>::infinity();
    nothing.logit_sum = nothing.target_logit;
    nothing.hardest_logit = nothing.other_lse.unsqueeze(1).expand_symint({p.input.sym_size(0), p.hardest});
    nothing.target_angle = nothing.target_logit.detach().to(p.acc());
    nothing.max_other_logit = nothing.other_lse.detach().to(p.acc());
    return nothing;
  }
  const TargetFormula target = target_formula(p, mark_seam);
  const at::Tensor products = products_of(p);
  const at::Tensor own = own_class(p.target, p.classes());
  const double scale = p.margins.parameters.scale;
  if (p.one_against_all()) {
    return binary_formula(p, target, products, own);
  }
  const at::Tensor before = with_bias(p, scale * products);
  const at::Tensor logits =
      p.hard_coefficients.has_value() ? with_bias(p, scale * changed_cosines(p, products, own, target.theta)) : before;
  const at::Tensor nothing = number_like(logits, -std::numeric_limits<double>::infinity());
  ForwardResult result;
  at::Tensor summed = logits; // of other_lse
  if (p.hardest > 0) {
    result.hardest_class = hardest_class.defined() ? hardest_class : rank_hardest(logits, own, p.hardest);
    const at::Tensor there = result.hardest_class.ge(0);
    const at::Tensor column = at::where(there, result.hardest_class, at::zeros({}, p.target.options()));
    result.hardest_logit = at::where(there, logits.gather(1, column), nothing).to(at::kDouble);
    summed = at::where(among(result.hardest_class, p.classes()), nothing, logits);
  } else {
    result.hardest_logit = logits.slice(1, 0, 0).to(at::kDouble);
    result.hardest_class = p.target.new_empty_symint({p.input.sym_size(0), c10::SymInt(0)});
  }
  const CosineResult results = results_of(summed, own, target.logit);
  result.other_lse = results.other_lse;
  result.target_logit = results.target_logit;
  result.logit_sum =
      p.hardest > 0 ? logits.masked_fill(own, 0.0).sum(1).to(at::kDouble) + target.logit : results.logit_sum;
  result.target_angle = target.theta.to(p.acc());
  result.max_other_logit =
      before.detach().masked_fill(own, -std::numeric_limits<double>::infinity()).amax(at::IntArrayRef{1});
  return result;
}

at::Tensor logits_formula(const LinearProblem& p, bool mark_seam) {
  const at::Tensor logits = plain_logits(p);
  return at::where(
      own_class(p.target, p.classes()), target_formula(p, mark_seam).logit.to(p.acc()).unsqueeze(1), logits);
}

namespace {

// psi of cosines of any shape; past +-1 they count as +-1, where only the plain psi has a slope.
at::Tensor psi_of_cosine(const at::Tensor& cosine, const MarginParameters& margin, const RowMargins& row) {
  const at::Tensor wide = cosine.to(at::kDouble);
  const at::Tensor clamped = wide.clamp(-1.0, 1.0);
  const at::Tensor theta = 2 * at::atan2((1 - clamped).sqrt(), (1 + clamped).sqrt());
  return psi(margin, theta, row.plain ? wide + (clamped - wide).detach() : clamped, /*acute=*/clamped > 0, row);
}

} // namespace

CosineResult cosine_formula(const CosineProblem& p) {
  const at::Tensor logits = p.margins.parameters.scale * p.cosine.to(p.acc());
  const auto [present, place] = target_place(p.target, p.cosine.sym_size(1));
  const RowMargins row = row_margins(p.margins, p.cosine);
  const at::Tensor own_cosine = p.cosine.gather(1, place.unsqueeze(1)).squeeze(1);
  const at::Tensor value = p.margins.parameters.scale * psi_of_cosine(own_cosine, p.margins.parameters, row);
  const at::Tensor target_logit = at::where(present, value, at::zeros({}, value.options()));
  return results_of(logits, own_class(p.target, p.cosine.sym_size(1)), target_logit);
}

at::Tensor transform_formula(const at::Tensor& cosine, const MarginParameters& margin) {
  const RowMargins row = row_margins({.parameters = margin}, cosine);
  return psi_of_cosine(cosine, margin, row).to(cosine.scalar_type());
}

} // namespace torchmargin
