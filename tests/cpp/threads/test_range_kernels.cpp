// The CPU kernels called by std::thread on ranges, with no ATen in the binary, so that
// ThreadSanitizer sees every access (make test-tsan). Four threads must give one thread's bits.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cpu/cosine_kernels.h"
#include "cpu/range_kernels.h"

namespace {

using namespace torchmargin;
using namespace torchmargin::cpu;

constexpr int64_t kRows = 13;
constexpr int64_t kFeatures = 37;
constexpr int64_t kClasses = 53;
constexpr c10::ScalarType kAcc = c10::ScalarType::Float;

using Range = std::function<void(int64_t begin, int64_t end)>;

void run(const Range& range, int64_t size, int64_t threads) {
  std::vector<std::thread> running;
  for (int64_t i = 0; i < threads; ++i) {
    running.emplace_back(range, size * i / threads, size * (i + 1) / threads);
  }
  for (std::thread& thread : running) {
    thread.join();
  }
}

template <typename T>
std::vector<T> random_values(int64_t size, unsigned seed, float deviation = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<T> values(size);
  std::generate(values.begin(), values.end(), [&] { return static_cast<T>(normal(generator)); });
  return values;
}

// Everything that the kernels of one problem read.
struct Problem {
  std::vector<float> input = random_values<float>(kRows * kFeatures, 1);
  std::vector<float> weight = random_values<float>(kClasses * kFeatures, 2);
  std::vector<float> logits = random_values<float>(kRows * kClasses, 3, 0.1f);
  std::vector<float> inverse_norms = std::vector<float>(kClasses, 0.16f);
  std::vector<float> other_lse = std::vector<float>(kRows, 9.0f);
  std::vector<double> upstream = random_values<double>(kRows, 4);
  std::vector<double> weight_sum = random_values<double>(kFeatures, 5);
  std::vector<int64_t> target = std::vector<int64_t>(kRows);
  std::vector<int64_t> order = std::vector<int64_t>(kRows);
  std::vector<int64_t> sorted_target;

  Problem() {
    for (int64_t i = 0; i < kRows; ++i) {
      target[i] = i == 3 ? -1 : (i * 7) % kClasses / 2;
    }
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return target[a] < target[b]; });
    for (const int64_t row : order) {
      sorted_target.push_back(target[row]);
    }
  }

  TargetContext context() const {
    MarginParameters margin;
    margin.scale = 16.0;
    margin.m2 = 0.4;
    const RawMatrix none{nullptr, kAcc, 0, 0};
    return {
        {input.data(), kAcc, kFeatures, 1},
        {weight.data(), kAcc, kFeatures, 1},
        target.data(),
        kFeatures,
        kClasses,
        margin,
        true,
        true,
        none,
        none,
        none,
        none};
  }
  LogitsTile tile() const {
    return {logits.data(), kClasses, kRows, kClasses, 0, target.data(), 16.0, inverse_norms.data(), nullptr};
  }
};

// Runs `kernel` with one thread and with four, on results that `kernel` allocates, and compares.
template <typename Kernel>
void expect_equal_bits(Kernel kernel) {
  EXPECT_EQ(kernel(1), kernel(4));
}

TEST(Threads, LoadRowsAndTheirSum) {
  expect_equal_bits([](int64_t threads) {
    Problem p;
    std::vector<float> norms(kRows);
    std::vector<double> sum(kFeatures);
    const LoadRowsArgs args{p.input.data(), kFeatures,         kRows,   kFeatures,    true,
                            true,           p.upstream.data(), nullptr, norms.data(), sum.data()};
    run([&](int64_t b, int64_t e) { load_rows_range(args, kAcc, b, e); }, kRows, threads);
    run([&](int64_t b, int64_t e) { sum_rows_range(args, kAcc, b, e); }, kFeatures, threads);
    return std::tuple(p.input, norms, sum);
  });
}

TEST(Threads, AccumulateAndSoftmax) {
  expect_equal_bits([](int64_t threads) {
    const Problem p;
    std::vector<double> shift(kRows, -INFINITY), sum(kRows), maximum(kRows, -INFINITY);
    const AccumulateChunkArgs accumulate{p.tile(), false, shift.data(), sum.data(), maximum.data()};
    run([&](int64_t b, int64_t e) { accumulate_range(accumulate, kAcc, b, e); }, kRows, threads);
    std::vector<float> softmax(kRows * kClasses);
    const SoftmaxChunkArgs args{p.tile(), p.other_lse.data(), p.upstream.data(), true, softmax.data()};
    run([&](int64_t b, int64_t e) { softmax_range(args, kAcc, b, e); }, kRows, threads);
    return std::tuple(shift, sum, maximum, softmax);
  });
}

TEST(Threads, TargetPass) {
  expect_equal_bits([](int64_t threads) {
    const Problem p;
    const std::vector<double> shift(2 * kRows, 1.0), sum(2 * kRows, 3.0), maximum(2 * kRows, 1.5);
    std::vector<std::vector<float>> results(5, std::vector<float>(kRows));
    const TargetPassArgs args{
        p.context(),
        kRows,
        2,
        shift.data(),
        sum.data(),
        maximum.data(),
        p.weight_sum.data(),
        nullptr,
        results[0].data(),
        results[1].data(),
        results[2].data(),
        results[3].data(),
        results[4].data()};
    run([&](int64_t b, int64_t e) { target_pass_range(args, kAcc, b, e); }, kRows, threads);
    return results;
  });
}

TEST(Threads, FinishClassesAndRows) {
  expect_equal_bits([](int64_t threads) {
    const Problem p;
    const Upstream upstream{p.upstream.data(), p.upstream.data(), p.upstream.data()};
    const double one = 1.0;
    const double total = std::accumulate(p.upstream.begin(), p.upstream.end(), 0.0);
    std::vector<float> grad_weight = random_values<float>(kClasses * kFeatures, 6);
    std::vector<float> grad_bias = random_values<float>(kClasses, 7);
    const FinishClassesArgs classes{
        p.context(),
        upstream,
        0,
        kClasses,
        grad_weight.data(),
        grad_weight.data(),
        p.weight.data(),
        kFeatures,
        p.inverse_norms.data(),
        grad_bias.data(),
        &one,
        p.weight_sum.data(),
        &total,
        p.sorted_target.data(),
        p.order.data(),
        kRows};
    run([&](int64_t b, int64_t e) { finish_classes_range(classes, kAcc, b, e); }, kClasses, threads);
    std::vector<float> grad_input = random_values<float>(kRows * kFeatures, 8);
    std::vector<double> grad_m2(kRows), grad_m3(kRows);
    const FinishRowsArgs rows{p.context(),       upstream,       kRows,         p.weight_sum.data(),
                              grad_input.data(), grad_m2.data(), grad_m3.data()};
    run([&](int64_t b, int64_t e) { finish_rows_range(rows, kAcc, b, e); }, kRows, threads);
    return std::tuple(grad_weight, grad_bias, grad_input, grad_m2, grad_m3);
  });
}

template <typename Scalar>
void cosine_kernels(c10::ScalarType dtype) {
  const auto kernel = [&](int64_t threads) {
    const Problem p;
    const std::vector<Scalar> cosine = random_values<Scalar>(kRows * kClasses, 9, 0.3f);
    MarginParameters margin;
    margin.scale = 16.0;
    margin.m2 = 0.4;
    const RawMatrix none{nullptr, kAcc, 0, 0};
    const CosineContext context{
        {cosine.data(), dtype, kClasses, 1}, p.target.data(), kClasses, margin, none, none, none};
    std::vector<std::vector<float>> results(3, std::vector<float>(kRows));
    const CosineForwardArgs forward{context, true, results[0].data(), results[1].data(), results[2].data()};
    run([&](int64_t b, int64_t e) { cosine_forward(forward, b, e); }, kRows, threads);
    std::vector<Scalar> grad(kRows * kClasses), psi(kRows * kClasses);
    std::vector<double> grad_m2(kRows), grad_m3(kRows);
    const CosineBackwardArgs backward{context,           results[0].data(), p.upstream.data(), p.upstream.data(),
                                      p.upstream.data(), grad.data(),       grad_m2.data(),    grad_m3.data()};
    run([&](int64_t b, int64_t e) { cosine_backward(backward, b, e); }, kRows, threads);
    const TransformArgs args{margin, dtype, cosine.data(), nullptr, psi.data()};
    run([&](int64_t b, int64_t e) { transform(args, b, e); }, kRows * kClasses, threads);
    return std::tuple(results, grad, grad_m2, grad_m3, psi);
  };
  expect_equal_bits(kernel);
}

TEST(Threads, CosineKernels) {
  cosine_kernels<float>(c10::ScalarType::Float);
  cosine_kernels<c10::Half>(c10::ScalarType::Half);
  cosine_kernels<c10::BFloat16>(c10::ScalarType::BFloat16);
}

} // namespace
