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

// What rounding in float64 does to losses, log-sum-exps and target logits of D features and C classes, on each of two
// ways: unit vectors take D + 8 roundings each, a product D and four, an angle four times a unit vector and 16 (twice
// for its cosine and psi), a sum of C exponentials C, and two functions and two sums of their results 4 each.
double loss_rounding(double logit_size, int64_t features, int64_t classes) {
  const int64_t logit = 3 * features + 20;
  const int64_t angle = 4 * (features + 8) + 16;
  return 2 * 0x1p-53 * (1 + logit_size) * static_cast<double>(logit + 2 * angle + classes + 16);
}

// The largest logit of such operands without normalisation.
double largest_logit(const torch::Tensor& input, const torch::Tensor& weight) {
  return (input.norm(2, 1).max() * weight.norm(2, 1).max()).item<double>();
}

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
  const double rounding = loss_rounding(16.0 * 1.35, 6, 21);
  EXPECT_NEAR(loss.item<double>(), expected.item<double>(), rounding);
  const auto ours = torch::autograd::grad({loss}, {p.input, p.weight});
  const auto theirs = torch::autograd::grad({expected}, {p.input, p.weight});
  // A softmax weight has twice a loss's error relative to itself. It and the target's 1 are times scale over a length
  // and a unit vector, whose tangent plane doubles that; 9 rows' mean adds at most as much as one has.
  const double unit = 2 * 0x1p-53 * (4 * (6 + 8) + 16 + 9);
  for (size_t i = 0; i < 2; ++i) {
    const double length = (i == 0 ? p.input : p.weight).norm(2, 1).min().item<double>();
    EXPECT_LT((ours[i] - theirs[i]).abs().max().item<double>(), 2 * 2 * 16.0 / length * (2 * rounding + unit));
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
  const double size = largest_logit(p.input, p.weight) + bias.abs().max().item<double>();
  const double rounding = loss_rounding(size, 6, 21);
  EXPECT_LT((lse - logits.logsumexp(1)).abs().max().item<double>(), rounding);
  EXPECT_LT((result.logit_sum - logits.sum(1)).abs().max().item<double>(), 21 * rounding);
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
  // Smoothing adds a tenth of the target's logit and of the mean of all.
  const double rounding = loss_rounding(largest_logit(p.input, p.weight), 6, 21);
  EXPECT_LT((loss - expected).abs().max().item<double>(), 1.2 * rounding);
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
  const auto roomy = F::linear_margin_cross_entropy(p.input, p.weight, p.target);
  EXPECT_NEAR(tight.item<double>(), roomy.item<double>(), loss_rounding(/*logit_size=*/1.0, 6, 21)); // cosines
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
