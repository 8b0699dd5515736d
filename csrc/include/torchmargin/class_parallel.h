/// @file
/// The classes of a margin loss spread over ranks, for LibTorch programs.
///
///   namespace F = torchmargin::nn::functional;
///   auto options = F::ClassParallelOptions(group_name, group_size).loss(presets::arcface());
///   auto loss = F::class_parallel_cross_entropy(embeddings, {shard}, {first_class}, labels, num_classes, options);
///
/// Needs a LibTorch with torch.distributed and a process group that is registered under a name
/// (c10d::register_process_group). docs/distributed.md has the formulas and what travels.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "torchmargin/export.h"
#include "torchmargin/functional.h"

namespace torchmargin::nn::functional {

/// Over which ranks, and the loss.
struct TORCHMARGIN_API ClassParallelOptions {
  ClassParallelOptions(std::string group_name, int64_t group_size)
      : group_name_(std::move(group_name)), group_size_(group_size) {}

  TORCH_ARG(std::string, group_name);
  TORCH_ARG(int64_t, group_size);
  /// As for linear_margin_cross_entropy; its bias must be none, see `biases`. sample_* are of this rank's rows.
  TORCH_ARG(LinearMarginCrossEntropyFuncOptions, loss);
  /// Added to the logits: [c] for each weight, or none at all.
  TORCH_ARG(std::optional<std::vector<at::Tensor>>, biases) = std::nullopt;
  /// The most rows that a rank will ever give: all shapes are the same in every call then, and no sizes travel.
  TORCH_ARG(std::optional<int64_t>, max_rows) = std::nullopt;
  /// What the gradients of embeddings are multiplied by: the number of ranks where their network's gradients are
  /// averaged over these ranks, 1 where they are summed.
  TORCH_ARG(double, input_grad_scale) = 1.0;
};

/// The cross-entropy of the rows of all ranks among the classes of all ranks: the same scalar on every rank, whose
/// gradients are those of one process; with reduction "none" the losses [B] of this rank's rows.
///
/// With sub_centers K a weight is [c K, D]. Where hard negatives have no threshold of their own, the rank that holds a
/// row's class finds it for all. The hardest classes are those of all ranks.
///
/// input [B, D] and target [B] int64 (classes in [0, num_classes), or ignore_index) are this rank's; B may differ
/// between ranks and be 0. weights: this rank's blocks of classes [c, D], c may be 0; class_starts: the first class of
/// each. Every class is held by one rank. Every rank calls it, and goes backward, in the same order. A bad argument of
/// one rank is an error on all of them; a bad label c10::IndexError with the same text. There are no second
/// derivatives.
TORCHMARGIN_API at::Tensor class_parallel_cross_entropy(
    const at::Tensor& input,
    at::TensorList weights,
    at::IntArrayRef class_starts,
    const at::Tensor& target,
    int64_t num_classes,
    const ClassParallelOptions& options);

/// Over which ranks, and the loss.
struct TORCHMARGIN_API ClassParallelBinaryOptions {
  ClassParallelBinaryOptions(std::string group_name, int64_t group_size)
      : group_name_(std::move(group_name)), group_size_(group_size) {}

  TORCH_ARG(std::string, group_name);
  TORCH_ARG(int64_t, group_size);
  /// As for linear_margin_binary_cross_entropy. Its bias is the same on all ranks, and so is its gradient, the sum.
  TORCH_ARG(LinearMarginBinaryCrossEntropyFuncOptions, loss);
  /// As ClassParallelOptions has them.
  TORCH_ARG(std::optional<int64_t>, max_rows) = std::nullopt;
  TORCH_ARG(double, input_grad_scale) = 1.0;
};

/// linear_margin_binary_cross_entropy of the rows of all ranks against the classes of all ranks; all else as above.
TORCHMARGIN_API at::Tensor class_parallel_binary_cross_entropy(
    const at::Tensor& input,
    at::TensorList weights,
    at::IntArrayRef class_starts,
    const at::Tensor& target,
    int64_t num_classes,
    const ClassParallelBinaryOptions& options);

} // namespace torchmargin::nn::functional
