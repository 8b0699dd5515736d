/// @file
/// The published losses as LibTorch modules, with the class weights inside:
///
///   torchmargin::nn::ArcFaceLoss loss(torchmargin::nn::ArcFaceLossOptions(512, 10575).scale(64).margin(0.5));
///   loss->forward(embeddings, labels).backward();
///
/// Formulas: theta is the angle between an embedding x and the weight w of its class, s the scale; the other logits are
/// the same without the margin. Parameters and buffers have the names of the Python modules': see state_dict.h. The
/// options are live, and their numbers are saved with the weight: see margin_loss.h.
#pragma once

#include <torch/nn/pimpl.h>

#include "torchmargin/export.h"
#include "torchmargin/margin_loss.h"
#include "torchmargin/options.h"

namespace torchmargin::nn {

/// A loss that is made of an options struct of its own.
template <typename Derived, typename Options>
class TORCHMARGIN_API OptionsLossImpl : public MarginLossImpl<Derived> {
 public:
  explicit OptionsLossImpl(const Options& options_);
  MarginLossOptions margin_loss_options() const override;

  Options options;

 protected:
  std::vector<SavedNumber> numbers() override;

 private:
  using MarginLossImpl<Derived>::own_options; // `options` are
};

#define TORCHMARGIN_LOSS_CONSTRUCTORS(Name)                                                                     \
  Name##Impl(int64_t in_features, int64_t num_classes) : Name##Impl(Name##Options(in_features, num_classes)) {} \
  explicit Name##Impl(const Name##Options& options_)

/// logit s x.w + b: nothing is normalised.
class TORCHMARGIN_API SoftmaxLossImpl : public OptionsLossImpl<SoftmaxLossImpl, SoftmaxLossOptions> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(SoftmaxLoss);
};
TORCH_MODULE(SoftmaxLoss);

/// s |x| cos(theta): Liu et al., "SphereFace", CVPR 2017 (arXiv:1704.08063), eq. 4.
class TORCHMARGIN_API ModifiedSoftmaxLossImpl
    : public OptionsLossImpl<ModifiedSoftmaxLossImpl, ModifiedSoftmaxLossOptions> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(ModifiedSoftmaxLoss);
};
TORCH_MODULE(ModifiedSoftmaxLoss);

/// s cos(theta): Wang et al., "NormFace", ACM MM 2017 (arXiv:1704.06369).
class TORCHMARGIN_API NormalizedSoftmaxLossImpl
    : public OptionsLossImpl<NormalizedSoftmaxLossImpl, NormalizedSoftmaxLossOptions> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(NormalizedSoftmaxLoss);
};
TORCH_MODULE(NormalizedSoftmaxLoss);

/// A margin that grows during training: (lambda cos(theta) + psi(margin theta)) / (1 + lambda). `step` is a 0-dim int64
/// buffer that each training forward advances first.
template <typename Derived, typename Options>
class TORCHMARGIN_API AnnealedMarginLossImpl : public OptionsLossImpl<Derived, Options> {
 public:
  using OptionsLossImpl<Derived, Options>::OptionsLossImpl;
  void reset() override;
  /// The present lambda, 0-dim float64.
  torch::Tensor annealing_lambda() const;

  torch::Tensor step;

 protected:
  void advance(const torch::Tensor& embeddings, const torch::Tensor& labels) override;
  SampleMargins sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) override;
};

/// A-Softmax, |x| psi(margin theta): Liu et al., "SphereFace", CVPR 2017 (arXiv:1704.08063).
class TORCHMARGIN_API SphereFaceLossImpl : public AnnealedMarginLossImpl<SphereFaceLossImpl, SphereFaceLossOptions> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(SphereFaceLoss);
};
TORCH_MODULE(SphereFaceLoss);

/// L-Softmax, |x| |w| psi(margin theta): Liu et al., ICML 2016 (arXiv:1612.02295).
class TORCHMARGIN_API LargeMarginSoftmaxLossImpl
    : public AnnealedMarginLossImpl<LargeMarginSoftmaxLossImpl, LargeMarginSoftmaxLossOptions> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(LargeMarginSoftmaxLoss);
};
TORCH_MODULE(LargeMarginSoftmaxLoss);

/// A loss whose margin may be one of each class: options.class_margins [C] then stands for options.margin.
template <typename Derived, typename Options>
class TORCHMARGIN_API ClassMarginLossImpl : public OptionsLossImpl<Derived, Options> {
 public:
  using OptionsLossImpl<Derived, Options>::OptionsLossImpl;
  MarginLossOptions margin_loss_options() const override;

 protected:
  /// The margins of the labels' classes [B] float64, or undefined; a label that is no class has the nearest one's.
  std::optional<torch::Tensor> margins_of(const torch::Tensor& labels);

 private:
  mutable torch::Tensor checked_; // the class_margins whose values were looked at, and their version then
  mutable int64_t checked_version_ = 0;
};

/// s (cos(theta) - margin): Wang et al., "CosFace", CVPR 2018 (arXiv:1801.09414).
class TORCHMARGIN_API CosFaceLossImpl : public ClassMarginLossImpl<CosFaceLossImpl, CosFaceLossOptions> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(CosFaceLoss);

 protected:
  SampleMargins sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) override;
};
TORCH_MODULE(CosFaceLoss);

/// s cos(theta + margin): Deng et al., "ArcFace", CVPR 2019 (arXiv:1801.07698).
class TORCHMARGIN_API ArcFaceLossImpl : public ClassMarginLossImpl<ArcFaceLossImpl, ArcFaceLossOptions> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(ArcFaceLoss);

 protected:
  SampleMargins sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) override;
};
TORCH_MODULE(ArcFaceLoss);

/// s (cos(m1 theta + m2) - m3): the same paper, eq. 4.
class TORCHMARGIN_API CombinedMarginLossImpl
    : public OptionsLossImpl<CombinedMarginLossImpl, CombinedMarginLossOptions> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(CombinedMarginLoss);
};
TORCH_MODULE(CombinedMarginLoss);

/// s (cos(theta - margin q) - margin (1 + q)), q in [-1, 1] from the embedding's length: Kim et al., "AdaFace", CVPR
/// 2022 (arXiv:2204.00964). The buffers are the running mean and deviation of the batches' lengths; lengths that are
/// not finite do not count.
class TORCHMARGIN_API AdaFaceLossImpl : public OptionsLossImpl<AdaFaceLossImpl, AdaFaceLossOptions> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(AdaFaceLoss);
  void reset() override;

  torch::Tensor length_mean, length_std;

 protected:
  void advance(const torch::Tensor& embeddings, const torch::Tensor& labels) override;
  SampleMargins sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) override;

 private:
  bool seen_ = false;
};
TORCH_MODULE(AdaFaceLoss);

/// s cos(theta + m(a)), a the embedding's length, plus regularizer (1/a + a/a_max^2): Meng et al., "MagFace", CVPR 2021
/// (arXiv:2103.06627).
class TORCHMARGIN_API MagFaceLossImpl : public OptionsLossImpl<MagFaceLossImpl, MagFaceLossOptions> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(MagFaceLoss);

 protected:
  void advance(const torch::Tensor& embeddings, const torch::Tensor& labels) override;
  SampleMargins sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) override;
  torch::Tensor row_penalty(const torch::Tensor& embeddings, const torch::Tensor& labels) override;

 private:
  bool seen_ = false;
};
TORCH_MODULE(MagFaceLoss);

/// s cos(theta + m_i) or s (cos(theta) - m_i), m_i drawn in training: Boutros et al., "ElasticFace", CVPR workshops
/// 2022 (arXiv:2109.09416).
class TORCHMARGIN_API ElasticFaceLossImpl : public OptionsLossImpl<ElasticFaceLossImpl, ElasticFaceLossOptions> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(ElasticFaceLoss);

 protected:
  SampleMargins sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) override;
};
TORCH_MODULE(ElasticFaceLoss);

/// ArcFace with K centers for each class, rows j K ... j K + K - 1 of the weight, of which the nearest counts: Deng et
/// al., "Sub-center ArcFace", ECCV 2020. Noisy samples of a class gather at centers of their own.
class TORCHMARGIN_API SubCenterArcFaceLossImpl
    : public ClassMarginLossImpl<SubCenterArcFaceLossImpl, SubCenterArcFaceLossOptions> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(SubCenterArcFaceLoss);

  /// How many of these embeddings are nearest to each center of their class, [C, K] int64; ignored rows and rows that
  /// are not finite do not count. Sums over batches are those of all.
  torch::Tensor center_counts(const torch::Tensor& embeddings, const torch::Tensor& labels) const;
  /// Which center of each class most samples are nearest to, [C] int64; the first of several.
  torch::Tensor dominant_centers(const torch::Tensor& counts) const;

 protected:
  SampleMargins sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) override;
};
TORCH_MODULE(SubCenterArcFaceLoss);

/// s cos(theta + margin); another class with a cosine c above that has s c (t + c): Huang et al., "CurricularFace",
/// CVPR 2020 (arXiv:2004.00288). The buffer t is a running mean of the rows' own cosines, moved before it is used.
class TORCHMARGIN_API CurricularFaceLossImpl
    : public OptionsLossImpl<CurricularFaceLossImpl, CurricularFaceLossOptions> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(CurricularFaceLoss);
  void reset() override;

  torch::Tensor t;

 protected:
  void advance(const torch::Tensor& embeddings, const torch::Tensor& labels) override;
  HardNegatives negatives(const torch::Tensor& embeddings, const torch::Tensor& labels) override;
};
TORCH_MODULE(CurricularFaceLoss);

/// s (cos(theta) - margin), without the margin where cos(theta) <= 0, or s cos(theta + margin) where cos(theta) > 0;
/// another class with a cosine c above cos(theta) - margin (cos(theta + margin)) has s ((1 + t) c + t): Wang et al.,
/// "MV-Softmax", AAAI 2020 (arXiv:1912.00833).
class TORCHMARGIN_API MVSoftmaxLossImpl : public OptionsLossImpl<MVSoftmaxLossImpl, MVSoftmaxLossOptions> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(MVSoftmaxLoss);

 protected:
  SampleMargins sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) override;
  HardNegatives negatives(const torch::Tensor& embeddings, const torch::Tensor& labels) override;
};
TORCH_MODULE(MVSoftmaxLoss);

/// Sub-center ArcFace whose hardest other classes of each row have s cos(max(theta_j - hardest_margin, 0)): Zhao et
/// al., ICASSP 2022 (arXiv:2110.05042).
class TORCHMARGIN_API InterTopKArcFaceLossImpl
    : public OptionsLossImpl<InterTopKArcFaceLossImpl, InterTopKArcFaceLossOptions> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(InterTopKArcFaceLoss);
};
TORCH_MODULE(InterTopKArcFaceLoss);

/// One against all: Wen et al., "SphereFace2", ICLR 2022 (arXiv:2108.01513). The bias is 0-dim.
class TORCHMARGIN_API SphereFace2LossImpl : public OptionsLossImpl<SphereFace2LossImpl, SphereFace2LossOptions> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(SphereFace2Loss);
};
TORCH_MODULE(SphereFace2Loss);

/// One against all, UniFace's unified cross-entropy: Zhou et al., ICCV 2023. The bias is 0-dim, minus the paper's, and
/// starts at -ln(10 C).
class TORCHMARGIN_API UniFaceLossImpl : public OptionsLossImpl<UniFaceLossImpl, UniFaceLossOptions> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(UniFaceLoss);
};
TORCH_MODULE(UniFaceLoss);

#undef TORCHMARGIN_LOSS_CONSTRUCTORS

} // namespace torchmargin::nn
