// The published losses: their options as the one form of MarginLossOptions, and the margins that differ from row to
// row.
#include "torchmargin/modules.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <tuple>

namespace torchmargin::nn {
namespace {

constexpr double kPi = 3.14159265358979323846;

double check_radians(const char* name, double angle) {
  TORCH_CHECK(
      std::abs(angle) <= kPi, "expected ", name, " in radians, not degrees: at most pi in size, but got ", angle);
  return angle;
}

template <typename Options>
MarginLossOptions common(const Options& o, const LossForm& form) {
  MarginLossOptions options(o.in_features(), o.num_classes());
  options.form(form);
  options.label_smoothing(o.label_smoothing());
  options.ignore_index(o.ignore_index());
  options.reduction(o.reduction());
  return options;
}

template <typename Options>
LossForm varied(LossForm form, const Options& o) {
  form.margin.scale = o.scale();
  form.margin.extension = o.extension();
  form.margin.margin_gradient = o.margin_gradient();
  return form;
}

LossForm scaled(LossForm form, double scale) {
  form.margin.scale = scale;
  return form;
}

MarginLossOptions margin_options(const SoftmaxLossOptions& o) {
  return common(o, scaled(presets::softmax(), o.scale())).bias(o.bias());
}

MarginLossOptions margin_options(const ModifiedSoftmaxLossOptions& o) {
  return common(o, scaled(presets::modified_softmax(), o.scale()));
}

MarginLossOptions margin_options(const NormalizedSoftmaxLossOptions& o) {
  return common(o, presets::normalized_softmax(o.scale()));
}

MarginLossOptions margin_options(const SphereFaceLossOptions& o) {
  LossForm form = varied(presets::sphereface(o.margin()), o);
  form.normalize_input = o.normalize_input();
  return common(o, form);
}

MarginLossOptions margin_options(const LargeMarginSoftmaxLossOptions& o) {
  return common(o, varied(presets::large_margin_softmax(o.margin()), o));
}

MarginLossOptions margin_options(const CosFaceLossOptions& o) {
  TORCH_CHECK(
      std::abs(o.margin()) <= kPi,
      "expected margin to be a difference of cosines (angles here are in radians, not degrees): at most pi in size, "
      "but "
      "got ",
      o.margin());
  return common(o, varied(presets::cosface(o.scale(), o.margin()), o));
}

MarginLossOptions margin_options(const ArcFaceLossOptions& o) {
  return common(o, varied(presets::arcface(o.scale(), check_radians("margin", o.margin())), o));
}

MarginLossOptions margin_options(const CombinedMarginLossOptions& o) {
  return common(o, varied(presets::combined(o.scale(), o.m1(), check_radians("m2", o.m2()), o.m3()), o));
}

MarginLossOptions margin_options(const AdaFaceLossOptions& o) {
  LossForm form = presets::normalized_softmax(o.scale());
  form.margin.extension = Extension::clip;
  check_radians("margin", o.margin());
  return common(o, form);
}

MarginLossOptions margin_options(const MagFaceLossOptions& o) {
  TORCH_CHECK(
      0 < o.a_min() && o.a_min() < o.a_max(), "expected 0 < a_min < a_max, but got ", o.a_min(), " and ", o.a_max());
  check_radians("m_min", o.m_min());
  check_radians("m_max", o.m_max());
  return common(o, presets::arcface(o.scale(), 0.0));
}

MarginLossOptions margin_options(const ElasticFaceLossOptions& o) {
  TORCH_CHECK(o.kind() == "arc" || o.kind() == "cos", "expected kind to be 'arc' or 'cos', but got '", o.kind(), "'");
  TORCH_CHECK(o.deviation() >= 0, "expected deviation not to be negative, but got ", o.deviation());
  LossForm form = presets::normalized_softmax(o.scale());
  (o.kind() == "arc" ? form.margin.m2 : form.margin.m3) = check_radians("margin", o.margin());
  return common(o, form);
}

// Which rows count [B], and the embeddings' lengths [B] in the dtype of margins. An ignored row may hold anything: it
// is replaced before the arithmetic, so that no NaN reaches a gradient.
std::tuple<torch::Tensor, torch::Tensor> lengths_of(
    const MarginLossOptions& options,
    const torch::Tensor& embeddings,
    const torch::Tensor& labels,
    double ignored,
    torch::Dtype dtype) {
  const torch::Tensor valid = labels != options.ignore_index();
  const torch::Tensor rows = at::where(valid.unsqueeze(1), embeddings, at::full({}, ignored, embeddings.options()));
  return {valid, at::linalg_vector_norm(rows, 2, at::IntArrayRef{1}, /*keepdim=*/false, dtype)};
}

} // namespace

#define TORCHMARGIN_DEFINE_LOSS(Name)                                             \
  Name##Impl::Name##Impl(const Name##Options& options_)                           \
      : MarginLossImpl<Name##Impl>(margin_options(options_)), options(options_) { \
    reset();                                                                      \
  }
TORCHMARGIN_DEFINE_LOSS(SoftmaxLoss)
TORCHMARGIN_DEFINE_LOSS(ModifiedSoftmaxLoss)
TORCHMARGIN_DEFINE_LOSS(NormalizedSoftmaxLoss)
TORCHMARGIN_DEFINE_LOSS(CosFaceLoss)
TORCHMARGIN_DEFINE_LOSS(ArcFaceLoss)
TORCHMARGIN_DEFINE_LOSS(CombinedMarginLoss)
TORCHMARGIN_DEFINE_LOSS(AdaFaceLoss)
TORCHMARGIN_DEFINE_LOSS(MagFaceLoss)
TORCHMARGIN_DEFINE_LOSS(ElasticFaceLoss)
#undef TORCHMARGIN_DEFINE_LOSS

#define TORCHMARGIN_DEFINE_ANNEALED_LOSS(Name)                                                                 \
  Name##Impl::Name##Impl(const Name##Options& options_)                                                        \
      : AnnealedMarginLossImpl<Name##Impl>(                                                                    \
            margin_options(options_), options_.lambda_base(), options_.lambda_gamma(), options_.lambda_min()), \
        options(options_) {                                                                                    \
    reset();                                                                                                   \
  }
TORCHMARGIN_DEFINE_ANNEALED_LOSS(SphereFaceLoss)
TORCHMARGIN_DEFINE_ANNEALED_LOSS(LargeMarginSoftmaxLoss)
#undef TORCHMARGIN_DEFINE_ANNEALED_LOSS

template <typename Derived>
AnnealedMarginLossImpl<Derived>::AnnealedMarginLossImpl(
    const MarginLossOptions& options,
    double base,
    double gamma,
    double minimum)
    : MarginLossImpl<Derived>(options), base_(base), gamma_(gamma), minimum_(minimum) {
  for (const auto& [name, value] :
       {std::pair{"lambda_base", base}, std::pair{"lambda_gamma", gamma}, std::pair{"lambda_min", minimum}}) {
    TORCH_CHECK(
        std::isfinite(value) && value >= 0, "expected ", name, " to be finite and not negative, but got ", value);
  }
}

template <typename Derived>
void AnnealedMarginLossImpl<Derived>::reset() {
  MarginLossImpl<Derived>::reset();
  step = this->register_buffer("step", at::zeros({}, at::kLong));
}

template <typename Derived>
torch::Tensor AnnealedMarginLossImpl<Derived>::annealing_lambda() const {
  return (base_ / (1 + gamma_ * step.to(at::kDouble))).clamp_min(minimum_);
}

template <typename Derived>
void AnnealedMarginLossImpl<Derived>::begin_forward() {
  if (this->is_training()) {
    step.add_(1);
  }
}

template <typename Derived>
SampleMargins AnnealedMarginLossImpl<Derived>::sample_margins(
    const torch::Tensor& /*embeddings*/,
    const torch::Tensor& /*labels*/) {
  SampleMargins margins;
  margins.margin_weight = (1 / (1 + annealing_lambda())).to(this->acc_dtype());
  return margins;
}

template class AnnealedMarginLossImpl<SphereFaceLossImpl>;
template class AnnealedMarginLossImpl<LargeMarginSoftmaxLossImpl>;

void AdaFaceLossImpl::reset() {
  MarginLossImpl<AdaFaceLossImpl>::reset();
  length_mean = register_buffer("length_mean", at::full({}, 20.0));
  length_std = register_buffer("length_std", at::full({}, 100.0));
}

SampleMargins AdaFaceLossImpl::sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) {
  const torch::NoGradGuard no_grad;
  auto [valid, lengths] = lengths_of(margin_loss_options(), embeddings, labels, /*ignored=*/1.0, acc_dtype());
  lengths = lengths.clamp(0.001, 100.0);
  if (is_training()) {
    move_statistics(valid, lengths);
  }
  const torch::Tensor quality =
      ((lengths - length_mean) / (length_std + 1e-3) * options.h()).clamp(-1, 1).to(lengths.scalar_type());
  SampleMargins margins;
  margins.m2 = -options.margin() * quality;
  margins.m3 = options.margin() * (1 + quality);
  return margins;
}

// Mean and unbiased deviation of the rows that count; a batch with fewer than two changes nothing.
void AdaFaceLossImpl::move_statistics(const torch::Tensor& valid, const torch::Tensor& lengths) {
  const torch::Tensor zero = at::zeros({}, lengths.options());
  const torch::Tensor count = valid.sum();
  const torch::Tensor mean = at::where(valid, lengths, zero).sum() / count.clamp_min(1);
  const torch::Tensor square = at::where(valid, (lengths - mean).square(), zero).sum() / (count - 1).clamp_min(1);
  const torch::Tensor momentum = at::full({}, options.momentum(), length_mean.options());
  const torch::Tensor weight = at::where(count > 1, momentum, at::zeros_like(momentum));
  length_mean.lerp_(mean.to(length_mean.options()), weight);
  length_std.lerp_(square.sqrt().to(length_std.options()), weight);
}

SampleMargins MagFaceLossImpl::sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) {
  auto [valid, lengths] =
      lengths_of(margin_loss_options(), embeddings, labels, /*ignored=*/options.a_min(), acc_dtype());
  const double slope = (options.m_max() - options.m_min()) / (options.a_max() - options.a_min());
  SampleMargins margins;
  margins.m2 = options.m_min() + slope * (lengths.clamp(options.a_min(), options.a_max()) - options.a_min());
  return margins;
}

torch::Tensor
MagFaceLossImpl::finish(const torch::Tensor& loss, const torch::Tensor& embeddings, const torch::Tensor& labels) {
  auto [valid, lengths] =
      lengths_of(margin_loss_options(), embeddings, labels, /*ignored=*/options.a_min(), acc_dtype());
  lengths = lengths.clamp(options.a_min(), options.a_max());
  const double a_max = options.a_max();
  torch::Tensor penalty = options.regularizer() * (lengths.reciprocal() + lengths / (a_max * a_max));
  penalty = at::where(valid, penalty, at::zeros({}, penalty.options()));
  if (options.reduction() != "none") {
    penalty = penalty.sum();
  }
  if (options.reduction() == "mean") {
    penalty = penalty / valid.sum();
  }
  return loss + penalty;
}

SampleMargins ElasticFaceLossImpl::sample_margins(const torch::Tensor& /*embeddings*/, const torch::Tensor& labels) {
  SampleMargins margins;
  if (is_training()) {
    const torch::Tensor noise = options.deviation() * at::randn({labels.size(0)}, labels.options().dtype(acc_dtype()));
    (options.kind() == "arc" ? margins.m2 : margins.m3) = noise;
  }
  return margins;
}

} // namespace torchmargin::nn
