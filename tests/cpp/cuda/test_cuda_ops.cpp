// The ops on a GPU against the same ops on the CPU: every kernel, every dtype, odd sizes, tails, several chunks. Small
// enough for compute-sanitizer. Skipped where there is no GPU or no CUDA kernel.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torchmargin/torchmargin.h>

#include <vector>

#include "linear_rounding.h"

namespace {

namespace F = torchmargin::nn::functional;
namespace presets = torchmargin::presets;
using namespace torchmargin::testing;

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

// Calls compare(got, expected) with the op's results and gradients on a GPU and on the CPU.
template <typename Op, typename Compare>
void expect_agreement(const Tensors& leaves, Op op, Compare compare) {
  const Tensors expected = results_and_gradients(leaves, torch::kCPU, op);
  const Tensors got = results_and_gradients(leaves, torch::kCUDA, op);
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i].scalar_type(), expected[i].scalar_type());
  }
  compare(got, expected);
}

// A GPU's products read what its plan says, the CPU's what acc holds; each may be off by its own rounding.
struct BothRoundings {
  LinearRounding gpu, cpu;

  explicit BothRoundings(const torchmargin::LinearProblem& p)
      : gpu(p,
            torchmargin::choose_operands(
                torchmargin::gpu_traits(torchmargin::kSomeGpu),
                p.input.scalar_type(),
                p.compute_dtype)),
        cpu(p, torchmargin::wide_operands(p.input.scalar_type())) {}

  template <typename Bound>
  torch::Tensor sum(Bound bound) const {
    return bound(gpu) + bound(cpu);
  }
  // The gradients that follow `results` results.
  template <typename Bounds>
  void expect_gradients(const Tensors& got, const Tensors& expected, size_t results, Bounds bounds) const {
    const auto of_gpu = bounds(gpu);
    const auto of_cpu = bounds(cpu);
    for (size_t i = results; i < got.size(); ++i) {
      const size_t k = i - results;
      expect_gradient(got[i], expected[i], of_gpu[k] + of_cpu[k], static_cast<int64_t>(k), /*roundings=*/2);
    }
  }
};

torchmargin::LinearProblem problem_of(const Tensors& leaves, const torchmargin::LossForm& form) {
  torchmargin::LinearProblem p;
  p.input = leaves[0];
  p.weight = leaves[1];
  p.target = leaves[2];
  p.margins.parameters = form.margin;
  p.normalize_input = form.normalize_input;
  p.normalize_weight = form.normalize_weight;
  return p;
}

// How far two roundings of a number to `dtype` are apart.
torch::Tensor stored(const torch::Tensor& size, at::ScalarType dtype) {
  return 2 * unit_roundoff_of(dtype) * size;
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
        const auto op = [&](const Tensors& t) {
          F::LinearMarginFuncOptions linear(form);
          if (with_bias) {
            linear.bias(t[3]);
          }
          const auto options = F::LinearMarginCrossEntropyFuncOptions(linear).label_smoothing(0.1).reduction("sum");
          return Tensors{F::linear_margin_cross_entropy(t[0], t[1], t[2], options)};
        };
        torchmargin::LinearProblem problem = problem_of(leaves, form);
        if (with_bias) {
          problem.bias = leaves[3];
        }
        const BothRoundings rounding(problem);
        torch::Tensor upstream = torch::ones({size.rows}, torch::kFloat64);
        upstream[0] = 0.0; // ignored
        expect_agreement(leaves, op, [&](const Tensors& got, const Tensors& expected) {
          const torch::Tensor rows = rounding.sum([](const LinearRounding& r) { return r.loss(0.1); });
          // A sum of float64 rows, stored once.
          const torch::Tensor loss = widened(expected[0]).abs();
          const torch::Tensor summed = stored(loss, at::kDouble) * size.rows + stored(loss, got[0].scalar_type());
          expect_vector(got[0], expected[0], (rows * upstream).sum() + summed, "loss");
          rounding.expect_gradients(
              got, expected, 1, [&](const LinearRounding& r) { return r.loss_gradients(upstream, 0.1); });
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
      const auto op = [&](const Tensors& t) {
        const auto options = F::LinearMarginFuncOptions(form).compute_dtype(at::kBFloat16);
        const F::LinearMarginLse lse = F::linear_margin_lse(t[0], t[1], t[2], options);
        return Tensors{lse.target_logit, lse.logit_sum};
      };
      torchmargin::LinearProblem problem = problem_of(leaves, form);
      problem.compute_dtype = at::kBFloat16;
      const BothRoundings rounding(problem);
      expect_agreement(leaves, op, [&](const Tensors& got, const Tensors& expected) {
        const auto store = [&](size_t i) { return stored(widened(expected[i]).abs(), got[i].scalar_type()); };
        expect_vector(
            got[0], expected[0], store(0) + rounding.sum([](const LinearRounding& r) { return r.target(); }), "target");
        expect_vector(
            got[1], expected[1], store(1) + rounding.sum([](const LinearRounding& r) { return r.total(); }), "sum");
        const torch::Tensor ones = torch::ones({size.rows}, torch::kFloat64);
        rounding.expect_gradients(got, expected, 2, [&](const LinearRounding& r) {
          return r.gradients(/*others=*/0 * ones, /*own=*/ones, /*total=*/ones, /*factor_error=*/0 * ones);
        });
      });
    }
  }
}

torch::Tensor call(const char* name, torch::jit::Stack stack) {
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(stack);
  return stack[0].toTensor();
}

// psi of all cosines, the sum of losses smoothed by a tenth, and the gradient of both (tests/python/rounding.py). Both
// ways round: 2 u.
void expect_cosine_results(
    const torch::Tensor& leaf,
    const torch::Tensor& target,
    double scale,
    double m2,
    double m3,
    const Tensors& got,
    const Tensors& expected) {
  const at::ScalarType dtype = leaf.scalar_type();
  const torch::Tensor cosine = widened(leaf);
  const auto classes = static_cast<double>(cosine.size(1));
  const double smoothing = 0.1;
  const double margin = 2 + 2 + 2 * m2 + m3; // bounds psi, its slopes and its angle
  // Some ten roundings make an angle of at most pi, and psi of it; the slope is psi's to the angle over the sine.
  const double psi = 48 * 0x1p-52 * margin;
  const torch::Tensor sine = (1 - cosine.square()).sqrt();
  expect_vector(got[0], expected[0], psi + stored(widened(expected[0]).abs(), dtype), "psi");
  // A log-sum-exp: at most 1024 terms are added in float32.
  const double rounds = dtype == at::kDouble ? 0x1p-52 : 2 * 0x1p-24;
  const torch::Tensor size = scale * cosine.abs().amax(1);
  const torch::Tensor rows = rounds * ((dtype == at::kDouble ? classes : std::min(classes, 1024.0)) + 8 * (1 + size)) +
      scale * psi + 8 * 0x1p-52 * (1 + margin * scale);
  const torch::Tensor loss = widened(expected[1]).abs();
  const torch::Tensor smoothed = rows + smoothing * (rows + 0x1p-52 * classes * size);
  expect_vector(
      got[1], expected[1],
      smoothed.sum() + stored(loss, at::kDouble) * cosine.size(0) + stored(loss, got[1].scalar_type()), "loss");
  // The own class has psi's slope, the others a softmax weight; each of two gradients is stored, and their sum.
  const torch::Tensor is_own = torch::arange(cosine.size(1)).eq(target.unsqueeze(1)).to(torch::kFloat64);
  const torch::Tensor softmax = torch::nan_to_num(torch::softmax(
      (scale * cosine).masked_fill(is_own.to(torch::kBool), -std::numeric_limits<double>::infinity()), 1));
  const torch::Tensor others = softmax + smoothing / classes;
  const torch::Tensor own = (1 + smoothing) * is_own;
  const torch::Tensor error =
      scale * (3 * rows.unsqueeze(1) * others + own * (margin * rows.unsqueeze(1) + psi / sine)) + psi / sine;
  const torch::Tensor sizes = scale * (others + own * margin / sine) + margin / sine;
  expect_vector(got[2], expected[2], error + 2 * stored(sizes, dtype), "grad_cosine");
}

TEST_F(Cuda, OpsOnCosinesAgreeWithTheCpu) {
  const std::string none = "none";
  const std::string exact = "exact";
  for (const Sizes& size : kSizes) {
    for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16}) {
      const Tensors leaves{
          (1.8 * torch::rand({size.rows, size.classes}) - 0.9).to(dtype), torch::randint(0, size.classes, {size.rows})};
      const auto op = [&](const Tensors& t) {
        return Tensors{
            call("torchmargin::margin_transform", {t[0], 1.0, 0.3, 0.1, none, 1.0, exact}),
            call(
                "torchmargin::margin_cross_entropy",
                {t[0], t[1], 16.0, 1.0, 0.3, 0.1, c10::IValue(), c10::IValue(), c10::IValue(), none, 1.0, exact, 0.1,
                 int64_t{-100}, std::string("sum")})};
      };
      expect_agreement(leaves, op, [&](const Tensors& got, const Tensors& expected) {
        expect_cosine_results(leaves[0], leaves[1], /*scale=*/16.0, /*m2=*/0.3, /*m3=*/0.1, got, expected);
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
