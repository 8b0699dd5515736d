// Options are live: a change counts from the next call on, and is checked like the constructor's.
#include "api/losses.h"

namespace {

const double kNaN = std::numeric_limits<double>::quiet_NaN();
const double kInfinity = std::numeric_limits<double>::infinity();

TEST(ModulesOptions, AreReadAtEachCall) {
  with_every_loss([](auto loss) {
    torch::manual_seed(1);
    const Batch b;
    const torch::Tensor before = loss->forward(b.embeddings, b.labels);
    shrink_numbers(loss);
    const bool softmax = !loss->margin_loss_options().one_against_all().has_value();
    loss->options.label_smoothing(softmax ? 0.2 : 0.0)
        .ignore_index(b.labels[0].template item<int64_t>())
        .reduction("sum");
    decltype(loss) built(loss->options);
    built->weight.data().copy_(loss->weight);
    if (auto state = loss->named_buffers(); state.contains("t") && loss->saved_numbers().size() == 3 &&
        state["t"].scalar_type() == torch::kFloat32) { // CurricularFace's
      built->named_buffers()["t"].copy_(state["t"]);
    } else if (state.contains("step")) { // the annealing goes on
      built->named_buffers()["step"].copy_(state["step"]);
    } else if (state.contains("length_mean")) {
      built->named_buffers()["length_mean"].copy_(state["length_mean"]);
      built->named_buffers()["length_std"].copy_(state["length_std"]);
    }
    EXPECT_EQ(printed(loss), printed(built));
    EXPECT_TRUE(torch::equal(loss->logits(b.embeddings), built->logits(b.embeddings)));
    const torch::Tensor after = loss->forward(b.embeddings, b.labels);
    EXPECT_TRUE(torch::equal(after, built->forward(b.embeddings, b.labels))) << loss->name();
    EXPECT_FALSE(torch::equal(after, before)) << loss->name();
  });
}

TEST(ModulesOptions, ChoicesAreLiveToo) {
  torch::manual_seed(2);
  const Batch b;
  nn::ElasticFaceLoss elastic(nn::ElasticFaceLossOptions(6, 21).deviation(0));
  elastic->options.kind("cos").margin(0.35);
  nn::CosFaceLoss cosface(6, 21);
  cosface->weight.data().copy_(elastic->weight);
  EXPECT_TRUE(torch::equal(elastic->forward(b.embeddings, b.labels), cosface->forward(b.embeddings, b.labels)));
  nn::ArcFaceLoss arcface(nn::ArcFaceLossOptions(6, 21).margin(2.5));
  const torch::Tensor linear = arcface->forward(b.embeddings, b.labels);
  arcface->options.extension(torchmargin::Extension::none);
  EXPECT_FALSE(torch::equal(linear, arcface->forward(b.embeddings, b.labels)));
  EXPECT_NE(printed(arcface).find("m2=2.5"), std::string::npos);
  EXPECT_NE(printed(arcface).find("extension='none'"), std::string::npos);
}

TEST(ModulesOptions, AreCheckedAtEachCallAsByTheConstructor) {
  const Batch b;
  nn::ArcFaceLoss arcface(6, 21);
  arcface->options.margin(28.6);
  EXPECT_ERROR("expected margin in radians, not degrees", arcface->forward(b.embeddings, b.labels));
  EXPECT_ERROR("expected margin in radians, not degrees", arcface->forward_with_statistics(b.embeddings, b.labels));
  EXPECT_ERROR("expected margin in radians, not degrees", arcface->logits(b.embeddings));
  EXPECT_ERROR("expected margin in radians, not degrees", printed(arcface));
  EXPECT_ERROR("expected margin in radians, not degrees", arcface->clone());
  nn::CombinedMarginLoss combined(6, 21);
  combined->options.m1(-1);
  EXPECT_ERROR("expected m1 > 0, but got -1", combined->forward(b.embeddings, b.labels));
  EXPECT_ERROR("expected m1 > 0, but got -1", combined->logits(b.embeddings));
  nn::MagFaceLoss magface(6, 21);
  magface->options.a_max(5);
  EXPECT_ERROR("expected 0 < a_min < a_max, but got 10 and 5", magface->forward(b.embeddings, b.labels));
  nn::ElasticFaceLoss elastic(6, 21);
  elastic->options.kind("sin");
  EXPECT_ERROR("expected kind to be 'arc' or 'cos'", elastic->forward(b.embeddings, b.labels));
  nn::SphereFaceLoss sphereface(6, 21);
  sphereface->options.lambda_base(-1);
  EXPECT_ERROR("expected lambda_base to be finite and not negative", sphereface->forward(b.embeddings, b.labels));
  EXPECT_EQ(sphereface->step.item<int64_t>(), 0);
}

TEST(ModulesOptions, NumbersAreCheckedAll) {
  EXPECT_ERROR("expected h to be finite, but got nan", nn::AdaFaceLoss(nn::AdaFaceLossOptions(6, 21).h(kNaN)));
  for (const double momentum : {-0.1, 1.5, kNaN}) {
    EXPECT_ERROR(
        "expected momentum in [0, 1], but got", nn::AdaFaceLoss(nn::AdaFaceLossOptions(6, 21).momentum(momentum)));
  }
  EXPECT_ERROR(
      "expected regularizer to be finite, but got inf",
      nn::MagFaceLoss(nn::MagFaceLossOptions(6, 21).regularizer(kInfinity)));
  EXPECT_ERROR("expected a_max to be finite", nn::MagFaceLoss(nn::MagFaceLossOptions(6, 21).a_max(kInfinity)));
  EXPECT_ERROR(
      "expected deviation to be finite, but got inf",
      nn::ElasticFaceLoss(nn::ElasticFaceLossOptions(6, 21).deviation(kInfinity)));
  with_every_loss([](auto loss) {
    for (const nn::SavedNumber& number : loss->saved_numbers()) {
      const double value = std::exchange(*number.value, kNaN);
      EXPECT_ERROR("expected", loss->margin_loss_options(), decltype(loss)(loss->options)) << number.name;
      *number.value = value;
    }
  });
}

// Of 21 classes, the first of which counts for nothing.
torch::Tensor class_weights() {
  return torch::linspace(0, 2, 21);
}

TEST(ModulesOptions, WeightsOfClassesAreThoseOfCrossEntropy) {
  torch::manual_seed(4);
  const Batch b;
  b.labels[3] = -100;
  const torch::Tensor counts =
      torch::where(b.labels.eq(-100), torch::zeros({}), class_weights().index_select(0, b.labels.clamp(0)));
  with_every_loss([&](auto loss) {
    loss->eval(); // its state stays as it is
    const auto value = [&](const std::string& reduction, const torch::Tensor& weights) {
      loss->options.reduction(reduction).class_weight(weights);
      return loss->forward(b.embeddings, b.labels).detach().to(torch::kDouble);
    };
    // Losses, products and sums are rounded to float32 once each.
    const auto expect_near = [&](const torch::Tensor& found, const torch::Tensor& expected) {
      EXPECT_TRUE(torch::allclose(found, expected, /*rtol=*/1e-6, /*atol=*/0)) << loss->name();
    };
    const torch::Tensor rows = counts.to(torch::kDouble) * value("none", {});
    expect_near(value("none", class_weights()), rows);
    expect_near(value("sum", class_weights()), rows.sum());
    expect_near(value("mean", class_weights()), rows.sum() / counts.sum());
    const auto [mean, statistics] = loss->forward_with_statistics(b.embeddings, b.labels);
    expect_near(mean.detach().to(torch::kDouble), rows.sum() / counts.sum());
    EXPECT_FALSE(torch::equal(value("mean", {}), value("mean", class_weights()))) << loss->name();
  });
}

TEST(ModulesOptions, WeightsOfClassesAreChecked) {
  const Batch b;
  const auto with = [](const torch::Tensor& weights) { return nn::ArcFaceLossOptions(6, 21).class_weight(weights); };
  EXPECT_ERROR("expected class_weight to have shape [21], but got [20]", nn::ArcFaceLoss(with(torch::ones({20}))));
  EXPECT_ERROR(
      "expected class_weight to hold floating-point numbers, but got Long",
      nn::ArcFaceLoss(with(torch::ones({21}, torch::kLong))));
  EXPECT_ERROR("expected class_weight not to require grad", nn::ArcFaceLoss(with(class_weights().requires_grad_())));
  EXPECT_ERROR(
      "expected no label_smoothing with class_weight", nn::ArcFaceLoss(with(class_weights()).label_smoothing(0.1)));
  EXPECT_ERROR(
      "expected class_weight to be finite and not negative, but got -2",
      nn::ArcFaceLoss(with(-class_weights().flip(0))));
  nn::ArcFaceLoss loss(with(class_weights()));
  loss->forward(b.embeddings, b.labels);
  loss->options.class_weight().data()[2] = kNaN;
  loss->options.class_weight().add_(0); // what is changed in place is seen by its version
  EXPECT_ERROR(
      "expected class_weight to be finite and not negative, but got nan", loss->forward(b.embeddings, b.labels));
  loss->options.class_weight(torch::ones({20}));
  EXPECT_ERROR("expected class_weight to have shape [21]", loss->forward(b.embeddings, b.labels));
  nn::SphereFace2Loss binary(nn::SphereFace2LossOptions(6, 21).class_weight(class_weights()));
  binary->options.class_weight(torch::ones({20}));
  EXPECT_ERROR("expected class_weight to have shape [21]", binary->forward(b.embeddings, b.labels));
}

TEST(ModulesOptions, SizesBelongToTheWeight) {
  const Batch b;
  for (const int which : {0, 1, 2}) {
    nn::SoftmaxLoss loss(6, 21);
    if (which == 2) {
      loss->options.bias(false);
    } else {
      (which == 0 ? loss->options.in_features() : loss->options.num_classes()) = 22;
    }
    EXPECT_ERROR("since they belong to the weight: 6, 21 and 1, but got", loss->forward(b.embeddings, b.labels));
    EXPECT_ERROR("expected in_features, num_classes and bias to stay", loss->logits(b.embeddings));
  }
}

} // namespace
