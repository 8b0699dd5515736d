// The options of every loss in the one form that the base calls the op with, checked, and their numbers by name.
#pragma once

#include <vector>

#include "torchmargin/margin_loss.h"
#include "torchmargin/options.h"

namespace torchmargin::nn {

// c10::Error if a loss with these options could not be called: the op's own checks, on an empty batch.
void check_options(const MarginLossOptions& options);

// How a loss that is one against all calls its op, without a bias.
functional::LinearMarginBinaryCrossEntropyFuncOptions binary_options(const MarginLossOptions& options);

// class_margins [C] as C numbers in radians or cosines: finite and at most pi in size.
void check_class_margins(const torch::Tensor& margins);

// class_weight [C], where there is one: finite and not negative.
void check_class_weight_values(const torch::Tensor& class_weight);

#define TORCHMARGIN_DECLARE_OPTIONS(Name)                   \
  MarginLossOptions margin_options(const Name##Options& o); \
  std::vector<SavedNumber> numbers_of(Name##Options& o)
TORCHMARGIN_DECLARE_OPTIONS(SoftmaxLoss);
TORCHMARGIN_DECLARE_OPTIONS(ModifiedSoftmaxLoss);
TORCHMARGIN_DECLARE_OPTIONS(NormalizedSoftmaxLoss);
TORCHMARGIN_DECLARE_OPTIONS(SphereFaceLoss);
TORCHMARGIN_DECLARE_OPTIONS(LargeMarginSoftmaxLoss);
TORCHMARGIN_DECLARE_OPTIONS(CosFaceLoss);
TORCHMARGIN_DECLARE_OPTIONS(ArcFaceLoss);
TORCHMARGIN_DECLARE_OPTIONS(CombinedMarginLoss);
TORCHMARGIN_DECLARE_OPTIONS(AdaFaceLoss);
TORCHMARGIN_DECLARE_OPTIONS(MagFaceLoss);
TORCHMARGIN_DECLARE_OPTIONS(ElasticFaceLoss);
TORCHMARGIN_DECLARE_OPTIONS(SubCenterArcFaceLoss);
TORCHMARGIN_DECLARE_OPTIONS(CurricularFaceLoss);
TORCHMARGIN_DECLARE_OPTIONS(MVSoftmaxLoss);
TORCHMARGIN_DECLARE_OPTIONS(InterTopKArcFaceLoss);
TORCHMARGIN_DECLARE_OPTIONS(SphereFace2Loss);
TORCHMARGIN_DECLARE_OPTIONS(UniFaceLoss);
#undef TORCHMARGIN_DECLARE_OPTIONS

} // namespace torchmargin::nn
