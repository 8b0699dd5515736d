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

// Each argument that a C++ program forgot, by name; from every op.
TEST(Functional, AnUndefinedTensorIsNamed) {
  const Problem p;
  const torch::Tensor none;
  const auto text = [](auto call) {
    try {
      call();
    } catch (const c10::Error& error) {
      return std::string(error.what_without_backtrace());
    }
    return std::string("nothing was thrown");
  };
  const std::string end = " to be a tensor, but got none";
  const auto expect = [&](const std::string& start, auto call) {
    EXPECT_EQ(text(call).substr(0, start.size() + end.size()), start + end);
  };
  const auto every = [&](const std::string& op, auto call) {
    expect(op + ": expected input", [&] { call(none, p.weight, p.target); });
    expect(op + ": expected weight", [&] { call(p.input, none, p.target); });
    expect(op + ": expected target", [&] { call(p.input, p.weight, none); });
  };
  every("linear_margin_cross_entropy", [](const auto& x, const auto& w, const auto& y) {
    F::linear_margin_cross_entropy(x, w, y);
  });
  every("linear_margin_lse", [](const auto& x, const auto& w, const auto& y) { F::linear_margin_lse(x, w, y); });
  expect("margin_logits: expected input", [&] { F::margin_logits(none, p.weight); });
  expect("margin_logits: expected weight", [&] { F::margin_logits(p.input, none); });
  expect("margin_cross_entropy: expected cosine", [&] { F::margin_cross_entropy(none, p.target); });
  expect("margin_cross_entropy: expected target", [&] { F::margin_cross_entropy(p.input, none); });
  expect("margin_transform: expected cosine", [&] { F::margin_transform(none, torchmargin::MarginParameters()); });
  // An undefined optional is no argument at all.
  F::LinearMarginFuncOptions options;
  options.bias(none).sample_m2(none).sample_m3(none).sample_margin_weight(none);
  EXPECT_TRUE(torch::equal(
      F::linear_margin_cross_entropy(p.input, p.weight, p.target, options),
      F::linear_margin_cross_entropy(p.input, p.weight, p.target)));
}

TEST(Settings, TheLimitAndItsPlan) {
  const int64_t before = torchmargin::workspace_limit();
  EXPECT_EQ(before, torchmargin::kDefaultWorkspaceLimit);
  const torchmargin::Plan large = torchmargin::plan(64, 32, 100000);
  torchmargin::set_workspace_limit(c10::kCPU, 4 << 20);
  EXPECT_EQ(torchmargin::workspace_limit(c10::kCPU), 4 << 20);
  const torchmargin::Plan small = torchmargin::plan(64, 32, 100000);
  EXPECT_TRUE(large.fits && small.fits);
  EXPECT_EQ(large.kept_classes, 100000);
  EXPECT_LT(small.kept_classes, 100000);
  EXPECT_LE(small.scratch_bytes, 4 << 20);
  EXPECT_EQ(small.workspace_limit, 4 << 20);
  EXPECT_EQ(small.operand_dtype, torch::kFloat32);
  // What the limit changes is memory, not the loss.
  const Problem p;
  torchmargin::set_workspace_limit(c10::kCPU, 4096);
  const auto tight = F::linear_margin_cross_entropy(p.input, p.weight, p.target);
  torchmargin::set_workspace_limit(c10::kCPU, before);
  EXPECT_TRUE(torch::allclose(tight, F::linear_margin_cross_entropy(p.input, p.weight, p.target), 1e-12, 1e-12));
  torchmargin::set_workspace_limit(c10::kCPU, 1);
  EXPECT_FALSE(torchmargin::plan(64, 32, 100000).fits);
  EXPECT_THROW(F::linear_margin_cross_entropy(p.input, p.weight, p.target), c10::Error);
  torchmargin::set_workspace_limit(c10::kCPU, before);
  EXPECT_THROW(torchmargin::set_workspace_limit(c10::kCPU, 0), c10::ValueError);
  EXPECT_THROW(torchmargin::set_workspace_limit(c10::DeviceType::XLA, 1 << 20), c10::ValueError);
  EXPECT_THROW(torchmargin::plan(4, 0, 6), c10::ValueError);
  EXPECT_THROW(torchmargin::plan(4, 5, 6, torch::kInt64), c10::ValueError);
  EXPECT_THROW(torchmargin::plan(4, 5, 6, torch::kFloat64, c10::kCPU, torch::kFloat16), c10::ValueError);
}

TEST(Functional, VersionsAreThoseOfTheBuild) {
  EXPECT_STREQ(torchmargin::version(), TORCHMARGIN_VERSION);
  EXPECT_STREQ(torchmargin::built_for_torch(), TORCH_VERSION);
}

} // namespace
