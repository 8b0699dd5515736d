// The CPU kernels called by std::thread on ranges, with no ATen in the binary, so that
// ThreadSanitizer sees every access (make test-tsan). Four threads must give one thread's bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <thread>
#include <vector>

#include "cpu/cosine_kernels.h"
#include "cpu/range_kernels.h"
#include "kernel_problem.h"

namespace {

using namespace torchmargin;
using namespace torchmargin::cpu;
using torchmargin::testing::random_values;
using Problem = torchmargin::testing::KernelProblem<float, float>;

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

// Runs `kernel` with one thread and with four, on results that `kernel` allocates, and compares.
template <typename Kernel>
void expect_equal_bits(Kernel kernel) {
  EXPECT_EQ(kernel(1), kernel(4));
}

TEST(Threads, LoadRowsAndTheirSum) {
  expect_equal_bits([](int64_t threads) {
    const Problem p(kRows, kFeatures, kClasses);
    std::vector<float> norms(kRows);
    std::vector<double> sum(kFeatures);
    std::vector<float> out(kRows * kFeatures);
    const LoadRowsArgs args{
        .rows = {p.wide_input.data(), kAcc, kFeatures, 1},
        .row_count = kRows,
        .features = kFeatures,
        .measured = true,
        .out = out.data(),
        .out_dtype = kAcc,
        .out_row_stride = kFeatures,
        .to_unit = true,
        .row_factor = p.upstream.data(),
        .inverse_norms = norms.data(),
        .sum = sum.data()};
    run([&](int64_t b, int64_t e) { load_rows_range(args, kAcc, b, e); }, kRows, threads);
    run([&](int64_t b, int64_t e) { sum_rows_range(args, kAcc, b, e); }, kFeatures, threads);
    return std::tuple(out, norms, sum);
  });
}

TEST(Threads, AccumulateAndSoftmax) {
  expect_equal_bits([](int64_t threads) {
    const Problem p(kRows, kFeatures, kClasses);
    std::vector<double> shift(kRows, -INFINITY), sum(kRows), maximum(kRows, -INFINITY);
    const AccumulateChunkArgs accumulate{p.tile(), false, false, {shift.data(), sum.data(), maximum.data()}};
    run([&](int64_t b, int64_t e) { accumulate_range(accumulate, kAcc, b, e); }, kRows, threads);
    std::vector<float> softmax(kRows * kClasses);
    const SoftmaxChunkArgs args{p.tile(), p.other_lse.data(), p.upstream.data(), true, softmax.data(), kClasses,
                                kAcc,     /*out_scale=*/1.0};
    run([&](int64_t b, int64_t e) { softmax_range(args, kAcc, b, e); }, kRows, threads);
    return std::tuple(shift, sum, maximum, softmax);
  });
}

TEST(Threads, TargetAndCombineRows) {
  expect_equal_bits([](int64_t threads) {
    const Problem p(kRows, kFeatures, kClasses);
    std::vector<RowState> state(kRows);
    std::vector<double> logit(kRows), other_lse(kRows), logit_sum(kRows);
    std::vector<float> angle(kRows), largest(kRows);
    const TargetRowsArgs target{
        .context = p.context(),
        .rows = kRows,
        .measured = false,
        .state = state.data(),
        .target_logit = logit.data(),
        .target_angle = angle.data()};
    run([&](int64_t b, int64_t e) { target_rows_range(target, kAcc, b, e); }, kRows, threads);
    std::vector<double> shift(2 * kRows, 1.0), sum(2 * kRows, 3.0), maximum(2 * kRows, 1.5);
    const CombineRowsArgs combine{
        .context = p.context(),
        .rows = kRows,
        .state = state.data(),
        .target_logit = logit.data(),
        .lanes = 2,
        .sums = {shift.data(), sum.data(), maximum.data()},
        .weight_sum = p.weight_sum.data(),
        .bias_sum = nullptr,
        .other_lse = other_lse.data(),
        .logit_sum = logit_sum.data(),
        .max_other_logit = largest.data()};
    run([&](int64_t b, int64_t e) { combine_rows_range(combine, kAcc, b, e); }, kRows, threads);
    return std::tuple(logit, angle, other_lse, logit_sum, largest);
  });
}

TEST(Threads, FinishClassesAndRows) {
  expect_equal_bits([](int64_t threads) {
    const Problem p(kRows, kFeatures, kClasses);
    const Upstream upstream = p.upstreams(/*smoothing=*/true);
    const double one = 1.0;
    const double total = std::accumulate(p.upstream.begin(), p.upstream.end(), 0.0);
    std::vector<float> grad_weight = random_values<float>(kClasses * kFeatures, 6);
    std::vector<float> grad_bias = random_values<float>(kClasses, 7);
    const std::vector<RowState> state = p.states();
    const FinishClassesArgs classes{
        .context = p.context(),
        .state = state.data(),
        .upstream = upstream,
        .first_class = 0,
        .class_count = kClasses,
        .products = grad_weight.data(),
        .products_row_stride = kFeatures,
        .products_lack_norms = false,
        .grad_weight = grad_weight.data(),
        .weight = {p.weight.data(), kAcc, kFeatures, 1},
        .inverse_norms = p.inverse_norms.data(),
        .bias_products = grad_bias.data(),
        .products_scale = &one,
        .input_sum = p.weight_sum.data(),
        .logit_sum_total = &total,
        .sorted_target = p.sorted_target.data(),
        .sorted_row = p.order.data(),
        .rows = kRows};
    run([&](int64_t b, int64_t e) { finish_classes_range(classes, kAcc, b, e); }, kClasses, threads);
    std::vector<float> grad_input = random_values<float>(kRows * kFeatures, 8);
    std::vector<double> grad_m2(kRows), grad_m3(kRows);
    const FinishRowsArgs rows{
        .context = p.context(),
        .state = state.data(),
        .upstream = upstream,
        .rows = kRows,
        .weight_sum = p.weight_sum.data(),
        .products = grad_input.data(),
        .products_scale = &one,
        .grad_m2 = grad_m2.data(),
        .grad_m3 = grad_m3.data()};
    run([&](int64_t b, int64_t e) { finish_rows_range(rows, kAcc, b, e); }, kRows, threads);
    return std::tuple(grad_weight, grad_bias, grad_input, grad_m2, grad_m3);
  });
}

template <typename Scalar>
void cosine_kernels(c10::ScalarType dtype) {
  const auto kernel = [&](int64_t threads) {
    const Problem p(kRows, kFeatures, kClasses);
    const std::vector<Scalar> cosine = random_values<Scalar>(kRows * kClasses, 9, 0.3);
    const MarginParameters margin = p.margin();
    const CosineContext context{{cosine.data(), dtype, kClasses, 1}, p.target.data(), kClasses, margin, {}, {}, {}};
    std::vector<std::vector<double>> results(3, std::vector<double>(kRows));
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
