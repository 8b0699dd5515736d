// The arguments of the ops, written down once: as the schema, as C++ parameters and as a call's arguments. Public ops
// spell every one of them. Private ops take their tensors, those that have gradients first, and all else as a list of
// numbers (numbers.h): a new parameter touches none of them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

// ---- what the ops with a margin share --------------------------------------------------
#define TORCHMARGIN_MARGINS_SCHEMA                                                                              \
  "float scale=1.0, float m1=1.0, float m2=0.0, float m3=0.0, Tensor? sample_m2=None, Tensor? sample_m3=None, " \
  "Tensor? sample_margin_weight=None, str extension=\"none\", float margin_weight=1.0, str margin_gradient=\"exact\""
#define TORCHMARGIN_MARGINS_PARAMETERS                                                                 \
  double scale, double m1, double m2, double m3, const std::optional<at::Tensor>&sample_m2,            \
      const std::optional<at::Tensor>&sample_m3, const std::optional<at::Tensor>&sample_margin_weight, \
      std::string_view extension, double margin_weight, std::string_view margin_gradient
#define TORCHMARGIN_MARGINS_ARGUMENTS \
  scale, m1, m2, m3, sample_m2, sample_m3, sample_margin_weight, extension, margin_weight, margin_gradient

// ---- the linear ops: input, weight, target and these ------------------------------------
#define TORCHMARGIN_LINEAR_OPTIONS_SCHEMA                     \
  "Tensor? bias=None, *, " TORCHMARGIN_MARGINS_SCHEMA         \
  ", bool normalize_input=True, bool normalize_weight=True, " \
  "ScalarType? compute_dtype=None, int sub_centers=1, "       \
  "Tensor? hard_threshold=None, Tensor? hard_coefficients=None"
#define TORCHMARGIN_LINEAR_SCHEMA "Tensor input, Tensor weight, Tensor target, " TORCHMARGIN_LINEAR_OPTIONS_SCHEMA
#define TORCHMARGIN_LINEAR_OPTION_PARAMETERS                                                                         \
  const std::optional<at::Tensor>&bias, TORCHMARGIN_MARGINS_PARAMETERS, bool normalize_input, bool normalize_weight, \
      std::optional<at::ScalarType> compute_dtype, int64_t sub_centers,                                              \
      const std::optional<at::Tensor>&hard_threshold, const std::optional<at::Tensor>&hard_coefficients
#define TORCHMARGIN_LINEAR_PARAMETERS \
  const at::Tensor &input, const at::Tensor &weight, const at::Tensor &target, TORCHMARGIN_LINEAR_OPTION_PARAMETERS
#define TORCHMARGIN_LINEAR_ARGUMENTS                                                                            \
  input, weight, target, bias, TORCHMARGIN_MARGINS_ARGUMENTS, normalize_input, normalize_weight, compute_dtype, \
      sub_centers, hard_threshold, hard_coefficients

// What makes losses and logits takes beyond them; linear_margin_lse_hardest has no margin for its hardest classes.
#define TORCHMARGIN_HARDEST_SCHEMA ", int hardest=0, float hardest_margin=0.0"
#define TORCHMARGIN_HARDEST_PARAMETERS int64_t hardest, double hardest_margin
#define TORCHMARGIN_HARDEST_ARGUMENTS hardest, hardest_margin

// ---- one against all ------------------------------------------------------------------------
// require_target: a target that is neither a class nor ignore_index is an error instead of a row of negatives alone.
#define TORCHMARGIN_BINARY_OPTIONS_SCHEMA                                                                     \
  "Tensor? bias=None, *, float scale=1.0, float margin=0.0, str kind=\"c\", float power=1.0, "                \
  "float positive_weight=1.0, float negative_weight=1.0, int sub_centers=1, ScalarType? compute_dtype=None, " \
  "int ignore_index=-100, str reduction=\"mean\", bool require_target=False, Tensor? class_weight=None"
#define TORCHMARGIN_BINARY_SCHEMA "Tensor input, Tensor weight, Tensor target, " TORCHMARGIN_BINARY_OPTIONS_SCHEMA
#define TORCHMARGIN_BINARY_OPTION_PARAMETERS                                                              \
  const std::optional<at::Tensor>&bias, double scale, double margin, std::string_view kind, double power, \
      double positive_weight, double negative_weight, int64_t sub_centers,                                \
      std::optional<at::ScalarType> compute_dtype, int64_t ignore_index, std::string_view reduction,      \
      [[maybe_unused]] bool require_target, [[maybe_unused]] const std::optional<at::Tensor>&class_weight
#define TORCHMARGIN_BINARY_PARAMETERS \
  const at::Tensor &input, const at::Tensor &weight, const at::Tensor &target, TORCHMARGIN_BINARY_OPTION_PARAMETERS
#define TORCHMARGIN_BINARY_OPTION_ARGUMENTS                                                                     \
  bias, scale, margin, kind, power, positive_weight, negative_weight, sub_centers, compute_dtype, ignore_index, \
      reduction, require_target, class_weight
#define TORCHMARGIN_BINARY_ARGUMENTS input, weight, target, TORCHMARGIN_BINARY_OPTION_ARGUMENTS

// The linear forward of one block of classes among others: see linear.cpp.
#define TORCHMARGIN_PARTIALS_SCHEMA \
  ", int hardest=0, bool with_logit_sum=True, bool with_plain_logit=False, int calls=1"
#define TORCHMARGIN_PARTIALS_PARAMETERS int64_t hardest, bool with_logit_sum, bool with_plain_logit, int64_t calls
#define TORCHMARGIN_PARTIALS_ARGUMENTS hardest, with_logit_sum, with_plain_logit, calls

// ---- the ops on given cosines -------------------------------------------------------------
#define TORCHMARGIN_COSINE_SCHEMA "Tensor cosine, Tensor target, *, " TORCHMARGIN_MARGINS_SCHEMA
#define TORCHMARGIN_COSINE_PARAMETERS const at::Tensor &cosine, const at::Tensor &target, TORCHMARGIN_MARGINS_PARAMETERS
#define TORCHMARGIN_COSINE_ARGUMENTS cosine, target, TORCHMARGIN_MARGINS_ARGUMENTS

#define TORCHMARGIN_TRANSFORM_SCHEMA                                                                              \
  "Tensor cosine, *, float m1=1.0, float m2=0.0, float m3=0.0, str extension=\"none\", float margin_weight=1.0, " \
  "str margin_gradient=\"exact\""
#define TORCHMARGIN_TRANSFORM_PARAMETERS                                                                       \
  const at::Tensor &cosine, double m1, double m2, double m3, std::string_view extension, double margin_weight, \
      std::string_view margin_gradient

// ---- what the losses take beyond them -----------------------------------------------------
#define TORCHMARGIN_LOSS_SCHEMA \
  ", float label_smoothing=0.0, int ignore_index=-100, str reduction=\"mean\", Tensor? class_weight=None"
#define TORCHMARGIN_LOSS_PARAMETERS                                         \
  double label_smoothing, int64_t ignore_index, std::string_view reduction, \
      [[maybe_unused]] const std::optional<at::Tensor>&class_weight
#define TORCHMARGIN_LOSS_ARGUMENTS label_smoothing, ignore_index, reduction, class_weight

// ---- private ops --------------------------------------------------------------------------
#define TORCHMARGIN_PACKED_MARGINS_SCHEMA \
  "Tensor? sample_m2, Tensor? sample_m3, Tensor target, Tensor? sample_margin_weight"
#define TORCHMARGIN_PACKED_MARGINS_PARAMETERS                                                                     \
  const std::optional<at::Tensor>&sample_m2, const std::optional<at::Tensor>&sample_m3, const at::Tensor &target, \
      const std::optional<at::Tensor>&sample_margin_weight
#define TORCHMARGIN_PACKED_MARGINS_ARGUMENTS sample_m2, sample_m3, target, sample_margin_weight

#define TORCHMARGIN_PACKED_LINEAR_SCHEMA                                          \
  "Tensor input, Tensor weight, Tensor? bias, " TORCHMARGIN_PACKED_MARGINS_SCHEMA \
  ", Tensor? hard_threshold, Tensor? hard_coefficients, float[] numbers"
#define TORCHMARGIN_PACKED_LINEAR_PARAMETERS                                                 \
  const at::Tensor &input, const at::Tensor &weight, const std::optional<at::Tensor>&bias,   \
      TORCHMARGIN_PACKED_MARGINS_PARAMETERS, const std::optional<at::Tensor>&hard_threshold, \
      const std::optional<at::Tensor>&hard_coefficients, at::ArrayRef<double> numbers
#define TORCHMARGIN_PACKED_LINEAR_ARGUMENTS \
  input, weight, bias, TORCHMARGIN_PACKED_MARGINS_ARGUMENTS, hard_threshold, hard_coefficients, numbers

#define TORCHMARGIN_PACKED_COSINE_SCHEMA "Tensor cosine, " TORCHMARGIN_PACKED_MARGINS_SCHEMA ", float[] numbers"
#define TORCHMARGIN_PACKED_COSINE_PARAMETERS \
  const at::Tensor &cosine, TORCHMARGIN_PACKED_MARGINS_PARAMETERS, at::ArrayRef<double> numbers
#define TORCHMARGIN_PACKED_COSINE_ARGUMENTS cosine, TORCHMARGIN_PACKED_MARGINS_ARGUMENTS, numbers

// What a forward is asked for, and what a backward is given: see ForwardRequest and BackwardRequest.
#define TORCHMARGIN_FORWARD_REQUEST_SCHEMA \
  ", int? ignore_index, bool with_logit_sum, int kept_classes, Tensor? row_state"
#define TORCHMARGIN_FORWARD_REQUEST_PARAMETERS                                    \
  std::optional<int64_t> ignore_index, bool with_logit_sum, int64_t kept_classes, \
      const std::optional<at::Tensor>&row_state
#define TORCHMARGIN_FORWARD_REQUEST_ARGUMENTS ignore_index, with_logit_sum, kept_classes, row_state
#define TORCHMARGIN_UPSTREAM_SCHEMA ", Tensor? grad_other_lse, Tensor? grad_target_logit, Tensor? grad_logit_sum"
#define TORCHMARGIN_UPSTREAM_PARAMETERS                                                              \
  const std::optional<at::Tensor>&grad_other_lse, const std::optional<at::Tensor>&grad_target_logit, \
      const std::optional<at::Tensor>&grad_logit_sum
#define TORCHMARGIN_UPSTREAM_ARGUMENTS grad_other_lse, grad_target_logit, grad_logit_sum
#define TORCHMARGIN_BACKWARD_REQUEST_SCHEMA                                                             \
  TORCHMARGIN_UPSTREAM_SCHEMA                                                                           \
  ", Tensor? grad_hardest_logit, Tensor other_lse, Tensor hardest_class, Tensor kept, Tensor winners, " \
  "Tensor inverse_norms, Tensor weight_sum, Tensor row_state, Tensor weight_scale, bool[5] wanted"
#define TORCHMARGIN_BACKWARD_REQUEST_PARAMETERS                                                                     \
  TORCHMARGIN_UPSTREAM_PARAMETERS, const std::optional<at::Tensor>&grad_hardest_logit, const at::Tensor &other_lse, \
      const at::Tensor &hardest_class, const at::Tensor &kept, const at::Tensor &winners,                           \
      const at::Tensor &inverse_norms, const at::Tensor &weight_sum, const at::Tensor &row_state,                   \
      const at::Tensor &weight_scale, std::array<bool, 5> wanted
#define TORCHMARGIN_BACKWARD_REQUEST_ARGUMENTS                                  \
  TORCHMARGIN_UPSTREAM_ARGUMENTS, grad_hardest_logit, other_lse, hardest_class, \
      {kept, winners, inverse_norms, weight_sum, row_state, weight_scale}, wanted
#define TORCHMARGIN_LOGITS_BACKWARD_REQUEST_SCHEMA \
  ", Tensor grad_logits, Tensor inverse_norms, Tensor row_state, bool[5] wanted"
#define TORCHMARGIN_LOGITS_BACKWARD_REQUEST_PARAMETERS                                         \
  const at::Tensor &grad_logits, const at::Tensor &inverse_norms, const at::Tensor &row_state, \
      std::array<bool, 5> wanted
#define TORCHMARGIN_LOGITS_BACKWARD_REQUEST_ARGUMENTS grad_logits, inverse_norms, row_state, wanted
#define TORCHMARGIN_COSINE_BACKWARD_REQUEST_SCHEMA TORCHMARGIN_UPSTREAM_SCHEMA ", Tensor other_lse, bool[3] wanted"
#define TORCHMARGIN_COSINE_BACKWARD_REQUEST_PARAMETERS \
  TORCHMARGIN_UPSTREAM_PARAMETERS, const at::Tensor &other_lse, std::array<bool, 3> wanted
