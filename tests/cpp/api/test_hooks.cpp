// What the losses do beside the op: state that moves once a step, margins of classes, rows that are not finite,
// penalties of rows, embeddings of 16 bits.
#include <c10/util/Exception.h>

#include <functional>

#include "api/losses.h"

namespace {

const float kNaN = std::numeric_limits<float>::quiet_NaN();

// Activation checkpointing: no graph in the forward, which the backward pass runs again.
struct Checkpoint : torch::autograd::Function<Checkpoint> {
  using Call = std::function<torch::Tensor(const torch::Tensor&)>;
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& x, Call* call) {
    context->save_for_backward({x});
    context->saved_data["call"] = reinterpret_cast<int64_t>(call);
    return (*call)(x);
  }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context,
      torch::autograd::variable_list gradients) {
    const torch::AutoGradMode with_grad(true);
    const torch::Tensor x = context->get_saved_variables()[0].detach().requires_grad_();
    (*reinterpret_cast<Call*>(context->saved_data["call"].toInt()))(x).backward(gradients[0]);
    return {x.grad(), torch::Tensor()};
  }
};

template <typename Loss>
void expect_checkpoints_change_nothing(Loss plain) {
  torch::manual_seed(5);
  Loss other(std::dynamic_pointer_cast<typename Loss::ContainedType>(plain->clone()));
  const torch::Tensor labels = torch::randint(0, 21, {9});
  Checkpoint::Call call = [&](const torch::Tensor& x) { return other->forward(x, labels); };
  for (int step = 0; step < 3; ++step) {
    const torch::Tensor x = (3 * torch::randn({2, 9, 6})).requires_grad_();
    const torch::Tensor y = x.detach().clone().requires_grad_();
    const torch::Tensor first = plain->forward(x[0], labels);
    const torch::Tensor second = plain->forward(x[1], labels);
    const torch::Tensor again = Checkpoint::apply(y[0], &call);
    const torch::Tensor and_again = Checkpoint::apply(y[1], &call);
    EXPECT_TRUE(torch::equal(again, first));
    EXPECT_TRUE(torch::equal(and_again, second));
    plain->zero_grad();
    other->zero_grad();
    (first + 2 * second).backward();
    (again + 2 * and_again).backward();
    EXPECT_TRUE(torch::equal(x.grad(), y.grad()));
    EXPECT_TRUE(torch::equal(plain->weight.grad(), other->weight.grad()));
    for (const auto& buffer : plain->named_buffers()) {
      EXPECT_TRUE(torch::equal(buffer.value(), other->named_buffers()[buffer.key()])) << buffer.key();
    }
  }
}

TEST(ModulesHooks, ARecomputeHasTheStateOfItsForward) {
  expect_checkpoints_change_nothing(
      nn::SphereFaceLoss(nn::SphereFaceLossOptions(6, 21).lambda_base(10).lambda_gamma(5).lambda_min(0)));
  expect_checkpoints_change_nothing(
      nn::LargeMarginSoftmaxLoss(nn::LargeMarginSoftmaxLossOptions(6, 21).lambda_base(10).lambda_gamma(5)));
  expect_checkpoints_change_nothing(nn::AdaFaceLoss(nn::AdaFaceLossOptions(6, 21).momentum(0.5)));
}

TEST(ModulesHooks, ACallThatFailsMovesNoState) {
  const Batch b;
  const torch::Tensor bad = torch::full({9}, 21);
  nn::AdaFaceLoss adaface(6, 21);
  nn::SphereFaceLoss sphereface(6, 21);
  EXPECT_THROW(adaface->forward(b.embeddings, bad), c10::IndexError);
  EXPECT_THROW(sphereface->forward(b.embeddings, bad), c10::IndexError);
  EXPECT_ERROR("expected weight to have shape [C, 5]", sphereface->forward(torch::randn({9, 5}), b.labels));
  EXPECT_ERROR("expected target to be int64", adaface->forward(b.embeddings, b.labels.to(torch::kInt)));
  EXPECT_ERROR("expected input to have shape [B, D]", adaface->forward(torch::randn({9}), b.labels));
  EXPECT_EQ(adaface->length_mean.item<double>(), 20.0);
  EXPECT_EQ(sphereface->step.item<int64_t>(), 0);
  adaface->eval();
  adaface->forward(b.embeddings, b.labels);
  EXPECT_EQ(adaface->length_mean.item<double>(), 20.0);
}

// A loss of one's own with a state, a penalty and the options of the base.
class CountingLossImpl : public nn::MarginLossImpl<CountingLossImpl> {
 public:
  CountingLossImpl() : nn::MarginLossImpl<CountingLossImpl>(nn::MarginLossOptions(6, 21).form(presets::cosface())) {
    reset();
  }
  void reset() override {
    MarginLossImpl::reset();
    calls = register_buffer("calls", torch::zeros({}, torch::kInt64));
  }
  torch::Tensor calls;

 protected:
  void advance(const torch::Tensor& /*embeddings*/, const torch::Tensor& /*labels*/) override {
    calls.add_(1);
  }
  torch::Tensor row_penalty(const torch::Tensor& embeddings, const torch::Tensor& /*labels*/) override {
    return calls * embeddings.square().sum(1);
  }
};
TORCH_MODULE(CountingLoss);

TEST(ModulesHooks, ALossOfOnesOwnHasThemAll) {
  torch::manual_seed(6);
  Batch b;
  b.labels[4] = -100;
  const torch::Tensor rows = b.embeddings.square().sum(1).masked_fill(b.labels == -100, 0);
  CountingLoss loss;
  const auto bare = [&](const std::string& reduction) {
    return F::linear_margin_cross_entropy(
        b.embeddings, loss->weight, b.labels,
        F::LinearMarginCrossEntropyFuncOptions(presets::cosface()).reduction(reduction));
  };
  EXPECT_TRUE(torch::equal(loss->forward(b.embeddings, b.labels), bare("mean") + rows.sum() / 8));
  loss->own_options().reduction("sum");
  EXPECT_TRUE(torch::equal(loss->forward(b.embeddings, b.labels), bare("sum") + (2 * rows).sum()));
  loss->own_options().reduction("none");
  EXPECT_TRUE(torch::equal(loss->forward_with_statistics(b.embeddings, b.labels).first, bare("none") + 3 * rows));
  const torch::Tensor before = loss->forward(b.embeddings, b.labels);
  loss->eval();
  EXPECT_TRUE(torch::equal(loss->forward(b.embeddings, b.labels), before));
  EXPECT_EQ(loss->calls.item<int64_t>(), 4);
  loss->own_options().form().margin.scale = 8;
  EXPECT_FALSE(torch::equal(loss->forward(b.embeddings, b.labels), before));
  std::stringstream archive;
  torch::save(loss, archive);
  CountingLoss loaded;
  torch::load(loaded, archive);
  EXPECT_EQ(loaded->own_options().form().margin.scale, 8.0);
  EXPECT_EQ(loaded->own_options().form().margin.m3, 0.35);
  EXPECT_EQ(loaded->calls.item<int64_t>(), 4);
}

template <typename Loss>
void expect_margins_of_classes(Loss loss, torchmargin::LossForm form, bool of_angle) {
  torch::manual_seed(7);
  Batch b;
  b.labels[4] = -100;
  const torch::Tensor margins = 0.5 * torch::rand({21});
  const torch::Tensor of_rows = margins.to(torch::kFloat64).index_select(0, b.labels.clamp(0, 20));
  loss->options.class_margins(margins);
  F::LinearMarginFuncOptions options(form);
  (of_angle ? options.sample_m2() : options.sample_m3()) = of_rows;
  EXPECT_TRUE(torch::equal(
      loss->forward(b.embeddings, b.labels),
      F::linear_margin_cross_entropy(b.embeddings, loss->weight, b.labels, options)));
  EXPECT_THROW(loss->forward(b.embeddings, torch::full({9}, 21)), c10::IndexError);
  EXPECT_NE(printed(loss).find("margin=one of each class"), std::string::npos);

  std::stringstream archive;
  torch::save(loss, archive);
  EXPECT_EQ(loss->named_buffers()["margin"].sizes(), torch::IntArrayRef{21});
  Loss loaded(6, 21);
  torch::load(loaded, archive);
  EXPECT_TRUE(torch::equal(loaded->options.class_margins(), margins.to(torch::kFloat64)));
  EXPECT_TRUE(torch::equal(loaded->forward(b.embeddings, b.labels), loss->forward(b.embeddings, b.labels)));
  Loss copy(std::dynamic_pointer_cast<typename Loss::ContainedType>(loaded->clone()));
  copy->options.class_margins().zero_();
  EXPECT_TRUE(torch::equal(loaded->forward(b.embeddings, b.labels), loss->forward(b.embeddings, b.labels)));
  EXPECT_FALSE(torch::equal(copy->forward(b.embeddings, b.labels), loss->forward(b.embeddings, b.labels)));
  // One margin for all takes their place.
  std::stringstream one;
  torch::save(Loss(6, 21), one);
  torch::load(loaded, one);
  EXPECT_FALSE(loaded->options.class_margins().defined());
  EXPECT_EQ(loaded->named_buffers()["margin"].dim(), 0);

  const auto refused = [&](const torch::Tensor& bad) {
    loaded->options.class_margins(bad);
    return error_of([&] { loaded->forward(b.embeddings, b.labels); });
  };
  EXPECT_EQ(refused(torch::zeros({20})), "expected class_margins to have shape [21], but got [20]");
  EXPECT_NE(refused(torch::zeros({21}, torch::kLong)).find("class_margins to hold floating-point"), std::string::npos);
  EXPECT_NE(refused(torch::zeros({21}).requires_grad_()).find("class_margins not to require grad"), std::string::npos);
  const torch::Tensor edited = torch::zeros({21});
  EXPECT_EQ(refused(edited), "no error");
  for (const float bad : {28.6F, kNaN}) {
    edited[20] = bad; // in place
    EXPECT_NE(refused(edited).find("expected class_margins to be finite and at most pi in size"), std::string::npos);
    EXPECT_ERROR("class_margins", Loss(loaded->options));
  }
}

TEST(ModulesHooks, MarginsOfClasses) {
  expect_margins_of_classes(nn::ArcFaceLoss(6, 21), presets::arcface(64.0, 0.0), /*of_angle=*/true);
  expect_margins_of_classes(nn::CosFaceLoss(6, 21), presets::cosface(64.0, 0.0), /*of_angle=*/false);
}

TEST(ModulesHooks, AdaFaceForgetsWhatIsNotFinite) {
  torch::manual_seed(8);
  const torch::Tensor x = 3 * torch::randn({8, 6});
  const torch::Tensor labels = torch::randint(0, 21, {8});
  for (const float value : {kNaN, std::numeric_limits<float>::infinity()}) {
    nn::AdaFaceLoss loss(nn::AdaFaceLossOptions(6, 21).reduction("none"));
    nn::AdaFaceLoss without(nn::AdaFaceLossOptions(6, 21).reduction("none"));
    torch::Tensor bad = x.clone();
    bad[2][3] = value;
    EXPECT_EQ(loss->forward(bad, labels).isnan().sum().item<int64_t>(), 1);
    EXPECT_EQ(loss->forward(x, labels).isnan().sum().item<int64_t>(), 0);
    torch::Tensor ignored = labels.clone();
    ignored[2] = -100;
    without->forward(bad, ignored);
    without->forward(x, labels);
    EXPECT_TRUE(torch::equal(loss->length_mean, without->length_mean));
    EXPECT_TRUE(torch::equal(loss->length_std, without->length_std));
  }
}

struct MagFaceHooks : nn::MagFaceLossImpl {
  using nn::MagFaceLossImpl::MagFaceLossImpl;
  using nn::MagFaceLossImpl::row_penalty;
  using nn::MagFaceLossImpl::sample_margins;
};

TEST(ModulesHooks, AMaskedRowOfMagFaceHasNoGradient) {
  torch::manual_seed(9);
  for (const float value : {kNaN, std::numeric_limits<float>::infinity()}) {
    Batch b;
    b.embeddings.data()[2][3] = value;
    MagFaceHooks hooks(nn::MagFaceLossOptions(6, 21).a_min(1).a_max(5).reduction("none"));
    EXPECT_EQ(hooks.forward(b.embeddings, b.labels).isnan().sum().item<int64_t>(), 1);
    torch::Tensor upstream = torch::ones({9});
    upstream[2] = 0; // a masked loss
    const torch::Tensor margins = *hooks.sample_margins(b.embeddings, b.labels).m2;
    const torch::Tensor penalty = hooks.row_penalty(b.embeddings, b.labels);
    for (const torch::Tensor& rows : {margins, penalty}) {
      EXPECT_TRUE(rows[2].isnan().item<bool>());
      const torch::Tensor gradient = torch::autograd::grad({rows}, {b.embeddings}, {upstream})[0];
      EXPECT_TRUE(gradient.isfinite().all().item<bool>());
      EXPECT_EQ(gradient[2].abs().max().item<double>(), 0.0);
      EXPECT_GT(gradient.abs().max().item<double>(), 0.0);
    }
  }
}

struct Warnings : c10::WarningHandler {
  void process(const c10::Warning& warning) override {
    texts.push_back(warning.msg());
  }
  std::vector<std::string> texts;
};

template <typename Loss>
std::vector<std::string> warnings_of(Loss loss, const std::vector<torch::Tensor>& batches) {
  Warnings warnings;
  const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
  for (const torch::Tensor& batch : batches) {
    loss->forward(batch, torch::arange(batch.size(0)));
  }
  return warnings.texts;
}

TEST(ModulesHooks, UnitLengthsAreWarnedOfOnce) {
  torch::manual_seed(10);
  const torch::Tensor unit = torch::nn::functional::normalize(torch::randn({4, 6}));
  const std::string text =
      ": the embeddings are already of length 1; it reads the quality of an image from the length, so give it the "
      "network's output before any normalisation";
  EXPECT_EQ(warnings_of(nn::AdaFaceLoss(6, 21), {unit, unit}), std::vector<std::string>{"AdaFaceLoss" + text});
  EXPECT_EQ(warnings_of(nn::MagFaceLoss(6, 21), {unit, unit}), std::vector<std::string>{"MagFaceLoss" + text});
  const std::vector<std::string> none;
  EXPECT_EQ(warnings_of(nn::AdaFaceLoss(6, 21), {2 * unit, unit}), none); // the first forward only
  EXPECT_EQ(warnings_of(nn::AdaFaceLoss(6, 21), {unit.narrow(0, 0, 1)}), none); // two rows at least
  EXPECT_EQ(warnings_of(nn::ArcFaceLoss(6, 21), {unit}), none);
  nn::MagFaceLoss evaluated(6, 21);
  evaluated->eval();
  EXPECT_EQ(warnings_of(evaluated, {unit}), none);
}

TEST(ModulesHooks, SixteenBitEmbeddingsBesideAFloat32Weight) {
  for (const torch::Dtype dtype : {torch::kHalf, torch::kBFloat16}) {
    with_every_loss([&](auto loss) {
      torch::manual_seed(11);
      const torch::Tensor narrow = (2 * torch::randn({9, 6})).to(dtype).requires_grad_();
      const torch::Tensor labels = torch::randint(0, 21, {9});
      const torch::Tensor wide = narrow.detach().to(torch::kFloat32).requires_grad_();
      const auto copy = std::dynamic_pointer_cast<typename decltype(loss)::ContainedType>(loss->clone());
      const torch::Tensor value = loss->forward(narrow, labels);
      EXPECT_TRUE(torch::equal(value, copy->forward(wide, labels))) << loss->name(); // the CPU's products are float32
      EXPECT_EQ(loss->forward_with_statistics(narrow, labels).first.scalar_type(), torch::kFloat32);
      EXPECT_TRUE(torch::equal(loss->logits(narrow), copy->logits(wide)));
      value.backward();
      EXPECT_EQ(narrow.grad().scalar_type(), dtype);
      EXPECT_EQ(loss->weight.grad().scalar_type(), torch::kFloat32);
    });
  }
  nn::ArcFaceLoss wide(6, 21);
  wide->to(torch::kFloat64);
  EXPECT_ERROR("expected weight to have the dtype of input", wide->logits(torch::randn({2, 6})));
}

} // namespace
