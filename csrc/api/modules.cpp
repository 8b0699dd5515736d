// The published losses: the margins that differ from row to row, and the state that moves. Their options as the one
// form of MarginLossOptions are in loss_options.cpp.
#include "torchmargin/modules.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/util/Exception.h>

#include <tuple>
#include <utility>

#include "api/loss_options.h"
#include "ops/adaptive_margins.h"

namespace torchmargin::nn {
namespace {

// A number of the options as the ops of adaptive_margins.h take it.
torch::Tensor number(double value, const torch::Tensor& beside) {
  return at::scalar_tensor(value, beside.options().dtype(at::kDouble));
}

// The losses that read an image's quality from the length have nothing to read once it is 1.
void warn_of_unit_lengths(const char* name, const EmbeddingLengths& batch) {
  const torch::Tensor counted = batch.counted.logical_and(at::isfinite(batch.lengths));
  const torch::Tensor away = (batch.lengths - 1).abs().gt(1e-2).logical_and(counted);
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
  length_mean = register_buffer("length_mean", at::full({}, published::AdaFace::length_mean));
  length_std = register_buffer("length_std", at::full({}, published::AdaFace::length_std));
}

// Mean and unbiased deviation of the rows that count; a batch with fewer than two changes nothing.
void AdaFaceLossImpl::advance(const torch::Tensor& embeddings, const torch::Tensor& labels) {
  const EmbeddingLengths batch = embedding_lengths(embeddings, labels, options.ignore_index(), acc_dtype());
  if (!std::exchange(seen_, true)) {
    warn_of_unit_lengths("AdaFaceLoss", batch);
  }
  const auto [mean, deviation] =
      adaface_statistics(batch, length_mean, length_std, number(options.momentum(), batch.lengths));
  length_mean.copy_(mean);
  length_std.copy_(deviation);
}

SampleMargins AdaFaceLossImpl::sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) {
  const torch::NoGradGuard no_grad;
  const torch::Tensor lengths = embedding_lengths(embeddings, labels, options.ignore_index(), acc_dtype()).lengths;
  SampleMargins margins;
  std::tie(margins.m2, margins.m3) = adaface_margins(
      lengths, length_mean, length_std, number(options.margin(), lengths), number(options.h(), lengths));
  return margins;
}

// Nothing moves here.
void MagFaceLossImpl::advance(const torch::Tensor& embeddings, const torch::Tensor& labels) {
  if (!std::exchange(seen_, true)) {
    warn_of_unit_lengths("MagFaceLoss", embedding_lengths(embeddings, labels, options.ignore_index(), acc_dtype()));
  }
}

SampleMargins MagFaceLossImpl::sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) {
  const torch::Tensor lengths = embedding_lengths(embeddings, labels, options.ignore_index(), acc_dtype()).lengths;
  SampleMargins margins;
  margins.m2 = magface_margins(
      lengths, number(options.a_min(), lengths), number(options.a_max(), lengths), number(options.m_min(), lengths),
      number(options.m_max(), lengths));
  return margins;
}

torch::Tensor MagFaceLossImpl::row_penalty(const torch::Tensor& embeddings, const torch::Tensor& labels) {
  const torch::Tensor lengths = embedding_lengths(embeddings, labels, options.ignore_index(), acc_dtype()).lengths;
  return options.regularizer() *
      magface_penalty(lengths, number(options.a_min(), lengths), number(options.a_max(), lengths));
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
