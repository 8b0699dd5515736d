// The whole sweep as a GPU runs it (its plan, its 16-bit operands, its kernels) on the CPU: the CUDA kernels run thread
// by thread on the stand-in, the products are ATen's of the same 16-bit numbers in float32. Against the CPU's sweep in
// float64.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "cpu/device.h"
#include "kernels/launch.h"
#include "linear_rounding.h"
#include "plan/operands.h"
#include "sweep/sweeps.h"
#include "sweep/tile_steps.h"
#include "torchmargin/settings.h"

namespace {

using namespace torchmargin;
using namespace torchmargin::testing;

constexpr int64_t kFusedSets = 5;

void run_lanes(int64_t lanes, const std::function<void(int64_t)>& body) {
  ASSERT_EQ(lanes, 1); // a stream is one queue
  body(0);
}

// Stands for the kernel, which no host compiler takes: the same sums and weights in float64, to sets in turn.
template <typename Operand>
void fused_tile_of(const FusedTileArgs& args) {
  static int64_t turn = 0;
  const ProductsTile& tile = args.tile;
  const auto at = [](const void* rows, int64_t stride, int64_t i, int64_t k) {
    return static_cast<double>(static_cast<const Operand*>(rows)[i * stride + k]);
  };
  for (const void* rows : {args.row_operand, args.class_operand, static_cast<const void*>(args.out)}) {
    ASSERT_EQ(reinterpret_cast<uintptr_t>(rows) % 16, 0U);
  }
  for (const int64_t stride : {args.row_operand_stride, args.class_operand_stride, args.out_row_stride}) {
    ASSERT_EQ(stride % 8, 0);
  }
  ASSERT_EQ(tile.bias, nullptr);
  const auto factor = [](const void* factors, int64_t i) {
    return factors == nullptr ? 1.0 : static_cast<double>(static_cast<const float*>(factors)[i]);
  };
  const int64_t set = turn++ % kFusedSets;
  for (int64_t i = 0; i < tile.row_count; ++i) {
    double sum = 0.0;
    double maximum = -std::numeric_limits<double>::infinity();
    for (int64_t j = 0; j < tile.class_count; ++j) {
      double product = 0.0;
      for (int64_t k = 0; k < args.features; ++k) {
        product += at(args.row_operand, args.row_operand_stride, i, k) *
            at(args.class_operand, args.class_operand_stride, j, k);
      }
      const double z = product * tile.scale * factor(tile.row_factors, i) * factor(tile.class_factors, j);
      const bool own = tile.target[i] == tile.first_class + j;
      if (!own) {
        sum += std::exp(z);
        maximum = std::fmax(maximum, z);
      }
      if (args.out != nullptr) {
        const double weight = own || args.upstream[i] == 0.0 ? 0.0 : std::exp(z - args.other_lse[i]) * args.out_scale;
        static_cast<Operand*>(args.out)[i * args.out_row_stride + j] = static_cast<Operand>(
            static_cast<float>(weight * (args.times_class_factors ? factor(tile.class_factors, j) : 1.0)));
      }
    }
    if (args.out == nullptr) {
      args.sum[set * args.set_stride + i] += sum;
      args.maximum[set * args.set_stride + i] = std::fmax(args.maximum[set * args.set_stride + i], maximum);
    }
  }
}

int64_t fused_calls = 0;

void fused_tile(const FusedTileArgs& args) {
  ++fused_calls;
  args.dtype == c10::ScalarType::Half ? fused_tile_of<c10::Half>(args) : fused_tile_of<c10::BFloat16>(args);
}

Device make_device(bool fused) {
  return {
      .traits = gpu_traits({.processors = kFusedSets, .l2_bytes = 50 << 20, .fused_tiles = fused}),
      .kernels = {
          .load_rows = [](const LoadRowsArgs& args,
                          c10::ScalarType acc) { device::launch_load_rows(args, acc, nullptr); },
          .target_rows = [](const TargetRowsArgs& args,
                            c10::ScalarType acc) { device::launch_target_rows(args, acc, nullptr); },
          .accumulate_chunk = [](const AccumulateChunkArgs& args,
                                 c10::ScalarType acc) { device::launch_accumulate_chunk(args, acc, nullptr); },
          .combine_rows = [](const CombineRowsArgs& args,
                             c10::ScalarType acc) { device::launch_combine_rows(args, acc, nullptr); },
          .hard_rows = [](const HardRowsArgs& args,
                          c10::ScalarType acc) { device::launch_hard_rows(args, acc, nullptr); },
          .merge_hardest = [](const MergeHardestArgs& args,
                              c10::ScalarType acc) { device::launch_merge_hardest(args, acc, nullptr); },
          .fold_centers = [](const FoldCentersArgs& args,
                             c10::ScalarType acc) { device::launch_fold_centers(args, acc, nullptr); },
          .spread_centers = [](const SpreadCentersArgs& args,
                               c10::ScalarType acc) { device::launch_spread_centers(args, acc, nullptr); },
          .write_hardest = [](const WriteHardestArgs& args,
                              c10::ScalarType acc) { device::launch_write_hardest(args, acc, nullptr); },
          .add_binary = [](const AddBinaryArgs& args,
                           c10::ScalarType acc) { device::launch_add_binary(args, acc, nullptr); },
          .weigh_binary = [](const WeighBinaryArgs& args,
                             c10::ScalarType acc) { device::launch_weigh_binary(args, acc, nullptr); },
          .softmax_chunk = [](const SoftmaxChunkArgs& args,
                              c10::ScalarType acc) { device::launch_softmax_chunk(args, acc, nullptr); },
          .fused_tile = fused ? fused_tile : nullptr,
          .fold_sets = [](const FoldSetsArgs& args) { device::launch_fold_sets(args, nullptr); },
          .finish_classes = [](const FinishClassesArgs& args,
                               c10::ScalarType acc) { device::launch_finish_classes(args, acc, nullptr); },
          .finish_own_classes = [](const FinishClassesArgs& args,
                                   c10::ScalarType acc) { device::launch_finish_own_classes(args, acc, nullptr); },
          .finish_rows = [](const FinishRowsArgs& args,
                            c10::ScalarType acc) { device::launch_finish_rows(args, acc, nullptr); },
          .widen_upstream = [](const WidenUpstreamArgs& args) { device::launch_widen_upstream(args, nullptr); },
          .run_lanes = run_lanes,
          .prepare_buffer = [](void*, int64_t) {}},
      .steps = kPortableSteps};
}

const Device kDevice = make_device(/*fused=*/false);
const Device kFusedDevice = make_device(/*fused=*/true);

struct Case {
  std::string name;
  at::ScalarType dtype = at::kFloat;
  std::optional<at::ScalarType> compute_dtype;
  bool normalize_input = true;
  bool normalize_weight = true;
  bool with_bias = false;
  bool smoothing = false;
  int64_t kept = 0; // classes
  double upstream_scale = 1.0;
  int64_t rows = 9;
  int64_t features = 13;
  int64_t classes = 61;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.name;
}

struct Results {
  ForwardResult forward;
  Gradients gradients;
};

LinearProblem make_problem(const Case& c) {
  torch::manual_seed(1);
  LinearProblem p;
  p.input = torch::randn({c.rows, c.features}, torch::kFloat64).mul_(0.5).to(c.dtype);
  p.weight = torch::randn({c.classes, c.features}, torch::kFloat64).mul_(0.3).to(c.dtype);
  p.target = torch::randint(0, c.classes, {c.rows});
  p.target[2] = -1;
  if (c.with_bias) {
    p.bias = torch::randn({c.classes}, torch::kFloat64).to(c.dtype);
  }
  p.margins.parameters.scale = c.normalize_input && c.normalize_weight ? 16.0 : 2.0;
  p.margins.parameters.m2 = 0.3;
  p.normalize_input = c.normalize_input;
  p.normalize_weight = c.normalize_weight;
  p.compute_dtype = c.compute_dtype;
  return p;
}

// The same problem in float64.
LinearProblem widen(LinearProblem p) {
  p.input = p.input.to(at::kDouble);
  p.weight = p.weight.to(at::kDouble);
  if (p.bias.has_value()) {
    p.bias = p.bias->to(at::kDouble);
  }
  p.compute_dtype = std::nullopt;
  return p;
}

// The upstream gradients of a run, and of no other: numbers of float32.
BackwardRequest upstream_of(const Case& c) {
  torch::manual_seed(2);
  const auto upstream = [&](double scale) {
    at::Tensor grad = (torch::rand({c.rows}, torch::kFloat32) * scale);
    grad[1] = 0.0; // a row that counts for nothing
    return grad;
  };
  BackwardRequest request;
  request.grad_other_lse = upstream(c.upstream_scale);
  request.grad_target_logit = upstream(c.upstream_scale);
  if (c.smoothing) {
    request.grad_logit_sum = upstream(c.upstream_scale / double(c.classes));
  }
  return request;
}

Results run(const LinearProblem& p, const Case& c, int64_t kept, const Device& on) {
  Results r;
  r.forward = sweep_forward(p, {std::nullopt, c.smoothing, kept}, on);
  BackwardRequest request = upstream_of(c);
  for (std::optional<at::Tensor>* grad :
       {&request.grad_other_lse, &request.grad_target_logit, &request.grad_logit_sum}) {
    if (grad->has_value()) {
      *grad = (*grad)->to(p.acc());
    }
  }
  request.other_lse = r.forward.other_lse;
  request.record = r.forward.record;
  request.wanted = {true, true, p.bias.has_value(), false, false};
  r.gradients = sweep_backward(p, request, on);
  return r;
}

LinearRounding rounding_of(const LinearProblem& p) {
  return {p, choose_operands(gpu_traits(kSomeGpu), p.input.scalar_type(), p.compute_dtype)};
}

void expect_gradients(
    const Gradients& got,
    const Gradients& expected,
    const LinearProblem& p,
    const Case& c,
    const std::vector<size_t>& which) {
  const BackwardRequest upstream = upstream_of(c);
  const auto size = [&](const std::optional<at::Tensor>& grad) {
    return grad.has_value() ? grad->to(at::kDouble) : at::zeros({c.rows}, at::kDouble);
  };
  const auto bounds = rounding_of(p).gradients(
      size(upstream.grad_other_lse), size(upstream.grad_target_logit), size(upstream.grad_logit_sum),
      at::zeros({c.rows}, at::kDouble));
  for (const size_t i : which) {
    expect_gradient(got[i], expected[i], bounds[i], static_cast<int64_t>(i));
  }
}

class DeviceSweep : public ::testing::TestWithParam<Case> {
 protected:
  void TearDown() override {
    set_workspace_limit(c10::DeviceType::CPU, kDefaultWorkspaceLimit);
  }
};

TEST_P(DeviceSweep, AgreesWithTheCpuInFloat64) {
  const Case& c = GetParam();
  const LinearProblem p = make_problem(c);
  const Results expected = run(widen(p), c, 0, cpu::device());
  set_workspace_limit(c10::DeviceType::CPU, 64 << 10); // several chunks
  const Results got = run(p, c, c.kept, kDevice);

  const LinearRounding rounding = rounding_of(p);
  expect_vector(got.forward.other_lse, expected.forward.other_lse, rounding.lse(), "other_lse");
  expect_vector(got.forward.target_logit, expected.forward.target_logit, rounding.target(), "target_logit");
  if (c.smoothing) {
    expect_vector(got.forward.logit_sum, expected.forward.logit_sum, rounding.total(), "logit_sum");
  }
  std::vector<size_t> which{0, 1};
  if (c.with_bias) {
    which.push_back(2);
  }
  expect_gradients(got.gradients, expected.gradients, p, c, which);
  for (const size_t i : which) {
    EXPECT_EQ(got.gradients[i].scalar_type(), c.dtype);
  }
  EXPECT_EQ(got.gradients[0][1].abs().max().item<double>(), 0.0);
}

// The same where a device makes logits and what becomes of them in one kernel: it does so for problems that are fit
// for it, and for all tiles that are not kept.
TEST_P(DeviceSweep, AgreesWhereTilesAreFused) {
  const Case& c = GetParam();
  const LinearProblem p = make_problem(c);
  const Results expected = run(widen(p), c, 0, cpu::device());
  set_workspace_limit(c10::DeviceType::CPU, 64 << 10);
  fused_calls = 0;
  const Results got = run(p, c, c.kept, kFusedDevice);
  const bool in_rows_of_16_bytes = c.dtype != at::kBFloat16 || c.features % 8 == 0;
  const bool narrow = c.dtype == at::kHalf || c.dtype == at::kBFloat16 || c.compute_dtype.has_value();
  const bool fit = narrow && c.normalize_input && c.normalize_weight && !c.with_bias && in_rows_of_16_bytes;
  EXPECT_EQ(fused_calls > 0, fit && c.kept < c.classes);

  const LinearRounding rounding = rounding_of(p);
  expect_vector(got.forward.other_lse, expected.forward.other_lse, rounding.lse(), "other_lse");
  expect_vector(
      got.forward.max_other_logit.to(at::kDouble), expected.forward.max_other_logit, rounding.lse(), "max_other_logit");
  expect_gradients(got.gradients, expected.gradients, p, c, {0, 1});
  EXPECT_EQ(got.gradients[0][1].abs().max().item<double>(), 0.0);
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto half = at::kHalf;
  const auto bfloat = at::kBFloat16;
  for (const auto& [name, dtype, compute] :
       {std::tuple{"float64", at::kDouble, std::optional<at::ScalarType>()},
        {"float32", at::kFloat, std::nullopt},
        {"float32_as_float16", at::kFloat, half},
        {"float16", half, std::nullopt},
        {"bfloat16", bfloat, std::nullopt}}) {
    const auto add = [&](const std::string& what, auto change) {
      Case c{std::string(name) + "_" + what, dtype, compute};
      change(c);
      all.push_back(c);
    };
    add("normalised", [](Case&) {});
    add("kept", [](Case& c) { c.kept = c.classes; });
    add("some_kept", [](Case& c) { c.kept = 24; });
    add("smoothed", [](Case& c) { c.smoothing = true; });
    add("weight_only", [](Case& c) { c.normalize_input = false; });
    add("input_only", [](Case& c) { c.normalize_weight = false; });
    add("plain_with_bias", [](Case& c) { c.normalize_input = c.normalize_weight = false, c.with_bias = true; });
    add("normalised_with_bias", [](Case& c) { c.with_bias = true; });
    add("split", [](Case& c) { c.rows = 3, c.features = 16, c.classes = 1100; });
    const double scale = dtype == half ? 0x1p4 : 0x1p20; // float16 gradients hold no more
    add("scaled_up", [&](Case& c) { c.upstream_scale = scale; });
    add("scaled_down", [&](Case& c) { c.upstream_scale = 1 / scale; });
    add("odd_strides", [](Case& c) { c.features = 8; });
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(All, DeviceSweep, ::testing::ValuesIn(cases()), [](const auto& info) {
  return info.param.name;
});

// Lengths far outside float16: unit vectors and powers of two carry them.
TEST_F(DeviceSweep, AnyLengthFitsIntoFloat16) {
  for (const bool normalize : {true, false}) {
    Case c;
    c.compute_dtype = at::kHalf;
    c.normalize_input = c.normalize_weight = normalize;
    LinearProblem p = make_problem(c);
    p.input.mul_(1e-7);
    p.weight.mul_(1e6);
    p.weight[5].mul_(1e-3);
    p.weight[7].zero_();
    p.input[4].zero_();
    p.margins.parameters.m2 = 0.0;
    const Results expected = run(widen(p), c, 0, cpu::device());
    const Results got = run(p, c, 0, kDevice);
    expect_vector(got.forward.other_lse, expected.forward.other_lse, rounding_of(p).lse(), "other_lse");
    expect_gradients(got.gradients, expected.gradients, p, c, {0, 1});
    EXPECT_EQ(got.gradients[1][7].abs().max().item<double>() == 0.0, normalize);
  }
}

// Loss scaling by a power of two changes nothing else, with 16-bit products as well.
TEST_F(DeviceSweep, LossScalingIsExact) {
  for (const auto& [dtype, compute] :
       {std::pair{at::kFloat, std::optional<at::ScalarType>(at::kHalf)}, {at::kFloat, std::nullopt}}) {
    Case c;
    c.dtype = dtype;
    c.compute_dtype = compute;
    c.smoothing = true;
    const LinearProblem p = make_problem(c);
    const Results one = run(p, c, 0, kDevice);
    for (const double scale : {0x1p24, 0x1p-24}) {
      c.upstream_scale = scale;
      const Results scaled = run(p, c, 0, kDevice);
      for (size_t i = 0; i < 2; ++i) {
        EXPECT_TRUE(torch::equal(scaled.gradients[i], one.gradients[i] * scale)) << scale;
      }
    }
  }
}

// A row that holds NaN and has no upstream gradient reaches no gradient and no scale.
TEST_F(DeviceSweep, UnusedRowsReachNothing) {
  for (const bool normalize : {true, false}) {
    Case c;
    c.compute_dtype = at::kHalf;
    c.normalize_input = normalize;
    c.upstream_scale = 0x1p24;
    LinearProblem p = make_problem(c);
    const Results expected = run(widen(p), c, 0, cpu::device());
    LinearProblem holed = p;
    holed.input = p.input.clone();
    holed.input[1].fill_(std::numeric_limits<float>::quiet_NaN());
    const Results got = run(holed, c, 0, kDevice);
    expect_gradients(got.gradients, expected.gradients, p, c, {1});
    EXPECT_TRUE(torch::isfinite(got.gradients[0]).all().item<bool>());
  }
}

// The figures of docs/numerics.md: error of logits of unit vectors at scale 64, D = 512. A component's rounding is even
// within u of its power of two, u / sqrt(3) of itself in root mean square, and independent of the others': products of
// unit vectors' components, which are 1 / D in root mean square, add up to u sqrt(2 / (3 D)) for two operands. float32
// sums: D roundings of partial sums of up to sqrt(k) / D, u / sqrt(6) in all, and five of the result, 1 / sqrt(D).
TEST_F(DeviceSweep, LogitErrors) {
  for (const auto& [dtype, compute] :
       {std::pair{at::kFloat, std::optional<at::ScalarType>(at::kHalf)},
        {at::kHalf, std::nullopt},
        {at::kBFloat16, std::nullopt}}) {
    Case c;
    c.dtype = dtype;
    c.compute_dtype = compute;
    c.rows = 16;
    c.features = 512;
    c.classes = 400;
    LinearProblem p = make_problem(c);
    p.margins.parameters.scale = 64.0;
    p.target.fill_(-1);
    const at::Tensor got = sweep_logits(p, kDevice).logits;
    const at::Tensor expected = sweep_logits(widen(p), cpu::device()).logits;
    const double rms = (got - expected).square().mean().sqrt().item<double>();
    const double operands =
        dtype == at::kBFloat16 ? 0.0 : 0x1p-11 * std::sqrt(2.0 / (3 * 512)); // bfloat16 goes in as it is
    const double sums = 0x1p-24 * (std::sqrt(1.0 / 6) + 5 / std::sqrt(512.0));
    EXPECT_LT(rms, 64 * (operands + sums));
    RecordProperty("rms", std::to_string(rms));
    std::printf("logit error rms %s as %s: %.2e\n", c10::toString(dtype), c10::toString(compute.value_or(dtype)), rms);
  }
}

TEST_F(DeviceSweep, GradientsOfLogits) {
  for (const auto& [dtype, compute] :
       {std::pair{at::kDouble, std::optional<at::ScalarType>()},
        {at::kFloat, at::kHalf},
        {at::kHalf, std::nullopt},
        {at::kBFloat16, std::nullopt}}) {
    Case c;
    c.dtype = dtype;
    c.compute_dtype = compute;
    c.with_bias = true;
    const LinearProblem p = make_problem(c);
    const at::Tensor upstream = torch::randn({c.rows, c.classes}, torch::kFloat64) * 1e5;
    const auto backward = [&](const LinearProblem& problem, const Device& on) {
      const LogitsResult forward = sweep_logits(problem, on);
      return sweep_logits_backward(
          problem,
          {upstream.to(problem.acc()), forward.inverse_norms, forward.row_state, {true, true, true, false, false}}, on);
    };
    const Gradients expected = backward(widen(p), cpu::device());
    const Gradients got = backward(p, kDevice);
    const auto bounds = LinearRounding(p, wide_operands(dtype)).logits_gradients(upstream.abs());
    for (size_t i = 0; i < 3; ++i) {
      const auto held = [&](const at::Tensor& gradient) { // what float16 cannot hold is infinite
        return dtype == at::kHalf ? gradient.clamp(-65504, 65504) : gradient;
      };
      expect_gradient(held(got[i]), held(expected[i]), bounds[i], static_cast<int64_t>(i));
    }
  }
}

// Any strides: transposed parameters are the same operands. Of 16 bits they are multiplied as contiguous copies, by the
// same products; others where they lie, and a product may add in another order there.
TEST_F(DeviceSweep, AnyStrides) {
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16}) {
    Case c;
    c.dtype = dtype;
    const LinearProblem p = make_problem(c);
    LinearProblem transposed = p;
    transposed.weight = p.weight.t().contiguous().t();
    transposed.input = p.input.t().contiguous().t();
    const Results got = run(transposed, c, 0, kDevice);
    if (at::isReducedFloatingType(dtype)) {
      const Results expected = run(p, c, 0, kDevice);
      for (size_t i = 0; i < 2; ++i) {
        EXPECT_TRUE(torch::equal(got.gradients[i], expected.gradients[i])) << dtype << i;
      }
    } else {
      expect_gradients(got.gradients, run(widen(p), c, 0, cpu::device()).gradients, p, c, {0, 1});
    }
  }
}

// The upstream gradients made in one pass and by ATen's ops: the same gradients, bit for bit, NaN and infinities too.
TEST_F(DeviceSweep, UpstreamInOnePassOrByParts) {
  const auto by_parts_on = [](Device device) {
    device.kernels.widen_upstream = nullptr;
    return device;
  };
  const Device host_by_parts = by_parts_on(cpu::device());
  const Device gpu_by_parts = by_parts_on(kDevice);
  const double infinity = std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const auto& [dtype, on_gpu] :
       {std::pair{at::kDouble, false},
        {at::kFloat, false},
        {at::kBFloat16, false},
        {at::kFloat, true},
        {at::kHalf, true}}) {
    const Device& one_pass = on_gpu ? kDevice : cpu::device();
    const Device& by_parts = on_gpu ? gpu_by_parts : host_by_parts;
    for (const bool normalize : {true, false}) {
      for (const bool smoothing : {true, false}) {
        Case c;
        c.dtype = dtype;
        c.normalize_input = c.normalize_weight = normalize;
        c.with_bias = c.smoothing = smoothing;
        const LinearProblem p = make_problem(c);
        const ForwardResult forward = sweep_forward(p, {std::nullopt, smoothing, 0}, one_pass);
        const double tiny = dtype == at::kDouble ? 1e-310 : 1e-40;
        const double huge = dtype == at::kDouble ? 1.7e308 : 3e38; // its power of two has no normal inverse
        // Of a row; of every other row as many times what it is.
        const std::vector<std::pair<double, double>> upstreams{
            {1.0, 1.0},  {1.0, 0x1p24}, {1.0, 0x1p-24}, {tiny, tiny},  {1.0, tiny},      {0.0, 0.0},
            {0.0, 1e-3}, {nan, 1.0},    {nan, 0.0},     {infinity, 1}, {-infinity, 0.0}, {huge, 1.0}};
        for (const auto& [one, scale] : upstreams) {
          SCOPED_TRACE(::testing::Message() << dtype << normalize << smoothing << " " << one << " " << scale);
          torch::manual_seed(3);
          const auto upstream = [&] {
            const at::Tensor grad = (torch::randn({c.rows}, torch::kFloat64) * scale).to(p.acc());
            grad[4] = one;
            return grad;
          };
          BackwardRequest request;
          request.grad_other_lse = upstream();
          request.grad_target_logit = upstream().to(at::kDouble).flip(0); // any dtype and any strides
          request.grad_target_logit =
              torch::stack({*request.grad_target_logit, *request.grad_target_logit}, 1).select(1, 0);
          if (smoothing) {
            request.grad_logit_sum = upstream();
          }
          request.other_lse = forward.other_lse.clone();
          request.other_lse[5] = -infinity; // a row without another class
          request.record = forward.record;
          request.wanted = {true, true, p.bias.has_value(), false, false};
          const Gradients got = sweep_backward(p, request, one_pass);
          const Gradients expected = sweep_backward(p, request, by_parts);
          for (size_t i = 0; i < got.size(); ++i) {
            EXPECT_TRUE(torch::allclose(got[i], expected[i], /*rtol=*/0, /*atol=*/0, /*equal_nan=*/true)) << i;
          }
          request.grad_other_lse.reset(); // as autograd gives what has no gradient
          request.grad_logit_sum.reset();
          const Gradients of_target = sweep_backward(p, request, one_pass);
          const Gradients expected_of_target = sweep_backward(p, request, by_parts);
          for (size_t i = 0; i < got.size(); ++i) {
            EXPECT_TRUE(torch::allclose(of_target[i], expected_of_target[i], 0, 0, /*equal_nan=*/true)) << i;
          }
        }
      }
    }
  }
}

TEST_F(DeviceSweep, EmptyBatch) {
  Case c;
  c.compute_dtype = at::kHalf;
  LinearProblem p = make_problem(c);
  p.input = p.input.narrow(0, 0, 0);
  p.target = p.target.narrow(0, 0, 0);
  const ForwardResult forward = sweep_forward(p, {std::nullopt, false, 0}, kDevice);
  BackwardRequest request;
  request.other_lse = forward.other_lse;
  request.record = forward.record;
  request.wanted = {true, true, false, false, false};
  const Gradients gradients = sweep_backward(p, request, kDevice);
  EXPECT_EQ(gradients[1].abs().max().item<double>(), 0.0);
}

// Heads that change the other classes, one after the other: sums, the hardest classes and gradients as the CPU has
// them.
TEST_F(DeviceSweep, HeadsAgreeWithTheCpu) {
  const auto wide = at::TensorOptions(at::kDouble);
  const auto coefficients = [&](double a, double b, double d) { return at::tensor({a, b, d}, wide); };
  struct Head {
    std::string name;
    std::function<void(LinearProblem&)> set;
  };
  const std::vector<Head> heads{
      {"plain", [](LinearProblem&) {}},
      {"hard", [&](LinearProblem& p) { p.hard_coefficients = coefficients(1.0, 0.3, 0.0); }},
      {"masked",
       [&](LinearProblem& p) {
         p.hard_threshold = at::full({}, 0.2, wide);
         p.hard_coefficients = coefficients(0.0, 0.0, -std::numeric_limits<double>::infinity());
       }},
      {"biased",
       [&](LinearProblem& p) {
         p.hard_coefficients = coefficients(0.0, 1.2, 0.2);
         p.bias = torch::randn({61}, wide);
       }},
      {"hardest", [](LinearProblem& p) { p.hardest = 4; }},
      {"all of them", [](LinearProblem& p) { p.hardest = 70; }},
      {"one against all",
       [](LinearProblem& p) {
         p.binary = {BinaryKind::cosine, 0.2, 3.0};
       }},
      {"of angles", [](LinearProblem& p) {
         p.binary = {BinaryKind::angle, 0.2, 2.5};
       }}};
  for (const Head& head : heads) {
    for (const int64_t centers : {1, 3}) {
      for (const int64_t kept : {0, 61}) {
        SCOPED_TRACE(head.name + " with " + std::to_string(centers) + " centers, kept " + std::to_string(kept));
        Case c;
        c.dtype = at::kDouble;
        LinearProblem p = make_problem(c);
        p.weight = torch::randn({61 * centers, 13}, wide);
        p.sub_centers = centers;
        head.set(p);
        const bool smoothed = head.name != "masked" && !p.one_against_all();
        const auto on = [&](const Device& device) {
          Results r;
          r.forward = sweep_forward(p, {std::nullopt, smoothed || p.one_against_all(), kept}, device);
          torch::manual_seed(5);
          BackwardRequest request;
          request.grad_other_lse = torch::randn({9}, wide);
          request.grad_target_logit = torch::randn({9}, wide);
          if (smoothed) {
            request.grad_logit_sum = torch::randn({9}, wide) / 61;
          }
          if (p.hardest > 0) {
            request.grad_hardest_logit = torch::randn({9, p.hardest}, wide);
          }
          request.other_lse = r.forward.other_lse;
          request.hardest_class = r.forward.hardest_class;
          request.record = r.forward.record;
          request.wanted = {true, true, p.bias.has_value(), false, false};
          r.gradients = sweep_backward(p, request, device);
          return r;
        };
        const Results expected = on(cpu::device());
        set_workspace_limit(c10::DeviceType::CPU, 12 << 10); // several chunks: what one displaces another has found
        const Results got = on(kDevice);
        set_workspace_limit(c10::DeviceType::CPU, kDefaultWorkspaceLimit);
        // Some hundred float64 roundings of logits of 16, and of sums of 61 of them.
        const auto near = [](const at::Tensor& one, const at::Tensor& other) {
          return at::allclose(one, other, /*rtol=*/1e-10, /*atol=*/1e-10, /*equal_nan=*/true);
        };
        EXPECT_TRUE(near(got.forward.other_lse, expected.forward.other_lse));
        EXPECT_TRUE(near(got.forward.logit_sum, expected.forward.logit_sum));
        EXPECT_TRUE(near(got.forward.hardest_logit, expected.forward.hardest_logit));
        EXPECT_TRUE(near(got.forward.max_other_logit, expected.forward.max_other_logit));
        EXPECT_TRUE(at::equal(got.forward.hardest_class, expected.forward.hardest_class));
        for (size_t i = 0; i < 3; ++i) {
          EXPECT_TRUE(near(got.gradients[i], expected.gradients[i])) << "gradient " << i;
        }
      }
    }
  }
}

// Classes enough that every warp of a block has some of a row.
TEST_F(DeviceSweep, TheHardestOfManyClasses) {
  Case c;
  c.dtype = at::kDouble;
  c.classes = 600;
  LinearProblem p = make_problem(c);
  p.hardest = 40;
  const ForwardResult got = sweep_forward(p, {std::nullopt, false, 0}, kDevice);
  const ForwardResult expected = sweep_forward(p, {std::nullopt, false, 0}, cpu::device());
  EXPECT_TRUE(at::equal(got.hardest_class, expected.hardest_class));
  EXPECT_TRUE(at::allclose(got.other_lse, expected.other_lse, /*rtol=*/1e-10, /*atol=*/1e-10));
}

// The same in the dtypes that train, beside the CPU's in float64 on the same numbers. Data on which nothing flips: each
// row's threshold lies in the widest gap of its cosines, a class's two centers are opposite each other (so that they
// are equally near only where they weigh next to nothing), and all of the hardest have one upstream gradient.
//
// A cosine is off by the roundings of two operands and of a product of 13 of them, 8 units; a logit by `steepest` times
// scale times that, a log-sum-exp and a sum of softplus (beside their size) by no more, a weight by as much of itself
// and by its own rounding.
TEST_F(DeviceSweep, HeadsOfNarrowDtypesAreNearFloat64) {
  const auto wide = at::TensorOptions(at::kDouble);
  const auto coefficients = [&](double a, double b, double d) { return at::tensor({a, b, d}, wide); };
  struct Head {
    std::string name;
    double steepest; // of the logits' slopes in the cosine, at scale 1
    std::function<void(LinearProblem&, const at::Tensor& threshold)> set;
  };
  const std::vector<Head> heads{
      {"hard", 2.3,
       [&](LinearProblem& p, const at::Tensor& threshold) {
         p.hard_threshold = threshold;
         p.hard_coefficients = coefficients(1.0, 0.3, 0.0);
       }},
      {"steep", 6.0, // float16 weights and operands need their powers of two
       [&](LinearProblem& p, const at::Tensor& threshold) {
         p.hard_threshold = threshold;
         p.hard_coefficients = coefficients(2.0, 2.0, -1.0);
       }},
      {"masked", 1.0,
       [&](LinearProblem& p, const at::Tensor& threshold) {
         p.hard_threshold = threshold;
         p.hard_coefficients = coefficients(0.0, 0.0, -std::numeric_limits<double>::infinity());
       }},
      {"hardest", 1.0, [](LinearProblem& p, const at::Tensor&) { p.hardest = 70; }},
      {"one against all", 3.0,
       [](LinearProblem& p, const at::Tensor&) {
         p.binary = {BinaryKind::cosine, 0.2, 3.0};
       }},
      {"of whole powers", 2.0, [](LinearProblem& p, const at::Tensor&) {
         p.binary = {BinaryKind::before, 0.2, 2.0};
       }}};
  const std::vector<std::tuple<at::ScalarType, std::optional<at::ScalarType>, at::ScalarType>> dtypes{
      {at::kFloat, std::nullopt, at::kFloat},
      {at::kFloat, at::kHalf, at::kHalf},
      {at::kHalf, std::nullopt, at::kHalf},
      {at::kBFloat16, std::nullopt, at::kBFloat16}};
  constexpr double kScale = 16.0;
  for (const Head& head : heads) {
    for (const auto& [dtype, compute_dtype, operands] : dtypes) {
      for (const int64_t centers : {1, 2}) {
        const int64_t kept = centers == 1 ? 61 : 0;
        SCOPED_TRACE(
            head.name + " in " + at::toString(dtype) + " by " + at::toString(operands) + ", " +
            std::to_string(centers) + " centers, kept " + std::to_string(kept));
        Case c;
        c.dtype = dtype;
        c.compute_dtype = compute_dtype;
        LinearProblem p = make_problem(c);
        const at::Tensor base = p.weight;
        if (centers == 2) {
          p.weight = at::stack({base, -base}, 1).flatten(0, 1).contiguous();
        }
        p.sub_centers = centers;
        // Raw, and then the two ends of the widest gap that has something on both sides.
        at::Tensor cosines = at::matmul(
            at::linalg_vector_norm(p.input.to(wide), 2, at::IntArrayRef{1}, true).reciprocal() * p.input.to(wide),
            (base.to(wide) / at::linalg_vector_norm(base.to(wide), 2, at::IntArrayRef{1}, true)).t());
        cosines = std::get<0>((centers == 2 ? cosines.abs() : cosines).sort(1)).slice(1, 20, 58);
        const at::Tensor gaps = cosines.diff(1, 1);
        const at::Tensor place = gaps.argmax(1, /*keepdim=*/true);
        const at::Tensor threshold = (cosines.gather(1, place) + gaps.gather(1, place) / 2).squeeze(1);
        const double u = operands == at::kFloat ? 0x1p-24 : operands == at::kHalf ? 0x1p-11 : 0x1p-8;
        const double of_cosine = 8 * u;
        ASSERT_GT(gaps.amax(1).min().item<double>(), (operands == at::kBFloat16 ? 0.5 : 2.0) * of_cosine);
        head.set(p, threshold);
        const auto on = [&](const LinearProblem& problem, const Device& device, int64_t keep) {
          Results r;
          r.forward = sweep_forward(problem, {std::nullopt, p.one_against_all(), keep}, device);
          BackwardRequest request = upstream_of(c);
          request.grad_other_lse = request.grad_other_lse->to(problem.acc());
          request.grad_target_logit = request.grad_target_logit->to(problem.acc());
          if (p.hardest > 0) {
            request.grad_hardest_logit = request.grad_other_lse->unsqueeze(1).expand({c.rows, p.hardest}).contiguous();
          }
          request.other_lse = r.forward.other_lse;
          request.hardest_class = r.forward.hardest_class;
          request.record = r.forward.record;
          request.wanted = {true, true, false, false, false};
          r.gradients = sweep_backward(problem, request, device);
          return r;
        };
        const Results expected = on(widen(p), cpu::device(), 0);
        set_workspace_limit(c10::DeviceType::CPU, 64 << 10); // several chunks
        const Results got = on(p, kDevice, kept);
        set_workspace_limit(c10::DeviceType::CPU, kDefaultWorkspaceLimit);

        const double of_logit = head.steepest * kScale * of_cosine;
        const auto within = [](const at::Tensor& one, const at::Tensor& other, double bound, const char* what) {
          const at::Tensor zero = at::zeros({1}, other.options());
          const at::Tensor apart = at::where(one.eq(other), zero, (one - other).abs()).flatten();
          EXPECT_LE(at::cat({apart, zero}).max().item<double>(), bound) << what;
        };
        const double size = p.one_against_all() ? expected.forward.other_lse.max().item<double>() : 1.0;
        within(
            got.forward.other_lse, expected.forward.other_lse, (p.one_against_all() ? 61 : 1) * of_logit + size * u,
            "other_lse");
        within(got.forward.hardest_logit, expected.forward.hardest_logit, of_logit, "hardest_logit");
        for (size_t i = 0; i < 2; ++i) {
          const at::Tensor apart = got.gradients[i].to(at::kDouble) - expected.gradients[i];
          EXPECT_LE(
              apart.norm().item<double>(), 2 * (of_logit + of_cosine) * expected.gradients[i].norm().item<double>())
              << "gradient " << i;
          EXPECT_EQ(got.gradients[i].scalar_type(), dtype);
        }
        EXPECT_EQ(got.gradients[0][1].abs().max().item<double>(), 0.0); // without an upstream gradient
      }
    }
  }
}

} // namespace
