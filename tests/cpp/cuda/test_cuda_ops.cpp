// The ops on a GPU against the same ops on the CPU: every kernel, every dtype, odd sizes, tails, several chunks. Small
// enough for compute-sanitizer. Skipped where there is no GPU or no CUDA kernel.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torchmargin/torchmargin.h>

#include <vector>

namespace {

namespace F = torchmargin::nn::functional;
namespace presets = torchmargin::presets;

struct Sizes {
  int64_t rows, features, classes;
};
constexpr Sizes kSizes[] = {{1, 1, 1}, {5, 7, 33}, {33, 70, 300}, {40, 64, 2120}};

class Cuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!torch::cuda::is_available()) {
      GTEST_SKIP() << "there is no GPU here";
    }
    torch::manual_seed(1);
  }
};

using Tensors = std::vector<torch::Tensor>;

// The leaves on a device and, after `op`, its results and the gradients of a sum of them.
template <typename Op>
Tensors results_and_gradients(const Tensors& leaves, torch::Device device, Op op) {
  Tensors moved;
  for (const torch::Tensor& leaf : leaves) {
    moved.push_back(leaf.to(device).detach().requires_grad_(leaf.is_floating_point()));
  }
  Tensors results = op(moved);
  torch::Tensor total = torch::zeros({}, torch::dtype(torch::kFloat64).device(device));
  for (const torch::Tensor& result : results) {
    if (result.requires_grad()) {
      total = total + result.to(torch::kFloat64).clamp(-1e6, 1e6).sum();
    }
  }
  Tensors inputs;
  for (const torch::Tensor& leaf : moved) {
    if (leaf.requires_grad()) {
      inputs.push_back(leaf);
    }
  }
  for (const torch::Tensor& gradient : torch::autograd::grad({total}, inputs, {}, std::nullopt, false, true)) {
    if (gradient.defined()) {
      results.push_back(gradient);
    }
  }
  return results;
}

double relative_error(const torch::Tensor& got, const torch::Tensor& expected) {
  const torch::Tensor wide = expected.to(torch::kFloat64);
  return ((got.cpu().to(torch::kFloat64) - wide).norm() / (wide.norm() + 1e-6)).item<double>();
}

template <typename Op>
void expect_agreement(const Tensors& leaves, double tolerance, Op op) {
  const Tensors expected = results_and_gradients(leaves, torch::kCPU, op);
  const Tensors got = results_and_gradients(leaves, torch::kCUDA, op);
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i].scalar_type(), expected[i].scalar_type());
    EXPECT_LT(relative_error(got[i], expected[i]), tolerance) << "result " << i;
  }
}

// float64 sums in another order; float32 ones; operands of 16 bits, as of float16 unit vectors and of bfloat16 softmax
// weights.
double tolerance_of(at::ScalarType dtype, bool narrow) {
  if (narrow) {
    return dtype == at::kBFloat16 ? 4 * 0x1p-8 : 8 * 0x1p-11;
  }
  return dtype == at::kDouble ? 1e-10 : 2e-5;
}

TEST_F(Cuda, LinearLossAgreesWithTheCpu) {
  for (const Sizes& size : kSizes) {
    for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16}) {
      for (const torchmargin::LossForm& form :
           {presets::arcface(16.0, 0.3), presets::sphereface(2.0), presets::softmax()}) {
        const bool with_bias = !form.normalize_weight;
        Tensors leaves{
            torch::randn({size.rows, size.features}).to(dtype), torch::randn({size.classes, size.features}).to(dtype),
            torch::randint(0, size.classes, {size.rows}), torch::randn({size.classes}).to(dtype)};
        leaves[2][0] = -100;
        expect_agreement(leaves, tolerance_of(dtype, at::isReducedFloatingType(dtype)), [&](const Tensors& t) {
          F::LinearMarginFuncOptions linear(form);
          if (with_bias) {
            linear.bias(t[3]);
          }
          const auto options = F::LinearMarginCrossEntropyFuncOptions(linear).label_smoothing(0.1).reduction("sum");
          return Tensors{F::linear_margin_cross_entropy(t[0], t[1], t[2], options)};
        });
      }
    }
  }
}

TEST_F(Cuda, ComputeDtypeAgreesWithTheCpu) {
  for (const Sizes& size : kSizes) {
    const Tensors leaves{
        torch::randn({size.rows, size.features}), torch::randn({size.classes, size.features}),
        torch::randint(0, size.classes, {size.rows})};
    for (const torchmargin::LossForm& form : {presets::cosface(16.0, 0.2), presets::modified_softmax()}) {
      expect_agreement(leaves, tolerance_of(at::kFloat, true), [&](const Tensors& t) {
        const auto options = F::LinearMarginFuncOptions(form).compute_dtype(at::kBFloat16);
        const F::LinearMarginLse lse = F::linear_margin_lse(t[0], t[1], t[2], options);
        return Tensors{lse.target_logit, lse.logit_sum};
      });
    }
  }
}

torch::Tensor call(const char* name, torch::jit::Stack stack) {
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(stack);
  return stack[0].toTensor();
}

TEST_F(Cuda, OpsOnCosinesAgreeWithTheCpu) {
  const std::string none = "none";
  const std::string exact = "exact";
  for (const Sizes& size : kSizes) {
    for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16}) {
      const Tensors leaves{
          (1.8 * torch::rand({size.rows, size.classes}) - 0.9).to(dtype), torch::randint(0, size.classes, {size.rows})};
      expect_agreement(leaves, tolerance_of(dtype, at::isReducedFloatingType(dtype)), [&](const Tensors& t) {
        return Tensors{
            call("torchmargin::margin_transform", {t[0], 1.0, 0.3, 0.1, none, 1.0, exact}),
            call(
                "torchmargin::margin_cross_entropy",
                {t[0], t[1], 16.0, 1.0, 0.3, 0.1, c10::IValue(), c10::IValue(), c10::IValue(), none, 1.0, exact, 0.1,
                 int64_t{-100}, std::string("sum")})};
      });
    }
  }
}

TEST_F(Cuda, SameBitsTwice) {
  const Tensors leaves{torch::randn({40, 64}), torch::randn({2120, 64}), torch::randint(0, 2120, {40})};
  const auto run = [&] {
    return results_and_gradients(leaves, torch::kCUDA, [](const Tensors& t) {
      return Tensors{F::linear_margin_cross_entropy(
          t[0], t[1], t[2], F::LinearMarginFuncOptions(presets::arcface()).compute_dtype(at::kHalf))};
    });
  };
  const Tensors first = run();
  const Tensors second = run();
  for (size_t i = 0; i < first.size(); ++i) {
    EXPECT_TRUE(torch::equal(first[i], second[i]));
  }
}

} // namespace
