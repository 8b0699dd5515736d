// The arguments of class_parallel_cross_entropy, as its schema, as C++ parameters and as a call's arguments.
#pragma once

#include "ops/arguments.h"

// weights: this rank's blocks of classes, [c, D] each, any of them empty; class_starts: the first class of each.
// biases: [c] each. The rest as linear_margin_cross_entropy has it, for the rows of this rank.
#define TORCHMARGIN_CLASS_PARALLEL_SCHEMA                                                                           \
  "Tensor input, Tensor[] weights, int[] class_starts, Tensor target, int num_classes, str group_name, "            \
  "int group_size, Tensor[]? biases=None, *, " TORCHMARGIN_MARGINS_SCHEMA                                           \
  ", bool normalize_input=True, bool normalize_weight=True, ScalarType? compute_dtype=None" TORCHMARGIN_LOSS_SCHEMA \
  ", int? max_rows=None, float input_grad_scale=1.0"
#define TORCHMARGIN_CLASS_PARALLEL_PARAMETERS                                                                    \
  const at::Tensor &input, at::TensorList weights, at::IntArrayRef class_starts, const at::Tensor &target,       \
      int64_t num_classes, [[maybe_unused]] std::string_view group_name, [[maybe_unused]] int64_t group_size,    \
      const std::optional<std::vector<at::Tensor>>&biases, TORCHMARGIN_MARGINS_PARAMETERS, bool normalize_input, \
      bool normalize_weight, std::optional<at::ScalarType> compute_dtype, TORCHMARGIN_LOSS_PARAMETERS,           \
      [[maybe_unused]] std::optional<int64_t> max_rows, [[maybe_unused]] double input_grad_scale
#define TORCHMARGIN_CLASS_PARALLEL_ARGUMENTS                                                                        \
  input, weights, class_starts, target, num_classes, group_name, group_size, biases, TORCHMARGIN_MARGINS_ARGUMENTS, \
      normalize_input, normalize_weight, compute_dtype, TORCHMARGIN_LOSS_ARGUMENTS, max_rows, input_grad_scale
