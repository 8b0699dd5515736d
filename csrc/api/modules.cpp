// The published losses: the margins that differ from row to row, and the state that moves. Their options as the one
// form of MarginLossOptions are in loss_options.cpp.
#include "torchmargin/modules.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/util/Exception.h>

#include <limits>
#include <tuple>

#include "api/loss_options.h"

namespace torchmargin::nn {
namespace {

// Which rows are not ignored [B], and the embeddings' lengths [B] in the dtype of margins; NaN for a row that is not
// finite. Such a row, and an ignored one, may hold anything: it is replaced before the arithmetic, so that no NaN
// reaches a gradient.
template <typename Options>
std::tuple<torch::Tensor, torch::Tensor> lengths_of(
    const Options& options,
    const torch::Tensor& embeddings,
    const torch::Tensor& labels,
    double replacement,
    torch::Dtype dtype) {
  const torch::Tensor valid = labels != options.ignore_index();
  const torch::Tensor finite = at::isfinite(embeddings).all(1);
  const torch::Tensor rows =
      at::where(valid.logical_and(finite).unsqueeze(1), embeddings, at::full({}, replacement, embeddings.options()));
  const torch::Tensor lengths = at::linalg_vector_norm(rows, 2, at::IntArrayRef{1}, /*keepdim=*/false, dtype);
  const torch::Tensor nan = at::full({}, std::numeric_limits<double>::quiet_NaN(), lengths.options());
  return {valid, at::where(valid.logical_and(finite.logical_not()), nan, lengths)};
}

// The losses that read an image's quality from the length have nothing to read once it is 1.
void warn_of_unit_lengths(const char* name, const torch::Tensor& counted, const torch::Tensor& lengths) {
  const torch::Tensor away = (lengths - 1).abs().gt(1e-2).logical_and(counted);
  if (counted.sum().ge(2).logical_and(away.any().logical_not()).item<bool>()) {
    TORCH_WARN(
        name,
        ": the embeddings are already of length 1; it reads the quality of an image from the length, so give it the "
        "network's output before any normalisation");
  }
}

} // namespace

template <typename Derived, typename Options>
OptionsLossImpl<Derived, Options>::OptionsLossImpl(const Options& options_)
    : MarginLossImpl<Derived>(margin_options(options_)), options(options_) {}

template <typename Derived, typename Options>
MarginLossOptions OptionsLossImpl<Derived, Options>::margin_loss_options() const {
  return margin_options(options);
}

template <typename Derived, typename Options>
std::vector<SavedNumber> OptionsLossImpl<Derived, Options>::numbers() {
  return numbers_of(options);
}

template <typename Derived, typename Options>
void AnnealedMarginLossImpl<Derived, Options>::reset() {
  OptionsLossImpl<Derived, Options>::reset();
  step = this->register_buffer("step", at::zeros({}, at::kLong));
}

template <typename Derived, typename Options>
torch::Tensor AnnealedMarginLossImpl<Derived, Options>::annealing_lambda() const {
  const Options& o = this->options;
  return (o.lambda_base() / (1 + o.lambda_gamma() * step.to(at::kDouble))).clamp_min(o.lambda_min());
}

template <typename Derived, typename Options>
void AnnealedMarginLossImpl<Derived, Options>::advance(
    const torch::Tensor& /*embeddings*/,
    const torch::Tensor& /*labels*/) {
  step.add_(1);
}

template <typename Derived, typename Options>
SampleMargins AnnealedMarginLossImpl<Derived, Options>::sample_margins(
    const torch::Tensor& /*embeddings*/,
    const torch::Tensor& /*labels*/) {
  SampleMargins margins;
  margins.margin_weight = (1 / (1 + annealing_lambda())).to(this->acc_dtype());
  return margins;
}

template <typename Derived, typename Options>
MarginLossOptions ClassMarginLossImpl<Derived, Options>::margin_loss_options() const {
  MarginLossOptions form = margin_options(this->options);
  // C values are looked at when they are new, not in every call. NB: an inference tensor has no version.
  const torch::Tensor& margins = this->options.class_margins();
  if (margins.defined() &&
      (margins.is_inference() || !checked_.is_same(margins) || checked_version_ != margins._version())) {
    check_class_margins(margins);
    checked_ = margins;
    checked_version_ = margins.is_inference() ? 0 : margins._version();
  }
  return form;
}

template <typename Derived, typename Options>
std::optional<torch::Tensor> ClassMarginLossImpl<Derived, Options>::margins_of(const torch::Tensor& labels) {
  torch::Tensor& margins = this->options.class_margins();
  if (!margins.defined()) {
    return std::nullopt;
  }
  if (margins.device() != labels.device()) {
    margins = margins.to(labels.device()); // once, not in every call
  }
  return margins.index_select(0, labels.clamp(0, margins.size(0) - 1)).to(at::kDouble);
}

#define TORCHMARGIN_DEFINE_LOSS(Base, Name)                                                           \
  template class Base<Name##Impl, Name##Options>;                                                     \
  Name##Impl::Name##Impl(const Name##Options& options_) : Base<Name##Impl, Name##Options>(options_) { \
    reset();                                                                                          \
  }
TORCHMARGIN_DEFINE_LOSS(OptionsLossImpl, SoftmaxLoss)
TORCHMARGIN_DEFINE_LOSS(OptionsLossImpl, ModifiedSoftmaxLoss)
TORCHMARGIN_DEFINE_LOSS(OptionsLossImpl, NormalizedSoftmaxLoss)
TORCHMARGIN_DEFINE_LOSS(AnnealedMarginLossImpl, SphereFaceLoss)
TORCHMARGIN_DEFINE_LOSS(AnnealedMarginLossImpl, LargeMarginSoftmaxLoss)
TORCHMARGIN_DEFINE_LOSS(ClassMarginLossImpl, CosFaceLoss)
TORCHMARGIN_DEFINE_LOSS(ClassMarginLossImpl, ArcFaceLoss)
TORCHMARGIN_DEFINE_LOSS(OptionsLossImpl, CombinedMarginLoss)
TORCHMARGIN_DEFINE_LOSS(OptionsLossImpl, AdaFaceLoss)
TORCHMARGIN_DEFINE_LOSS(OptionsLossImpl, MagFaceLoss)
TORCHMARGIN_DEFINE_LOSS(OptionsLossImpl, ElasticFaceLoss)
#undef TORCHMARGIN_DEFINE_LOSS

SampleMargins CosFaceLossImpl::sample_margins(const torch::Tensor& /*embeddings*/, const torch::Tensor& labels) {
  SampleMargins margins;
  margins.m3 = margins_of(labels);
  return margins;
}

SampleMargins ArcFaceLossImpl::sample_margins(const torch::Tensor& /*embeddings*/, const torch::Tensor& labels) {
  SampleMargins margins;
  margins.m2 = margins_of(labels);
  return margins;
}

void AdaFaceLossImpl::reset() {
  OptionsLossImpl::reset();
  length_mean = register_buffer("length_mean", at::full({}, 20.0));
  length_std = register_buffer("length_std", at::full({}, 100.0));
}

// Mean and unbiased deviation of the rows that count; a batch with fewer than two changes nothing.
void AdaFaceLossImpl::advance(const torch::Tensor& embeddings, const torch::Tensor& labels) {
  const auto [valid, raw] = lengths_of(options, embeddings, labels, /*replacement=*/1.0, acc_dtype());
  const torch::Tensor counted = valid.logical_and(at::isfinite(raw));
  if (!std::exchange(seen_, true)) {
    warn_of_unit_lengths("AdaFaceLoss", counted, raw);
  }
  const torch::Tensor lengths = raw.clamp(0.001, 100.0);
  const torch::Tensor zero = at::zeros({}, lengths.options());
  const torch::Tensor count = counted.sum();
  const torch::Tensor mean = at::where(counted, lengths, zero).sum() / count.clamp_min(1);
  const torch::Tensor square = at::where(counted, (lengths - mean).square(), zero).sum() / (count - 1).clamp_min(1);
  const torch::Tensor momentum = at::full({}, options.momentum(), length_mean.options());
  const torch::Tensor weight = at::where(count > 1, momentum, at::zeros_like(momentum));
  length_mean.lerp_(mean.to(length_mean.options()), weight);
  length_std.lerp_(square.sqrt().to(length_std.options()), weight);
}

SampleMargins AdaFaceLossImpl::sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) {
  const torch::NoGradGuard no_grad;
  auto [valid, lengths] = lengths_of(options, embeddings, labels, /*replacement=*/1.0, acc_dtype());
  lengths = lengths.clamp(0.001, 100.0);
  const torch::Tensor quality =
      ((lengths - length_mean) / (length_std + 1e-3) * options.h()).clamp(-1, 1).to(lengths.scalar_type());
  SampleMargins margins;
  margins.m2 = -options.margin() * quality;
  margins.m3 = options.margin() * (1 + quality);
  return margins;
}

// Nothing moves here.
void MagFaceLossImpl::advance(const torch::Tensor& embeddings, const torch::Tensor& labels) {
  if (!std::exchange(seen_, true)) {
    const auto [valid, lengths] = lengths_of(options, embeddings, labels, options.a_min(), acc_dtype());
    warn_of_unit_lengths("MagFaceLoss", valid.logical_and(at::isfinite(lengths)), lengths);
  }
}

SampleMargins MagFaceLossImpl::sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) {
  const auto [valid, lengths] = lengths_of(options, embeddings, labels, options.a_min(), acc_dtype());
  const double slope = (options.m_max() - options.m_min()) / (options.a_max() - options.a_min());
  SampleMargins margins;
  margins.m2 = options.m_min() + slope * (lengths.clamp(options.a_min(), options.a_max()) - options.a_min());
  return margins;
}

torch::Tensor MagFaceLossImpl::row_penalty(const torch::Tensor& embeddings, const torch::Tensor& labels) {
  auto [valid, lengths] = lengths_of(options, embeddings, labels, options.a_min(), acc_dtype());
  lengths = lengths.clamp(options.a_min(), options.a_max());
  const double a_max = options.a_max();
  return options.regularizer() * (lengths.reciprocal() + lengths / (a_max * a_max));
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
