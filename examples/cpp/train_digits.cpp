// Trains a small network on real digits with any of torchmargin's losses, then verifies pairs of digits that it has
// never seen (7, 8, 9) by the cosine of their embeddings, saves the model, loads it again and verifies once more.
//
//   train_digits --data examples/data/digits.csv --loss arcface --network conv --epochs 20 --device cpu --output
//   digits.pt
#include <torch/torch.h>
#include <torchmargin/torchmargin.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <functional>
#include <iostream>
#include <map>
#include <string>

#include "common/arguments.h"
#include "common/digits.h"
#include "common/verification.h"

namespace nn = torchmargin::nn;

namespace {

constexpr int64_t kFeatures = 32;
constexpr int64_t kTrainedClasses = 7; // 0 to 6
constexpr int64_t kBatch = 128;

torch::nn::Sequential make_network(const std::string& name) {
  namespace t = torch::nn;
  if (name == "mlp") {
    return t::Sequential(
        t::Flatten(), t::Linear(64, 128), t::ReLU(), t::Linear(128, 128), t::ReLU(), t::Linear(128, kFeatures));
  }
  if (name == "conv") {
    return t::Sequential(
        t::Conv2d(t::Conv2dOptions(1, 32, 3).padding(1).bias(false)), t::BatchNorm2d(32), t::PReLU(),
        t::Conv2d(t::Conv2dOptions(32, 64, 3).padding(1).stride(2).bias(false)), t::BatchNorm2d(64), t::PReLU(),
        t::Flatten(), t::Linear(64 * 4 * 4, kFeatures));
  }
  throw std::invalid_argument("there is no network '" + name + "': mlp or conv");
}

// With the scales and margins that suit seven classes.
torch::nn::AnyModule make_loss(const std::string& name) {
  constexpr int64_t d = kFeatures;
  constexpr int64_t c = kTrainedClasses;
  using torch::nn::AnyModule;
  const std::map<std::string, std::function<AnyModule()>> losses{
      {"softmax", [=] { return AnyModule(nn::SoftmaxLoss(d, c)); }},
      {"modified-softmax", [=] { return AnyModule(nn::ModifiedSoftmaxLoss(d, c)); }},
      {"normalized-softmax",
       [=] { return AnyModule(nn::NormalizedSoftmaxLoss(nn::NormalizedSoftmaxLossOptions(d, c).scale(16))); }},
      {"sphereface",
       [=] { return AnyModule(nn::SphereFaceLoss(nn::SphereFaceLossOptions(d, c).margin(2).lambda_base(100))); }},
      {"sphereface-r", [=] { return AnyModule(nn::SphereFaceLoss(nn::SphereFaceLossOptions::normalized(d, c))); }},
      {"l-softmax",
       [=] {
         return AnyModule(
             nn::LargeMarginSoftmaxLoss(nn::LargeMarginSoftmaxLossOptions(d, c).margin(2).lambda_base(100)));
       }},
      {"cosface", [=] { return AnyModule(nn::CosFaceLoss(nn::CosFaceLossOptions(d, c).scale(16).margin(0.2))); }},
      {"arcface", [=] { return AnyModule(nn::ArcFaceLoss(nn::ArcFaceLossOptions(d, c).scale(16).margin(0.3))); }},
      {"combined",
       [=] {
         return AnyModule(nn::CombinedMarginLoss(nn::CombinedMarginLossOptions(d, c).scale(16).m2(0.2).m3(0.1)));
       }},
      {"adaface", [=] { return AnyModule(nn::AdaFaceLoss(nn::AdaFaceLossOptions(d, c).scale(16).margin(0.3))); }},
      {"magface",
       [=] {
         return AnyModule(nn::MagFaceLoss(
             nn::MagFaceLossOptions(d, c).scale(16).a_min(1).a_max(20).m_min(0.1).m_max(0.3).regularizer(1)));
       }},
      {"elasticface",
       [=] { return AnyModule(nn::ElasticFaceLoss(nn::ElasticFaceLossOptions(d, c).scale(16).margin(0.3))); }},
      {"sub-center",
       [=] {
         return AnyModule(
             nn::SubCenterArcFaceLoss(nn::SubCenterArcFaceLossOptions(d, c).scale(16).margin(0.3).sub_centers(2)));
       }},
      {"curricularface",
       [=] { return AnyModule(nn::CurricularFaceLoss(nn::CurricularFaceLossOptions(d, c).scale(16).margin(0.3))); }},
      {"mv-softmax",
       [=] { return AnyModule(nn::MVSoftmaxLoss(nn::MVSoftmaxLossOptions(d, c).scale(16).margin(0.2))); }},
      {"inter-top-k",
       [=] {
         return AnyModule(
             nn::InterTopKArcFaceLoss(nn::InterTopKArcFaceLossOptions(d, c).scale(16).margin(0.3).hardest(2)));
       }},
      {"sphereface2", [=] { return AnyModule(nn::SphereFace2Loss(nn::SphereFace2LossOptions(d, c))); }},
      {"uniface", [=] { return AnyModule(nn::UniFaceLoss(nn::UniFaceLossOptions(d, c).scale(16).margin(0.2))); }}};
  const auto found = losses.find(name);
  if (found == losses.end()) {
    std::string names;
    for (const auto& [known, make] : losses) {
      names += " " + known;
    }
    throw std::invalid_argument("there is no loss '" + name + "':" + names);
  }
  return found->second();
}

// Network and loss as one module, so that one file holds both.
struct Model : torch::nn::Module {
  torch::nn::Sequential network;
  torch::nn::AnyModule loss;

  Model(const std::string& network_name, const std::string& loss_name)
      : network(register_module("network", make_network(network_name))), loss(make_loss(loss_name)) {
    register_module("loss", loss.ptr());
  }
};

void train(Model& model, const Digits& digits, int64_t epochs) {
  torch::optim::Adam optimiser(model.parameters(), torch::optim::AdamOptions(2e-3));
  const int64_t count = digits.labels.size(0);
  model.train();
  for (int64_t epoch = 1; epoch <= epochs; ++epoch) {
    const torch::Tensor order = torch::randperm(count, torch::dtype(torch::kLong)).to(digits.labels.device());
    double sum = 0.0;
    for (int64_t begin = 0; begin < count; begin += kBatch) {
      const torch::Tensor batch = order.slice(0, begin, std::min(begin + kBatch, count));
      const torch::Tensor embeddings = model.network->forward(digits.images.index_select(0, batch));
      const torch::Tensor loss = model.loss.forward<torch::Tensor>(embeddings, digits.labels.index_select(0, batch));
      optimiser.zero_grad();
      loss.backward();
      optimiser.step();
      sum += loss.item<double>() * static_cast<double>(batch.size(0));
      std::fprintf(
          stderr, "\repoch %ld of %ld: %3ld %%, loss %.4f ", epoch, epochs,
          100 * std::min(begin + kBatch, count) / count, sum / std::min(begin + kBatch, count));
    }
  }
  std::fprintf(stderr, "\n");
}

Verification verify(Model& model, const Digits& unseen) {
  const torch::NoGradGuard no_grad;
  model.eval();
  return verify_pairs(model.network->forward(unseen.images), unseen.labels);
}

void run(const Arguments& arguments) {
  torch::manual_seed(static_cast<uint64_t>(arguments.number("seed")));
  const torch::Device device(arguments["device"]);
  Digits digits = read_digits(arguments["data"]);
  digits = {digits.images.to(device), digits.labels.to(device)};
  const torch::Tensor trained = digits.labels < kTrainedClasses;
  const auto model = std::make_shared<Model>(arguments["network"], arguments["loss"]);
  model->to(device);
  std::cout << "torchmargin " << torchmargin::version() << "\n" << *model << "\n";

  const Digits seen = digits.take(trained);
  const Digits unseen = digits.take(~trained);
  train(*model, seen, static_cast<int64_t>(arguments.number("epochs")));
  const Verification v = verify(*model, unseen);
  std::printf(
      "%ld images of digits that were never trained on, %ld pairs of one digit, %ld of two:\n"
      "AUC %.4f   EER %.4f   TAR %.4f at FAR %.2f (cosine %.3f)\n",
      unseen.labels.size(0), v.same, v.different, v.auc, v.eer, v.tar, v.far, v.threshold);

  torch::save(model, arguments["output"]);
  auto loaded = std::make_shared<Model>(arguments["network"], arguments["loss"]);
  torch::load(loaded, arguments["output"]);
  loaded->to(device);
  const Verification again = verify(*loaded, unseen);
  if (again.auc != v.auc) {
    throw std::runtime_error("the model that was loaded again verifies differently");
  }
  std::printf("saved to %s, loaded again: the same AUC\n", arguments["output"].c_str());
}

} // namespace

int main(int argc, char** argv) {
  try {
    run(Arguments(
        argc, argv,
        {{"data", "examples/data/digits.csv"},
         {"loss", "arcface"},
         {"network", "conv"},
         {"epochs", "20"},
         {"device", "cpu"},
         {"seed", "0"},
         {"output", "digits.pt"}}));
  } catch (const c10::Error& error) {
    std::cerr << "train_digits: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "train_digits: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
