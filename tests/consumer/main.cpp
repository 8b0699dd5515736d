// consumer LOSS INPUTS STATE RESULTS: reads embeddings, labels and a loss's state as Python wrote them, and writes the
// loss's value, its gradients, and its state after two optimiser steps, for Python to compare with its own. Then every
// number of its options is changed and all is written again, for Python to go on from.
#include <torch/torch.h>
#include <torchmargin/torchmargin.h>

#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <string>

namespace nn = torchmargin::nn;

namespace {

c10::Dict<c10::IValue, c10::IValue> read_dict(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  return torch::pickle_load(bytes).toGenericDict();
}

void write_dict(const c10::Dict<std::string, at::Tensor>& dict, const std::string& path) {
  const std::vector<char> bytes = torch::pickle_save(dict);
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

template <typename Loss>
void run(Loss loss, char** paths) {
  const auto inputs = read_dict(paths[0]);
  const torch::Tensor embeddings = inputs.at("embeddings").toTensor().clone().requires_grad_();
  const torch::Tensor labels = inputs.at("labels").toTensor();
  loss->to(embeddings.scalar_type());
  torchmargin::load_state_dict(*loss, paths[1]);
  loss->train();
  c10::Dict<std::string, at::Tensor> results;
  torch::optim::SGD optimiser(loss->parameters(), torch::optim::SGDOptions(0.1));
  for (int step = 0; step < 2; ++step) {
    const auto [value, statistics] = loss->forward_with_statistics(embeddings, labels);
    optimiser.zero_grad();
    value.backward();
    optimiser.step();
    results.insert("loss" + std::to_string(step), value.detach());
    results.insert("accuracy" + std::to_string(step), statistics.accuracy);
  }
  results.insert("grad_embeddings", embeddings.grad());
  results.insert("logits", loss->logits(embeddings.detach()).detach());
  write_dict(results, paths[2]);
  torchmargin::save_state_dict(*loss, std::string(paths[2]) + ".state");

  // torch::save, torch::load, clone and printing.
  torch::save(loss, std::string(paths[2]) + ".archive");
  Loss loaded(loss->options);
  loaded->to(embeddings.scalar_type());
  torch::load(loaded, std::string(paths[2]) + ".archive");
  Loss copy(std::dynamic_pointer_cast<typename Loss::ContainedType>(loaded->clone()));
  loss->eval();
  copy->eval();
  const torch::Tensor one = loss->forward(embeddings, labels);
  const torch::Tensor other = copy->forward(embeddings, labels);
  if (!torch::equal(one, other)) {
    throw std::runtime_error("a saved, loaded and cloned loss gives another value");
  }
  std::cout << *copy << "\n";

  // Options are live, and come back from what was saved.
  for (const nn::SavedNumber& number : loss->saved_numbers()) {
    *number.value *= 0.9;
    if (number.per_class != nullptr && number.per_class->defined()) {
      number.per_class->mul_(0.9);
    }
  }
  c10::Dict<std::string, at::Tensor> changed;
  changed.insert("loss", loss->forward(embeddings, labels).detach());
  changed.insert("logits", loss->logits(embeddings).detach());
  write_dict(changed, std::string(paths[2]) + ".changed");
  torchmargin::save_state_dict(*loss, std::string(paths[2]) + ".changed_state");
  torchmargin::load_state_dict(*copy, std::string(paths[2]) + ".changed_state");
  if (torch::equal(changed.at("loss"), one) || !torch::equal(changed.at("loss"), copy->forward(embeddings, labels))) {
    throw std::runtime_error("numbers that were changed do not count, or do not come back");
  }
}

} // namespace

int main(int argc, char** argv) {
  const std::map<std::string, std::function<void(char**)>> losses{
      {"SoftmaxLoss", [](char** p) { run(nn::SoftmaxLoss(8, 30), p); }},
      {"ModifiedSoftmaxLoss", [](char** p) { run(nn::ModifiedSoftmaxLoss(8, 30), p); }},
      {"NormalizedSoftmaxLoss", [](char** p) { run(nn::NormalizedSoftmaxLoss(8, 30), p); }},
      {"SphereFaceLoss", [](char** p) { run(nn::SphereFaceLoss(8, 30), p); }},
      {"LargeMarginSoftmaxLoss", [](char** p) { run(nn::LargeMarginSoftmaxLoss(8, 30), p); }},
      {"CosFaceLoss", [](char** p) { run(nn::CosFaceLoss(8, 30), p); }},
      {"ArcFaceLoss", [](char** p) { run(nn::ArcFaceLoss(nn::ArcFaceLossOptions(8, 30).scale(64).margin(0.5)), p); }},
      {"CombinedMarginLoss", [](char** p) { run(nn::CombinedMarginLoss(8, 30), p); }},
      {"AdaFaceLoss", [](char** p) { run(nn::AdaFaceLoss(8, 30), p); }},
      {"MagFaceLoss", [](char** p) { run(nn::MagFaceLoss(8, 30), p); }},
      {"ElasticFaceLoss",
       [](char** p) { run(nn::ElasticFaceLoss(nn::ElasticFaceLossOptions(8, 30).deviation(0)), p); }},
      {"SubCenterArcFaceLoss", [](char** p) { run(nn::SubCenterArcFaceLoss(8, 30), p); }},
      {"CurricularFaceLoss", [](char** p) { run(nn::CurricularFaceLoss(8, 30), p); }},
      {"MVSoftmaxLoss", [](char** p) { run(nn::MVSoftmaxLoss(8, 30), p); }},
      {"InterTopKArcFaceLoss", [](char** p) { run(nn::InterTopKArcFaceLoss(8, 30), p); }},
      {"SphereFace2Loss", [](char** p) { run(nn::SphereFace2Loss(8, 30), p); }},
      {"UniFaceLoss", [](char** p) { run(nn::UniFaceLoss(8, 30), p); }}};
  if (argc != 5 || losses.count(argv[1]) == 0) {
    std::cerr << "usage: consumer LOSS INPUTS STATE RESULTS\n";
    return 2;
  }
  losses.at(argv[1])(argv + 2);
  try {
    nn::ArcFaceLoss(8, 30)->forward(torch::randn({4, 7}), torch::zeros({4}, torch::kLong));
    std::cerr << "a wrong shape was accepted\n";
    return 1;
  } catch (const c10::Error& error) {
    std::cout << error.what_without_backtrace() << "\n";
  }
  return 0;
}
