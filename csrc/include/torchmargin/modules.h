/// @file
/// The published losses as LibTorch modules, with the class weights inside:
///
///   torchmargin::nn::ArcFaceLoss loss(torchmargin::nn::ArcFaceLossOptions(512, 10575).scale(64).margin(0.5));
///   loss->forward(embeddings, labels).backward();
///
/// Formulas: theta is the angle between an embedding x and the weight w of its class, s the scale; the other logits are
/// the same without the margin. Parameters and buffers have the names of the Python modules': see state_dict.h.
#pragma once

#include <torch/nn/pimpl.h>

#include "torchmargin/export.h"
#include "torchmargin/margin_loss.h"
#include "torchmargin/options.h"

namespace torchmargin::nn {

#define TORCHMARGIN_LOSS_CONSTRUCTORS(Name)                                                                     \
  explicit Name##Impl(const Name##Options& options_);                                                           \
  Name##Impl(int64_t in_features, int64_t num_classes) : Name##Impl(Name##Options(in_features, num_classes)) {} \
  Name##Options options

/// logit s x.w + b: nothing is normalised.
class TORCHMARGIN_API SoftmaxLossImpl : public MarginLossImpl<SoftmaxLossImpl> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(SoftmaxLoss);
};
TORCH_MODULE(SoftmaxLoss);

/// s |x| cos(theta): Liu et al., "SphereFace", CVPR 2017 (arXiv:1704.08063), eq. 4.
class TORCHMARGIN_API ModifiedSoftmaxLossImpl : public MarginLossImpl<ModifiedSoftmaxLossImpl> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(ModifiedSoftmaxLoss);
};
TORCH_MODULE(ModifiedSoftmaxLoss);

/// s cos(theta): Wang et al., "NormFace", ACM MM 2017 (arXiv:1704.06369).
class TORCHMARGIN_API NormalizedSoftmaxLossImpl : public MarginLossImpl<NormalizedSoftmaxLossImpl> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(NormalizedSoftmaxLoss);
};
TORCH_MODULE(NormalizedSoftmaxLoss);

/// A margin that grows during training: (lambda cos(theta) + psi(margin theta)) / (1 + lambda). `step` is a 0-dim int64
/// buffer that each training forward advances first.
template <typename Derived>
class TORCHMARGIN_API AnnealedMarginLossImpl : public MarginLossImpl<Derived> {
 public:
  AnnealedMarginLossImpl(const MarginLossOptions& options, double base, double gamma, double minimum);
  void reset() override;
  /// The present lambda, 0-dim float64.
  torch::Tensor annealing_lambda() const;

  torch::Tensor step;

 protected:
  void begin_forward() override;
  SampleMargins sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) override;

 private:
  double base_, gamma_, minimum_;
};

/// A-Softmax, |x| psi(margin theta): Liu et al., "SphereFace", CVPR 2017 (arXiv:1704.08063).
class TORCHMARGIN_API SphereFaceLossImpl : public AnnealedMarginLossImpl<SphereFaceLossImpl> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(SphereFaceLoss);
};
TORCH_MODULE(SphereFaceLoss);

/// L-Softmax, |x| |w| psi(margin theta): Liu et al., ICML 2016 (arXiv:1612.02295).
class TORCHMARGIN_API LargeMarginSoftmaxLossImpl : public AnnealedMarginLossImpl<LargeMarginSoftmaxLossImpl> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(LargeMarginSoftmaxLoss);
};
TORCH_MODULE(LargeMarginSoftmaxLoss);

/// s (cos(theta) - margin): Wang et al., "CosFace", CVPR 2018 (arXiv:1801.09414).
class TORCHMARGIN_API CosFaceLossImpl : public MarginLossImpl<CosFaceLossImpl> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(CosFaceLoss);
};
TORCH_MODULE(CosFaceLoss);

/// s cos(theta + margin): Deng et al., "ArcFace", CVPR 2019 (arXiv:1801.07698).
class TORCHMARGIN_API ArcFaceLossImpl : public MarginLossImpl<ArcFaceLossImpl> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(ArcFaceLoss);
};
TORCH_MODULE(ArcFaceLoss);

/// s (cos(m1 theta + m2) - m3): the same paper, eq. 4.
class TORCHMARGIN_API CombinedMarginLossImpl : public MarginLossImpl<CombinedMarginLossImpl> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(CombinedMarginLoss);
};
TORCH_MODULE(CombinedMarginLoss);

/// s (cos(theta - margin q) - margin (1 + q)), q in [-1, 1] from the embedding's length: Kim et al., "AdaFace", CVPR
/// 2022 (arXiv:2204.00964). The buffers are the running mean and deviation of the batches' lengths.
class TORCHMARGIN_API AdaFaceLossImpl : public MarginLossImpl<AdaFaceLossImpl> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(AdaFaceLoss);
  void reset() override;

  torch::Tensor length_mean, length_std;

 protected:
  SampleMargins sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) override;

 private:
  void move_statistics(const torch::Tensor& valid, const torch::Tensor& lengths);
};
TORCH_MODULE(AdaFaceLoss);

/// s cos(theta + m(a)), a the embedding's length, plus regularizer (1/a + a/a_max^2): Meng et al., "MagFace", CVPR 2021
/// (arXiv:2103.06627).
class TORCHMARGIN_API MagFaceLossImpl : public MarginLossImpl<MagFaceLossImpl> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(MagFaceLoss);

 protected:
  SampleMargins sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) override;
  torch::Tensor finish(const torch::Tensor& loss, const torch::Tensor& embeddings, const torch::Tensor& labels)
      override;
};
TORCH_MODULE(MagFaceLoss);

/// s cos(theta + m_i) or s (cos(theta) - m_i), m_i drawn in training: Boutros et al., "ElasticFace", CVPR workshops
/// 2022 (arXiv:2109.09416).
class TORCHMARGIN_API ElasticFaceLossImpl : public MarginLossImpl<ElasticFaceLossImpl> {
 public:
  TORCHMARGIN_LOSS_CONSTRUCTORS(ElasticFaceLoss);

 protected:
  SampleMargins sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels) override;
};
TORCH_MODULE(ElasticFaceLoss);

#undef TORCHMARGIN_LOSS_CONSTRUCTORS

} // namespace torchmargin::nn
