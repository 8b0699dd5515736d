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
TORCHMARGIN_DEFINE_LOSS(ClassMarginLossImpl, SubCenterArcFaceLoss)
TORCHMARGIN_DEFINE_LOSS(OptionsLossImpl, CurricularFaceLoss)
TORCHMARGIN_DEFINE_LOSS(OptionsLossImpl, MVSoftmaxLoss)
TORCHMARGIN_DEFINE_LOSS(OptionsLossImpl, InterTopKArcFaceLoss)
TORCHMARGIN_DEFINE_LOSS(OptionsLossImpl, SphereFace2Loss)
TORCHMARGIN_DEFINE_LOSS(OptionsLossImpl, UniFaceLoss)
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

SampleMargins SubCenterArcFaceLossImpl::sample_margins(
    const torch::Tensor& /*embeddings*/,
    const torch::Tensor& labels) {
  SampleMargins margins;
  margins.m2 = margins_of(labels);
  return margins;
}

torch::Tensor SubCenterArcFaceLossImpl::center_counts(const torch::Tensor& embeddings, const torch::Tensor& labels)
    const {
  const torch::NoGradGuard no_grad;
  const int64_t centers = options.sub_centers();
  TORCH_CHECK(
      embeddings.dim() == 2 && embeddings.size(1) == options.in_features() && labels.dim() == 1 &&
          labels.size(0) == embeddings.size(0) && labels.scalar_type() == at::kLong,
      "center_counts: expected embeddings [B, ", options.in_features(), "] and labels [B] int64, but got ",
      embeddings.sizes(), " and ", labels.sizes());
  const torch::Tensor counted = labels.ne(options.ignore_index()).logical_and(embeddings.isfinite().all(1));
  const torch::Tensor rows = counted.nonzero().squeeze(1);
  torch::Tensor counts = at::zeros({options.num_classes() * centers}, labels.options());
  for (const torch::Tensor& part : rows.split(1024)) { // [n, K, D] at a time
    const torch::Tensor own = labels.index_select(0, part);
    TORCH_CHECK_INDEX(
        own.numel() == 0 || (own.min().item<int64_t>() >= 0 && own.max().item<int64_t>() < options.num_classes()),
        "center_counts: expected labels in [0, ", options.num_classes(), ") or ignore_index");
    const torch::Tensor x = embeddings.index_select(0, part).to(at::kDouble);
    const torch::Tensor w = weight.view({options.num_classes(), centers, -1}).index_select(0, own).to(at::kDouble);
    const torch::Tensor lengths = at::linalg_vector_norm(w, 2, at::IntArrayRef{2}).clamp_min(1e-12);
    const torch::Tensor nearest = (at::einsum("nd,nkd->nk", {x, w}) / lengths).argmax(1);
    counts.index_add_(0, own * centers + nearest, at::ones_like(own));
  }
  return counts.view({options.num_classes(), centers});
}

torch::Tensor SubCenterArcFaceLossImpl::dominant_centers(const torch::Tensor& counts) const {
  TORCH_CHECK(
      counts.dim() == 2 && counts.size(0) == options.num_classes() && counts.size(1) == options.sub_centers(),
      "dominant_centers: expected counts of shape [", options.num_classes(), ", ", options.sub_centers(), "], but got ",
      counts.sizes());
  // NB: argmax names any of several that are equal.
  const torch::Tensor largest = counts.eq(counts.amax(1, /*keepdim=*/true)).to(at::kInt);
  return std::get<0>(largest.cummax(1)).eq(0).sum(1);
}

void CurricularFaceLossImpl::reset() {
  OptionsLossImpl::reset();
  t = register_buffer("t", at::zeros({}));
}

// Over the rows that count; without any it stays.
void CurricularFaceLossImpl::advance(const torch::Tensor& embeddings, const torch::Tensor& labels) {
  const torch::Tensor cosine = target_angle(embeddings, labels).to(at::kDouble).cos();
  const torch::Tensor counted = labels.ne(options.ignore_index()).logical_and(cosine.isfinite());
  const torch::Tensor sum = at::where(counted, cosine, at::zeros({}, cosine.options())).sum();
  const torch::Tensor count = counted.sum().to(at::kDouble);
  const torch::Tensor before = t.to(at::kDouble);
  const torch::Tensor mean = at::where(count.gt(0), sum / count.clamp_min(1.0), before);
  t.copy_(before.lerp(mean, number(options.momentum(), before)));
}

HardNegatives CurricularFaceLossImpl::negatives(const torch::Tensor& /*embeddings*/, const torch::Tensor& /*labels*/) {
  const torch::Tensor wide = t.to(at::kDouble);
  return {std::nullopt, at::stack({at::ones_like(wide), wide, at::zeros_like(wide)})};
}

SampleMargins MVSoftmaxLossImpl::sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) {
  SampleMargins margins;
  if (options.kind() == "am") {
    constexpr double kHalfPi = 1.57079632679489661923;
    const torch::Tensor angle = target_angle(embeddings, labels);
    margins.margin_weight = at::where(angle.isnan(), angle, angle.lt(kHalfPi).to(angle.scalar_type()));
  }
  return margins;
}

HardNegatives MVSoftmaxLossImpl::negatives(const torch::Tensor& embeddings, const torch::Tensor& /*labels*/) {
  const torch::Tensor t = number(options.t(), embeddings);
  return {std::nullopt, at::stack({at::zeros_like(t), 1 + t, t})};
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
