// The loss modules: against the functional op, training, cloning, serialisation, what differs from row to row, and
// errors.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "api/losses.h"

namespace {

TEST(Modules, AreTheFunctionalOp) {
  torch::manual_seed(1);
  const Batch b;
  nn::ArcFaceLoss loss(nn::ArcFaceLossOptions(6, 21).scale(64).margin(0.5).label_smoothing(0.1).ignore_index(
      b.labels[0].item<int64_t>()));
  const auto options = F::LinearMarginCrossEntropyFuncOptions(presets::arcface())
                           .label_smoothing(0.1)
                           .ignore_index(b.labels[0].item<int64_t>());
  EXPECT_TRUE(torch::equal(
      loss->forward(b.embeddings, b.labels),
      F::linear_margin_cross_entropy(b.embeddings, loss->weight, b.labels, options)));
  const auto [value, statistics] = loss->forward_with_statistics(b.embeddings, b.labels);
  EXPECT_TRUE(torch::equal(value, loss->forward(b.embeddings, b.labels)));
  EXPECT_GT(statistics.target_angle.item<double>(), 0.0);
  const torch::Tensor logits = loss->logits(b.embeddings);
  const torch::Tensor cosine = torch::nn::functional::linear(
      torch::nn::functional::normalize(b.embeddings), torch::nn::functional::normalize(loss->weight));
  // D roundings in a product; two rows to unit length, 8 more here, D + 4 in ATen's ops. All of float32.
  EXPECT_LT((logits - 64 * cosine).abs().max().item<double>(), 64 * (2 * 6 + 8 + 6 + 4) * 0x1p-24);
}

TEST(Modules, FunctionsOnCosinesAndLogits) {
  torch::manual_seed(2);
  Batch b;
  b.embeddings = b.embeddings.detach().to(torch::kFloat64);
  const torch::Tensor weight = torch::randn({21, 6}, torch::kFloat64);
  const torchmargin::LossForm form = presets::cosface(16.0, 0.2);
  const torch::Tensor cosine =
      F::margin_logits(b.embeddings, weight, std::nullopt, F::LinearMarginFuncOptions()).detach();
  const torch::Tensor of_cosine = F::margin_cross_entropy(cosine, b.labels, form);
  // Each way makes logits of up to 16 by D + 8 roundings, an angle by 4 D + 24, and a log-sum-exp of 21 of them.
  const double tolerance = 2 * 16 * ((6 + 8) + (4 * 6 + 24) + 21) * 0x1p-53;
  EXPECT_NEAR(
      of_cosine.item<double>(), F::linear_margin_cross_entropy(b.embeddings, weight, b.labels, form).item<double>(),
      tolerance);
  const torch::Tensor logits = F::margin_logits(b.embeddings, weight, b.labels, form);
  EXPECT_NEAR(
      of_cosine.item<double>(), torch::nn::functional::cross_entropy(logits, b.labels).item<double>(), tolerance);
  // A difference here, four of numbers below 2 there.
  EXPECT_LT((F::margin_transform(cosine, form.margin) - (cosine - 0.2)).abs().max().item<double>(), 5 * 2 * 0x1p-53);
}

TEST(Modules, TrainAndSurviveSavingAndCloning) {
  torch::manual_seed(3);
  const Batch b;
  torch::nn::Sequential network(torch::nn::Linear(6, 6));
  nn::SphereFaceLoss loss(nn::SphereFaceLossOptions(6, 21).margin(3).lambda_base(10));
  std::vector<torch::Tensor> parameters = network->parameters();
  for (const torch::Tensor& parameter : loss->parameters()) {
    parameters.push_back(parameter);
  }
  torch::optim::Adam optimiser(parameters, torch::optim::AdamOptions(0.05));
  double first = 0.0;
  double last = 0.0;
  for (int step = 0; step < 60; ++step) {
    const torch::Tensor value = loss->forward(network->forward(b.embeddings), b.labels);
    optimiser.zero_grad();
    value.backward();
    optimiser.step();
    (step == 0 ? first : last) = value.item<double>();
  }
  EXPECT_LT(last, 0.7 * first);
  EXPECT_EQ(loss->step.item<int64_t>(), 60);
  EXPECT_EQ(loss->annealing_lambda().item<double>(), 5.0); // held at lambda_min

  std::stringstream archive;
  torch::save(loss, archive);
  nn::SphereFaceLoss loaded(loss->options);
  torch::load(loaded, archive);
  EXPECT_TRUE(torch::equal(loaded->weight, loss->weight));
  EXPECT_EQ(loaded->step.item<int64_t>(), 60);
  const auto copy = std::dynamic_pointer_cast<nn::SphereFaceLossImpl>(loss->clone());
  loss->weight.data().zero_();
  EXPECT_TRUE(torch::equal(copy->weight, loaded->weight));
  loaded->to(torch::kFloat64);
  EXPECT_EQ(loaded->forward(b.embeddings.to(torch::kFloat64), b.labels).scalar_type(), torch::kFloat64);
}

TEST(Modules, StateDictsRoundTripAndRefuseWhatDoesNotFit) {
  const std::string path = (std::filesystem::temp_directory_path() / "torchmargin_state_dict_test.pt").string();
  nn::AdaFaceLoss loss(6, 21);
  loss->length_mean.fill_(3.0);
  torchmargin::save_state_dict(*loss, path);
  nn::AdaFaceLoss other(6, 21);
  torchmargin::load_state_dict(*other, path);
  EXPECT_TRUE(torch::equal(other->weight, loss->weight));
  EXPECT_EQ(other->length_mean.item<double>(), 3.0);
  EXPECT_TRUE(other->weight.requires_grad());
  EXPECT_ERROR("load_state_dict: the module has no 'h'", {
    nn::ArcFaceLoss arcface(6, 21);
    torchmargin::load_state_dict(*arcface, path);
  });
  EXPECT_ERROR("expected 'weight' to have shape [22, 6], but", {
    nn::AdaFaceLoss larger(6, 22);
    torchmargin::load_state_dict(*larger, path);
  });
  torchmargin::save_state_dict(*nn::ArcFaceLoss(6, 21), path);
  EXPECT_ERROR("has no 'length_mean'", torchmargin::load_state_dict(*other, path));
  EXPECT_ERROR("cannot read", torchmargin::load_state_dict(*other, path + ".none"));
  const std::vector<char> bytes = torch::pickle_save(torch::zeros({2}));
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  EXPECT_ERROR("to hold a plain dict of tensors", torchmargin::load_state_dict(*other, path));
  EXPECT_ERROR("cannot write", torchmargin::save_state_dict(*other, "/nowhere/at/all.pt"));
  std::filesystem::remove(path);
}

TEST(Modules, MarginsThatDifferFromRowToRow) {
  torch::manual_seed(4);
  Batch b;
  b.labels[2] = -100;
  b.embeddings.data()[2].fill_(std::numeric_limits<float>::quiet_NaN()); // ignored, whatever it holds
  nn::AdaFaceLoss adaface(6, 21);
  nn::MagFaceLoss magface(nn::MagFaceLossOptions(6, 21).a_min(1).a_max(5));
  nn::ElasticFaceLoss elastic(nn::ElasticFaceLossOptions(6, 21).kind("cos").margin(0.35));
  for (const torch::Tensor& value :
       {adaface->forward(b.embeddings, b.labels), magface->forward(b.embeddings, b.labels),
        elastic->forward(b.embeddings, b.labels)}) {
    EXPECT_TRUE(torch::isfinite(value).item<bool>());
    const torch::Tensor gradient = torch::autograd::grad({value}, {b.embeddings})[0];
    EXPECT_TRUE(torch::isfinite(gradient).all().item<bool>());
    EXPECT_EQ(gradient[2].abs().max().item<double>(), 0.0);
  }
  EXPECT_NE(adaface->length_mean.item<double>(), 20.0);
  const torch::Tensor drawn = elastic->forward(b.embeddings, b.labels);
  EXPECT_FALSE(torch::equal(drawn, elastic->forward(b.embeddings, b.labels)));
  elastic->eval();
  EXPECT_TRUE(torch::equal(elastic->forward(b.embeddings, b.labels), elastic->forward(b.embeddings, b.labels)));
}

// A loss of one's own, as margin_loss.h says.
class LengthMarginLossImpl : public nn::MarginLossImpl<LengthMarginLossImpl> {
 public:
  LengthMarginLossImpl(int64_t in_features, int64_t num_classes)
      : nn::MarginLossImpl<LengthMarginLossImpl>(
            nn::MarginLossOptions(in_features, num_classes).form(presets::normalized_softmax(16.0))) {
    reset();
  }

 protected:
  nn::SampleMargins sample_margins(const torch::Tensor& embeddings, const torch::Tensor& /*labels*/) override {
    nn::SampleMargins margins;
    margins.m3 = 0.1 * embeddings.norm(2, 1).detach();
    return margins;
  }
};
TORCH_MODULE(LengthMarginLoss);

TEST(Modules, ALossOfOnesOwn) {
  const Batch b;
  LengthMarginLoss loss(6, 21);
  const auto options =
      F::LinearMarginFuncOptions(presets::normalized_softmax(16.0)).sample_m3(0.1 * b.embeddings.norm(2, 1).detach());
  EXPECT_TRUE(torch::equal(
      loss->forward(b.embeddings, b.labels),
      F::linear_margin_cross_entropy(b.embeddings, loss->weight, b.labels, options)));
  EXPECT_NE(std::dynamic_pointer_cast<LengthMarginLossImpl>(loss->clone()), nullptr);
}

TEST(Modules, Errors) {
  const Batch b;
  EXPECT_ERROR("expected in_features and num_classes to be positive, but got 0 and 21", nn::ArcFaceLoss(0, 21));
  EXPECT_ERROR("expected scale > 0, but got -1", nn::ArcFaceLoss(nn::ArcFaceLossOptions(6, 21).scale(-1)));
  EXPECT_ERROR("expected margin in radians, not degrees", nn::ArcFaceLoss(nn::ArcFaceLossOptions(6, 21).margin(28.6)));
  EXPECT_ERROR("to be a difference of cosines", nn::CosFaceLoss(nn::CosFaceLossOptions(6, 21).margin(20)));
  EXPECT_ERROR("expected m2 in radians", nn::CombinedMarginLoss(nn::CombinedMarginLossOptions(6, 21).m2(20)));
  EXPECT_ERROR("expected lambda_min to be finite", nn::SphereFaceLoss(nn::SphereFaceLossOptions(6, 21).lambda_min(-1)));
  EXPECT_ERROR("expected 0 < a_min < a_max, but got 10 and 5", nn::MagFaceLoss(nn::MagFaceLossOptions(6, 21).a_max(5)));
  EXPECT_ERROR("expected kind to be 'arc' or 'cos'", nn::ElasticFaceLoss(nn::ElasticFaceLossOptions(6, 21).kind("x")));
  EXPECT_ERROR(
      "expected deviation not to be negative", nn::ElasticFaceLoss(nn::ElasticFaceLossOptions(6, 21).deviation(-1)));
  EXPECT_ERROR(
      "expected margin in radians", nn::SphereFace2Loss(nn::SphereFace2LossOptions(6, 21).kind("a").margin(11)));
  EXPECT_ERROR("expected no label_smoothing", nn::UniFaceLoss(nn::UniFaceLossOptions(6, 21).label_smoothing(0.1)));
  EXPECT_ERROR("expected reduction to be", nn::ArcFaceLoss(nn::ArcFaceLossOptions(6, 21).reduction("average")));
  EXPECT_ERROR("label_smoothing", nn::ArcFaceLoss(nn::ArcFaceLossOptions(6, 21).label_smoothing(2)));
  nn::ArcFaceLoss loss(6, 21);
  EXPECT_ERROR("expected weight to have shape [C, 5], but got [21, 6]", loss->forward(torch::randn({9, 5}), b.labels));
  EXPECT_THROW(loss->forward(b.embeddings, torch::full({9}, 21)), c10::IndexError);
  nn::SphereFace2Loss one_against_all(6, 21);
  EXPECT_THROW(one_against_all->forward(b.embeddings, torch::full({9}, 21)), c10::IndexError);
  std::stringstream printed;
  printed << *loss;
  EXPECT_NE(printed.str().find("ArcFaceLoss"), std::string::npos);
  EXPECT_NE(printed.str().find("(in_features=6, num_classes=21, scale=64, m1=1, m2=0.5"), std::string::npos);
  EXPECT_EQ(printed.str().find("class_weight"), std::string::npos);
  loss->options.class_weight(torch::ones(21));
  printed << *loss;
  EXPECT_NE(printed.str().find("bias=false, class_weight=one of each class)"), std::string::npos);
}

} // namespace
