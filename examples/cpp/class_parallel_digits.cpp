// A network on every rank (equal weights, gradients averaged), ten classes of digits spread over the ranks. Each rank
// sees its own part of the images; the loss and its gradients are those of one process with all of them.
#include "class_parallel_digits.h"

#include <torch/torch.h>
#include <torchmargin/torchmargin.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <functional>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/digits.h"

namespace F = torchmargin::nn::functional;

namespace {

constexpr int64_t kClasses = 10;
constexpr int64_t kFeatures = 32;
constexpr int64_t kBatch = 64; // on each rank

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

void sum_over_ranks(const Group& group, torch::Tensor tensor) {
  std::vector<torch::Tensor> tensors{tensor};
  group->allreduce(tensors)->wait();
}

// A loss over ranks: how many centers a class has, what is learned beside the weights, and the call.
struct Loss {
  int64_t sub_centers = 1;
  std::vector<torch::Tensor> shared; // the same on all ranks, and so are its gradients
  std::function<torch::Tensor(
      const torch::Tensor& embeddings,
      const torch::Tensor& weight,
      int64_t first,
      const torch::Tensor& labels)>
      call;
};

Loss make_loss(const std::string& name, const std::string& group, int64_t ranks) {
  if (name == "sphereface2") {
    F::LinearMarginBinaryCrossEntropyFuncOptions loss;
    loss.scale(32.0).margin(0.2).power(3.0).positive_weight(0.7).negative_weight(0.3);
    loss.bias(torch::zeros({}).requires_grad_());
    const auto options = F::ClassParallelBinaryOptions(group, ranks).loss(loss).max_rows(kBatch);
    return {
        1, {*loss.bias()}, [options](const auto& embeddings, const auto& weight, int64_t first, const auto& labels) {
          return F::class_parallel_binary_cross_entropy(embeddings, {weight}, {first}, labels, kClasses, options);
        }};
  }
  if (name != "arcface" && name != "inter-top-k") {
    throw std::invalid_argument("expected the loss to be arcface, inter-top-k or sphereface2, but got " + name);
  }
  F::LinearMarginCrossEntropyFuncOptions loss(torchmargin::presets::arcface());
  loss.linear().margin().scale = 16.0;
  loss.linear().margin().m2 = 0.3;
  if (name == "inter-top-k") {
    loss.linear().sub_centers(2).hardest(3).hardest_margin(0.06);
  }
  // The network's gradients are summed below, not averaged: those of the embeddings need no factor.
  const auto options = F::ClassParallelOptions(group, ranks).loss(loss).max_rows(kBatch);
  return {
      loss.linear().sub_centers(),
      {},
      [options](const auto& embeddings, const auto& weight, int64_t first, const auto& labels) {
        return F::class_parallel_cross_entropy(embeddings, {weight}, {first}, labels, kClasses, options);
      }};
}

double train(const std::string& data, const std::string& group_name, const std::string& name, int64_t epochs) {
  const Group group = c10d::resolve_process_group(group_name);
  const int64_t ranks = group->getSize();
  const int64_t rank = group->getRank();
  torch::manual_seed(0); // the same network on every rank
  torch::nn::Sequential network(
      torch::nn::Flatten(), torch::nn::Linear(64, 128), torch::nn::PReLU(), torch::nn::Linear(128, kFeatures));

  // This rank's classes: a block of [first, first + count), which may be empty.
  const int64_t first = kClasses * rank / ranks;
  const int64_t count = kClasses * (rank + 1) / ranks - first;
  const Loss head = make_loss(name, group_name, ranks);
  const int64_t centers = head.sub_centers; // rows of a class
  torch::Tensor weight = torch::randn({kClasses * centers, kFeatures})
                             .slice(0, first * centers, (first + count) * centers)
                             .clone()
                             .requires_grad_();

  // And its images: every `ranks`-th.
  const Digits digits = read_digits(data);
  const torch::Tensor mine = torch::arange(rank, digits.labels.size(0), ranks);
  const int64_t longest = (digits.labels.size(0) + ranks - 1) / ranks;

  torch::optim::Adam network_optimiser(network->parameters(), torch::optim::AdamOptions(2e-3));
  std::vector<torch::Tensor> learned{weight};
  learned.insert(learned.end(), head.shared.begin(), head.shared.end());
  torch::optim::Adam head_optimiser(learned, torch::optim::AdamOptions(2e-3));
  for (int64_t epoch = 0; epoch < epochs; ++epoch) {
    const torch::Tensor order = mine.index_select(0, torch::randperm(mine.size(0)));
    // Every rank makes the same number of steps; the last ones of a rank with fewer images may be short or empty.
    for (int64_t begin = 0; begin < longest; begin += kBatch) {
      const torch::Tensor batch = order.slice(0, begin, std::min(begin + kBatch, longest));
      const torch::Tensor embeddings = network->forward(digits.images.index_select(0, batch));
      const torch::Tensor loss = head.call(embeddings, weight, first, digits.labels.index_select(0, batch));
      network_optimiser.zero_grad();
      head_optimiser.zero_grad();
      loss.backward();
      for (const torch::Tensor& parameter : network->parameters()) {
        sum_over_ranks(group, parameter.grad());
      }
      network_optimiser.step();
      head_optimiser.step();
      if (rank == 0) {
        std::fprintf(stderr, "\repoch %ld of %ld, loss %.4f ", epoch + 1, epochs, loss.item<double>());
      }
    }
  }

  if (rank == 0) {
    std::fprintf(stderr, "\n");
  }

  // Every rank's logits of all images, put together.
  const torch::NoGradGuard no_grad;
  const torch::Tensor embeddings = network->forward(digits.images);
  torch::Tensor all = torch::zeros({kClasses, digits.labels.size(0)});
  if (count > 0) {
    const auto options = F::LinearMarginFuncOptions().sub_centers(centers);
    all.slice(0, first, first + count).copy_(F::margin_logits(embeddings, weight, std::nullopt, options).t());
  }
  sum_over_ranks(group, all);
  return all.argmax(0).eq(digits.labels).to(torch::kFloat).mean().item<double>();
}

} // namespace

double train_class_parallel_digits(const char* data, const char* group, const char* loss, int epochs) {
  try {
    return train(data, group, loss, epochs);
  } catch (const c10::Error& error) {
    std::cerr << "train_class_parallel: " << error.what_without_backtrace() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "train_class_parallel: " << error.what() << "\n";
  }
  return -1;
}
