// The arguments of the ops over ranks, as schemas, as C++ parameters and as a call's arguments.
#pragma once

#include "ops/arguments.h"

// weights: this rank's blocks of classes, [c K, D] each, any of them empty; class_starts: the first class of each.
#define TORCHMARGIN_RANKS_SCHEMA                                                                         \
  "Tensor input, Tensor[] weights, int[] class_starts, Tensor target, int num_classes, str group_name, " \
  "int group_size, "
#define TORCHMARGIN_RANKS_PARAMETERS                                                                       \
  const at::Tensor &input, at::TensorList weights, at::IntArrayRef class_starts, const at::Tensor &target, \
      int64_t num_classes, [[maybe_unused]] std::string_view group_name, [[maybe_unused]] int64_t group_size
#define TORCHMARGIN_RANKS_ARGUMENTS input, weights, class_starts, target, num_classes, group_name, group_size
#define TORCHMARGIN_ROWS_OF_RANKS_SCHEMA ", int? max_rows=None, float input_grad_scale=1.0"
#define TORCHMARGIN_ROWS_OF_RANKS_PARAMETERS \
  [[maybe_unused]] std::optional<int64_t> max_rows, [[maybe_unused]] double input_grad_scale
#define TORCHMARGIN_ROWS_OF_RANKS_ARGUMENTS max_rows, input_grad_scale

// biases: [c] each. The rest as linear_margin_cross_entropy has it, for the rows of this rank.
#define TORCHMARGIN_CLASS_PARALLEL_SCHEMA                                                     \
  TORCHMARGIN_RANKS_SCHEMA                                                                    \
  "Tensor[]? biases=None, *, " TORCHMARGIN_MARGINS_SCHEMA                                     \
  ", bool normalize_input=True, bool normalize_weight=True, ScalarType? compute_dtype=None, " \
  "int sub_centers=1, Tensor? hard_threshold=None, "                                          \
  "Tensor? hard_coefficients=None" TORCHMARGIN_HARDEST_SCHEMA TORCHMARGIN_LOSS_SCHEMA TORCHMARGIN_ROWS_OF_RANKS_SCHEMA
#define TORCHMARGIN_CLASS_PARALLEL_PARAMETERS                                                                        \
  TORCHMARGIN_RANKS_PARAMETERS, const std::optional<std::vector<at::Tensor>>&biases, TORCHMARGIN_MARGINS_PARAMETERS, \
      bool normalize_input, bool normalize_weight, std::optional<at::ScalarType> compute_dtype, int64_t sub_centers, \
      const std::optional<at::Tensor>&hard_threshold, const std::optional<at::Tensor>&hard_coefficients,             \
      TORCHMARGIN_HARDEST_PARAMETERS, TORCHMARGIN_LOSS_PARAMETERS, TORCHMARGIN_ROWS_OF_RANKS_PARAMETERS
#define TORCHMARGIN_CLASS_PARALLEL_ARGUMENTS                                                             \
  TORCHMARGIN_RANKS_ARGUMENTS, biases, TORCHMARGIN_MARGINS_ARGUMENTS, normalize_input, normalize_weight, \
      compute_dtype, sub_centers, hard_threshold, hard_coefficients, TORCHMARGIN_HARDEST_ARGUMENTS,      \
      TORCHMARGIN_LOSS_ARGUMENTS, TORCHMARGIN_ROWS_OF_RANKS_ARGUMENTS

// As linear_margin_binary_cross_entropy has it; the bias is the same on all ranks, and a target that is no class of any
// of them is an error with or without require_target.
#define TORCHMARGIN_CLASS_PARALLEL_BINARY_SCHEMA \
  TORCHMARGIN_RANKS_SCHEMA TORCHMARGIN_BINARY_OPTIONS_SCHEMA TORCHMARGIN_ROWS_OF_RANKS_SCHEMA
#define TORCHMARGIN_CLASS_PARALLEL_BINARY_PARAMETERS \
  TORCHMARGIN_RANKS_PARAMETERS, TORCHMARGIN_BINARY_OPTION_PARAMETERS, TORCHMARGIN_ROWS_OF_RANKS_PARAMETERS
#define TORCHMARGIN_CLASS_PARALLEL_BINARY_ARGUMENTS \
  TORCHMARGIN_RANKS_ARGUMENTS, TORCHMARGIN_BINARY_OPTION_ARGUMENTS, TORCHMARGIN_ROWS_OF_RANKS_ARGUMENTS
