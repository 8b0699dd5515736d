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
#include <iostream>
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

double train(const std::string& data, const std::string& group_name, int64_t epochs) {
  const Group group = c10d::resolve_process_group(group_name);
  const int64_t ranks = group->getSize();
  const int64_t rank = group->getRank();
  torch::manual_seed(0); // the same network on every rank
  torch::nn::Sequential network(
      torch::nn::Flatten(), torch::nn::Linear(64, 128), torch::nn::PReLU(), torch::nn::Linear(128, kFeatures));

  // This rank's classes: a block of [first, first + count), which may be empty.
  const int64_t first = kClasses * rank / ranks;
  const int64_t count = kClasses * (rank + 1) / ranks - first;
  torch::Tensor weight = torch::randn({kClasses, kFeatures}).slice(0, first, first + count).clone().requires_grad_();

  // And its images: every `ranks`-th.
  const Digits digits = read_digits(data);
  const torch::Tensor mine = torch::arange(rank, digits.labels.size(0), ranks);
  const int64_t longest = (digits.labels.size(0) + ranks - 1) / ranks;

  F::LinearMarginCrossEntropyFuncOptions arcface(torchmargin::presets::arcface());
  arcface.linear().margin().scale = 16.0;
  arcface.linear().margin().m2 = 0.3;
  // The network's gradients are summed below, not averaged: those of the embeddings need no factor.
  const auto options = F::ClassParallelOptions(group_name, ranks).loss(arcface).max_rows(kBatch);

  torch::optim::Adam network_optimiser(network->parameters(), torch::optim::AdamOptions(2e-3));
  torch::optim::Adam head_optimiser({weight}, torch::optim::AdamOptions(2e-3));
  for (int64_t epoch = 0; epoch < epochs; ++epoch) {
    const torch::Tensor order = mine.index_select(0, torch::randperm(mine.size(0)));
    // Every rank makes the same number of steps; the last ones of a rank with fewer images may be short or empty.
    for (int64_t begin = 0; begin < longest; begin += kBatch) {
      const torch::Tensor batch = order.slice(0, begin, std::min(begin + kBatch, longest));
      const torch::Tensor embeddings = network->forward(digits.images.index_select(0, batch));
      const torch::Tensor loss = F::class_parallel_cross_entropy(
          embeddings, {weight}, {first}, digits.labels.index_select(0, batch), kClasses, options);
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
    all.slice(0, first, first + count).copy_(F::margin_logits(embeddings, weight).t());
  }
  sum_over_ranks(group, all);
  return all.argmax(0).eq(digits.labels).to(torch::kFloat).mean().item<double>();
}

} // namespace

double train_class_parallel_digits(const char* data, const char* group, int epochs) {
  try {
    return train(data, group, epochs);
  } catch (const c10::Error& error) {
    std::cerr << "train_class_parallel: " << error.what_without_backtrace() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "train_class_parallel: " << error.what() << "\n";
  }
  return -1;
}
