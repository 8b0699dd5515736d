// The CUDA kernels, compiled for the host and run thread by thread, against the CPU's kernels:
// every kernel, every dtype, odd sizes, tails, many blocks.
#include <gtest/gtest.h>

#include <tuple>

#include "cpu/cosine_kernels.h"
#include "cpu/range_kernels.h"
#include "kernel_problem.h"
#include "kernels/launch.h"

namespace {

using namespace torchmargin;
using torchmargin::testing::dtype_of;
using torchmargin::testing::KernelProblem;
using torchmargin::testing::random_values;

// Sums of some hundred float32 terms in another order: a few units of 2^-24 times their number's root.
template <typename T>
constexpr double kTolerance = std::is_same_v<T, double> ? 1e-12 : 2e-6;

template <typename T>
void expect_close(const std::vector<T>& got, const std::vector<T>& expected, const char* what, double tolerance) {
  double size = 0.0;
  for (const T& value : expected) {
    size = std::isfinite(static_cast<double>(value)) ? std::max(size, std::fabs(static_cast<double>(value))) : size;
  }
  ASSERT_EQ(got.size(), expected.size());
  for (size_t k = 0; k < got.size(); ++k) {
    const double a = static_cast<double>(got[k]);
    const double b = static_cast<double>(expected[k]);
    if (std::isfinite(b)) {
      ASSERT_NEAR(a, b, tolerance * (1.0 + size)) << what << " at " << k;
    } else {
      ASSERT_EQ(std::isnan(a), std::isnan(b)) << what << " at " << k;
    }
  }
}

template <typename Pair>
class DeviceKernels : public ::testing::Test {};

using Types = ::testing::Types<
    std::tuple<double, double>,
    std::tuple<float, float>,
    std::tuple<c10::Half, float>,
    std::tuple<c10::BFloat16, float>>;
TYPED_TEST_SUITE(DeviceKernels, Types);

#define TORCHMARGIN_TYPES                            \
  using Scalar = std::tuple_element_t<0, TypeParam>; \
  using T = std::tuple_element_t<1, TypeParam>;      \
  [[maybe_unused]] constexpr c10::ScalarType kAcc = dtype_of<T>;

// Rows, features, classes: fewer than a warp, one more than a warp, more than a block, several slices.
constexpr std::array<std::array<int64_t, 3>, 4> kSizes{{{1, 1, 1}, {5, 31, 33}, {13, 70, 300}, {9, 300, 1100}}};

TYPED_TEST(DeviceKernels, LoadRows) {
  TORCHMARGIN_TYPES
  for (const auto& [rows, features, classes] : kSizes) {
    for (const bool scale : {false, true}) {
      const KernelProblem<Scalar, T> p(rows, features, classes);
      const double operand_scale = 0.5;
      const auto run = [&](auto load) {
        std::vector<T> data = p.wide_input;
        std::vector<T> norms(rows);
        std::vector<double> sum(features, 1.0);
        load(LoadRowsArgs{
            data.data(), features, rows, features, /*normalize=*/true, scale, scale ? p.upstream.data() : nullptr,
            scale ? &operand_scale : nullptr, norms.data(), sum.data()});
        return std::tuple(data, norms, sum);
      };
      const auto got = run([&](const LoadRowsArgs& args) { device::launch_load_rows(args, kAcc, nullptr); });
      const auto expected = run([&](const LoadRowsArgs& args) {
        cpu::load_rows_range(args, kAcc, 0, rows);
        cpu::sum_rows_range(args, kAcc, 0, features);
      });
      expect_close(std::get<0>(got), std::get<0>(expected), "rows", kTolerance<T>);
      expect_close(std::get<1>(got), std::get<1>(expected), "inverse norms", kTolerance<T>);
      expect_close(std::get<2>(got), std::get<2>(expected), "sum", kTolerance<T>);
    }
  }
}

TYPED_TEST(DeviceKernels, AccumulateChunk) {
  TORCHMARGIN_TYPES
  for (const auto& [rows, features, classes] : kSizes) {
    for (const bool bounded : {false, true}) {
      KernelProblem<Scalar, T> p(rows, features, classes);
      if (!bounded && rows > 2) {
        p.logits[2 * classes + classes / 2] = std::numeric_limits<T>::quiet_NaN();
      }
      const auto run = [&](auto accumulate) {
        std::vector<double> shift(rows, 1.0), sum(rows, 2.0), maximum(rows, -3.0);
        accumulate(AccumulateChunkArgs{p.tile(!bounded), bounded, shift.data(), sum.data(), maximum.data()});
        for (int64_t i = 0; i < rows; ++i) { // shift and sum may differ, what they mean may not
          sum[i] = shift[i] + std::log(sum[i]);
        }
        return std::tuple(sum, maximum);
      };
      const auto got =
          run([&](const AccumulateChunkArgs& args) { device::launch_accumulate_chunk(args, kAcc, nullptr); });
      const auto expected = run([&](const AccumulateChunkArgs& args) { cpu::accumulate_range(args, kAcc, 0, rows); });
      expect_close(std::get<0>(got), std::get<0>(expected), "log-sum-exp", kTolerance<T>);
      expect_close(std::get<1>(got), std::get<1>(expected), "maximum", kTolerance<T>);
    }
  }
}

TYPED_TEST(DeviceKernels, SoftmaxChunk) {
  TORCHMARGIN_TYPES
  for (const auto& [rows, features, classes] : kSizes) {
    for (const bool with_bias : {false, true}) {
      KernelProblem<Scalar, T> p(rows, features, classes);
      p.other_lse[0] = T(70); // everything of this row is below exp(-50)
      if (rows > 4) {
        p.logits[4 * classes] = std::numeric_limits<T>::quiet_NaN(); // a row without an upstream gradient
      }
      const auto run = [&](auto softmax) {
        std::vector<T> out(rows * classes, T(7));
        softmax(SoftmaxChunkArgs{p.tile(with_bias), p.other_lse.data(), p.upstream.data(), !with_bias, out.data()});
        return out;
      };
      const auto got = run([&](const SoftmaxChunkArgs& args) { device::launch_softmax_chunk(args, kAcc, nullptr); });
      const auto expected = run([&](const SoftmaxChunkArgs& args) { cpu::softmax_range(args, kAcc, 0, rows); });
      expect_close(got, expected, "softmax", kTolerance<T>);
      EXPECT_EQ(got[0], T(0));
    }
  }
}

TYPED_TEST(DeviceKernels, TargetPass) {
  TORCHMARGIN_TYPES
  for (const auto& [rows, features, classes] : kSizes) {
    for (const bool normalize : {true, false}) {
      const KernelProblem<Scalar, T> p(rows, features, classes);
      const std::vector<double> shift(2 * rows, 1.0), sum(2 * rows, 3.0), maximum(2 * rows, 1.5);
      const double bias_sum = 0.25;
      const auto run = [&](auto pass) {
        std::vector<std::vector<T>> results(5, std::vector<T>(rows));
        pass(TargetPassArgs{
            p.context(normalize), rows, /*lanes=*/2, shift.data(), sum.data(), maximum.data(), p.weight_sum.data(),
            &bias_sum, results[0].data(), results[1].data(), results[2].data(), results[3].data(), results[4].data()});
        return results;
      };
      const auto got = run([&](const TargetPassArgs& args) { device::launch_target_pass(args, kAcc, nullptr); });
      const auto expected = run([&](const TargetPassArgs& args) { cpu::target_pass_range(args, kAcc, 0, rows); });
      for (size_t k = 0; k < got.size(); ++k) {
        expect_close(got[k], expected[k], "target pass", kTolerance<T>);
      }
    }
  }
}

TYPED_TEST(DeviceKernels, FinishClasses) {
  TORCHMARGIN_TYPES
  for (const auto& [rows, features, classes] : kSizes) {
    for (const bool normalize : {true, false}) {
      for (const bool smoothing : {true, false}) {
        const KernelProblem<Scalar, T> p(rows, features, classes);
        const std::vector<T> products = random_values<T>(classes * features, 6);
        const double operand_scale = 0.25;
        const double total = std::accumulate(p.upstream.begin(), p.upstream.end(), 0.0);
        const auto run = [&](auto finish, bool in_place) {
          std::vector<T> gradient(classes * features);
          std::vector<T> source = products;
          std::vector<T> bias = random_values<T>(classes, 7);
          finish(FinishClassesArgs{
              p.context(normalize), p.upstreams(smoothing), 0, classes, source.data(),
              in_place ? source.data() : gradient.data(), p.wide_weight.data(), features,
              normalize ? p.inverse_norms.data() : nullptr, bias.data(), &operand_scale,
              smoothing ? p.weight_sum.data() : nullptr, smoothing ? &total : nullptr, p.sorted_target.data(),
              p.order.data(), rows});
          return std::tuple(in_place ? source : gradient, bias);
        };
        const auto on_device = [&](const FinishClassesArgs& args) {
          device::launch_finish_classes(args, kAcc, nullptr);
        };
        const auto expected =
            run([&](const FinishClassesArgs& args) { cpu::finish_classes_range(args, kAcc, 0, classes); }, false);
        for (const bool in_place : {false, true}) {
          const auto got = run(on_device, in_place);
          expect_close(std::get<0>(got), std::get<0>(expected), "grad_weight", 4 * kTolerance<T>);
          expect_close(std::get<1>(got), std::get<1>(expected), "grad_bias", kTolerance<T>);
        }
      }
    }
  }
}

TYPED_TEST(DeviceKernels, FinishRows) {
  TORCHMARGIN_TYPES
  for (const auto& [rows, features, classes] : kSizes) {
    for (const bool normalize : {true, false}) {
      const KernelProblem<Scalar, T> p(rows, features, classes);
      const auto run = [&](auto finish) {
        std::vector<T> gradient = random_values<T>(rows * features, 8);
        std::vector<double> grad_m2(rows), grad_m3(rows);
        finish(FinishRowsArgs{
            p.context(normalize), p.upstreams(normalize), rows, p.weight_sum.data(), gradient.data(), grad_m2.data(),
            grad_m3.data()});
        return std::tuple(gradient, grad_m2, grad_m3);
      };
      const auto got = run([&](const FinishRowsArgs& args) { device::launch_finish_rows(args, kAcc, nullptr); });
      const auto expected = run([&](const FinishRowsArgs& args) { cpu::finish_rows_range(args, kAcc, 0, rows); });
      expect_close(std::get<0>(got), std::get<0>(expected), "grad_input", kTolerance<T>);
      expect_close(std::get<1>(got), std::get<1>(expected), "grad_m2", kTolerance<double>);
      expect_close(std::get<2>(got), std::get<2>(expected), "grad_m3", kTolerance<double>);
    }
  }
}

TYPED_TEST(DeviceKernels, Cosine) {
  TORCHMARGIN_TYPES
  for (const auto& [rows, features, classes] : kSizes) {
    const KernelProblem<Scalar, T> p(rows, features, classes);
    const std::vector<Scalar> cosine = random_values<Scalar>(rows * classes, 9, 0.3);
    const RawMatrix none{nullptr, c10::ScalarType::Float, 0, 0};
    const CosineContext context{
        {cosine.data(), dtype_of<Scalar>, classes, 1}, p.target.data(), classes, p.margin(), none, none, none};
    const auto run = [&](auto forward, auto backward, auto transform) {
      std::vector<std::vector<T>> results(3, std::vector<T>(rows));
      forward(CosineForwardArgs{context, true, results[0].data(), results[1].data(), results[2].data()});
      std::vector<Scalar> grad(rows * classes), psi(rows * classes);
      std::vector<double> grad_m2(rows), grad_m3(rows);
      backward(CosineBackwardArgs{
          context, results[0].data(), p.upstream.data(), p.upstream.data(), p.upstream.data(), grad.data(),
          grad_m2.data(), grad_m3.data()});
      transform(TransformArgs{p.margin(), dtype_of<Scalar>, cosine.data(), nullptr, psi.data()});
      return std::tuple(results, grad, grad_m2, grad_m3, psi);
    };
    const auto got =
        run([&](const CosineForwardArgs& args) { device::launch_cosine_forward(args, rows, nullptr); },
            [&](const CosineBackwardArgs& args) { device::launch_cosine_backward(args, rows, nullptr); },
            [&](const TransformArgs& args) { device::launch_transform(args, rows * classes, nullptr); });
    const auto expected =
        run([&](const CosineForwardArgs& args) { cpu::cosine_forward(args, 0, rows); },
            [&](const CosineBackwardArgs& args) { cpu::cosine_backward(args, 0, rows); },
            [&](const TransformArgs& args) { cpu::transform(args, 0, rows * classes); });
    for (size_t k = 0; k < 3; ++k) {
      expect_close(std::get<0>(got)[k], std::get<0>(expected)[k], "cosine results", kTolerance<T>);
    }
    // A gradient is rounded once to the caller's dtype.
    const double rounding = sizeof(Scalar) == 2 ? 1e-2 : 4 * kTolerance<T>;
    expect_close(std::get<1>(got), std::get<1>(expected), "grad_cosine", rounding);
    expect_close(std::get<2>(got), std::get<2>(expected), "grad_m2", kTolerance<double>);
    expect_close(std::get<3>(got), std::get<3>(expected), "grad_m3", kTolerance<double>);
    expect_close(std::get<4>(got), std::get<4>(expected), "psi", rounding);
  }
}

} // namespace
