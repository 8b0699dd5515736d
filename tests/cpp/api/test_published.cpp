// The numbers that the published losses come with: options, modules and presets have those of the table in presets.h.
#include "api/losses.h"

namespace {

namespace published = torchmargin::published;

void expect_form(const torchmargin::LossForm& form, const torchmargin::LossForm& expected) {
  EXPECT_EQ(form.margin.scale, expected.margin.scale);
  EXPECT_EQ(form.margin.m1, expected.margin.m1);
  EXPECT_EQ(form.margin.m2, expected.margin.m2);
  EXPECT_EQ(form.margin.m3, expected.margin.m3);
  EXPECT_EQ(form.margin.extension, expected.margin.extension);
  EXPECT_EQ(form.margin.margin_weight, expected.margin.margin_weight);
  EXPECT_EQ(form.margin.margin_gradient, expected.margin.margin_gradient);
  EXPECT_EQ(form.normalize_input, expected.normalize_input);
  EXPECT_EQ(form.normalize_weight, expected.normalize_weight);
}

// A loss that was given sizes only calls the op with `expected`.
template <typename Loss>
void expect_form_of(const torchmargin::LossForm& expected) {
  SCOPED_TRACE(Loss(6, 21)->name());
  expect_form(Loss(6, 21)->margin_loss_options().form(), expected);
}

TEST(Published, ModulesHaveTheirPresets) {
  expect_form_of<nn::SoftmaxLoss>(presets::softmax());
  expect_form_of<nn::ModifiedSoftmaxLoss>(presets::modified_softmax());
  expect_form_of<nn::NormalizedSoftmaxLoss>(presets::normalized_softmax());
  expect_form_of<nn::SphereFaceLoss>(presets::sphereface());
  expect_form_of<nn::LargeMarginSoftmaxLoss>(presets::large_margin_softmax());
  expect_form_of<nn::CosFaceLoss>(presets::cosface());
  expect_form_of<nn::ArcFaceLoss>(presets::arcface());
  expect_form_of<nn::CombinedMarginLoss>(presets::combined());
  expect_form_of<nn::AdaFaceLoss>(published::form<published::AdaFace>());
  expect_form_of<nn::MagFaceLoss>(published::form<published::MagFace>());
  torchmargin::LossForm elastic = published::form<published::ElasticFace>();
  elastic.margin.m2 = published::ElasticFace::margin; // kind "arc"
  expect_form_of<nn::ElasticFaceLoss>(elastic);
  torchmargin::LossForm normalized = published::form<published::NormalizedSphereFace>();
  normalized.margin.m1 = published::NormalizedSphereFace::margin;
  expect_form(
      nn::SphereFaceLoss(nn::SphereFaceLossOptions::normalized(6, 21))->margin_loss_options().form(), normalized);
}

TEST(Published, OptionsHaveTheRestOfTheTable) {
  EXPECT_EQ(nn::SoftmaxLossOptions(6, 21).bias(), published::Softmax::bias);
  const auto expect_annealing = [](const auto& options, auto loss) {
    using Loss = decltype(loss);
    EXPECT_EQ(options.lambda_base(), Loss::lambda_base);
    EXPECT_EQ(options.lambda_gamma(), Loss::lambda_gamma);
    EXPECT_EQ(options.lambda_min(), Loss::lambda_min);
  };
  expect_annealing(nn::SphereFaceLossOptions(6, 21), published::SphereFace());
  expect_annealing(nn::SphereFaceLossOptions::normalized(6, 21), published::NormalizedSphereFace());
  expect_annealing(nn::LargeMarginSoftmaxLossOptions(6, 21), published::LargeMarginSoftmax());
  const nn::AdaFaceLossOptions adaface(6, 21);
  EXPECT_EQ(adaface.margin(), published::AdaFace::margin);
  EXPECT_EQ(adaface.h(), published::AdaFace::h);
  EXPECT_EQ(adaface.momentum(), published::AdaFace::momentum);
  EXPECT_EQ(nn::AdaFaceLoss(6, 21)->length_mean.item<double>(), published::AdaFace::length_mean);
  EXPECT_EQ(nn::AdaFaceLoss(6, 21)->length_std.item<double>(), published::AdaFace::length_std);
  const nn::MagFaceLossOptions magface(6, 21);
  EXPECT_EQ(magface.a_min(), published::MagFace::a_min);
  EXPECT_EQ(magface.a_max(), published::MagFace::a_max);
  EXPECT_EQ(magface.m_min(), published::MagFace::m_min);
  EXPECT_EQ(magface.m_max(), published::MagFace::m_max);
  EXPECT_EQ(magface.regularizer(), published::MagFace::regularizer);
  EXPECT_EQ(nn::ElasticFaceLossOptions(6, 21).kind(), published::ElasticFace::kind);
  EXPECT_EQ(nn::ElasticFaceLossOptions(6, 21).deviation(), published::ElasticFace::deviation);
}

} // namespace
