// The C++ front door: values against a plain LibTorch composition, gradients, errors.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torchmargin/torchmargin.h>

#include <cmath>

namespace {

namespace F = torchmargin::nn::functional;
namespace presets = torchmargin::presets;

struct Problem {
  torch::Tensor input = torch::randn({9, 6}, torch::kFloat64).requires_grad_();
  torch::Tensor weight = torch::randn({21, 6}, torch::kFloat64).requires_grad_();
  torch::Tensor target = torch::randint(0, 21, {9});
};

torch::Tensor eager_cosface(const Problem& p, double scale, double m3) {
  auto cosine = torch::nn::functional::linear(
      torch::nn::functional::normalize(p.input), torch::nn::functional::normalize(p.weight));
  auto margin = m3 * torch::one_hot(p.target, p.weight.size(0)).to(torch::kFloat64);
  return torch::nn::functional::cross_entropy(scale * (cosine - margin), p.target);
}

TEST(Functional, CosFaceMatchesEagerInValueAndGradient) {
  torch::manual_seed(1);
  const Problem p;
  const auto loss = F::linear_margin_cross_entropy(p.input, p.weight, p.target, presets::cosface(16.0, 0.35));
  const auto expected = eager_cosface(p, 16.0, 0.35);
  EXPECT_NEAR(loss.item<double>(), expected.item<double>(), 1e-12);
  const auto ours = torch::autograd::grad({loss}, {p.input, p.weight});
  const auto theirs = torch::autograd::grad({expected}, {p.input, p.weight});
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_LT((ours[i] - theirs[i]).abs().max().item<double>(), 1e-11); // gradients near 16
  }
}

TEST(Functional, LseAndOptions) {
  torch::manual_seed(2);
  const Problem p;
  const auto bias = torch::randn({21}, torch::kFloat64).requires_grad_();
  const auto options = F::LinearMarginFuncOptions(presets::softmax()).bias(bias);
  const F::LinearMarginLse result = F::linear_margin_lse(p.input, p.weight, p.target, options);
  const auto logits = torch::nn::functional::linear(p.input, p.weight, bias);
  const auto lse = torch::logaddexp(result.other_lse, result.target_logit);
  EXPECT_LT((lse - logits.logsumexp(1)).abs().max().item<double>(), 1e-12);
  EXPECT_LT((result.logit_sum - logits.sum(1)).abs().max().item<double>(), 1e-12);
  EXPECT_FALSE(result.target_angle.requires_grad());
  EXPECT_TRUE(torch::autograd::grad({lse.sum()}, {bias})[0].defined());
}

TEST(Functional, ReductionSmoothingAndIgnoredRows) {
  torch::manual_seed(3);
  Problem p;
  p.target[4] = -1;
  const auto options = F::LinearMarginCrossEntropyFuncOptions(F::LinearMarginFuncOptions(presets::softmax()))
                           .label_smoothing(0.1)
                           .ignore_index(-1)
                           .reduction("none");
  const auto loss = F::linear_margin_cross_entropy(p.input, p.weight, p.target, options);
  namespace nnF = torch::nn::functional;
  const auto expected = nnF::cross_entropy(
      nnF::linear(p.input, p.weight), p.target,
      nnF::CrossEntropyFuncOptions().label_smoothing(0.1).ignore_index(-1).reduction(torch::kNone));
  EXPECT_LT((loss - expected).abs().max().item<double>(), 1e-12);
}

TEST(Functional, BadInputThrowsC10ErrorWithTheText) {
  const Problem p;
  try {
    F::linear_margin_cross_entropy(p.input, torch::randn({21, 5}, torch::kFloat64), p.target);
    FAIL() << "a wrong shape was accepted";
  } catch (const c10::Error& error) {
    EXPECT_NE(
        std::string(error.what_without_backtrace())
            .find("linear_margin_cross_entropy: expected weight to have shape [C, 6], but got [21, 5]"),
        std::string::npos)
        << error.what();
  }
}

TEST(Functional, VersionsAreThoseOfTheBuild) {
  EXPECT_STREQ(torchmargin::version(), TORCHMARGIN_VERSION);
  EXPECT_STREQ(torchmargin::built_for_torch(), TORCH_VERSION);
}

} // namespace
