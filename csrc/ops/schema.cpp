// The schemas of all ops, public and private; those of adaptive_margins.cpp stand there. Kernels are registered where
// they stand.
#include <torch/library.h>

#include "ops/arguments.h"
#include "ops/loss_op.h"

TORCH_LIBRARY(torchmargin, library) {
  library.def(
      "linear_margin_lse(" TORCHMARGIN_LINEAR_SCHEMA
      ") -> (Tensor other_lse, Tensor target_logit, Tensor logit_sum, Tensor target_angle, Tensor max_other_logit)");
  library.def("linear_margin_lse_hardest(" TORCHMARGIN_LINEAR_SCHEMA
              ", int hardest) -> (Tensor other_lse, Tensor target_logit, Tensor logit_sum, Tensor target_angle, "
              "Tensor max_other_logit, Tensor hardest_logit, Tensor hardest_class)");
  library.def(
      "linear_margin_cross_entropy(" TORCHMARGIN_LINEAR_SCHEMA TORCHMARGIN_HARDEST_SCHEMA TORCHMARGIN_LOSS_SCHEMA
      ") -> Tensor");
  library.def("linear_target_angle(Tensor input, Tensor weight, Tensor target, *, int sub_centers=1) -> Tensor");
  library.def("margin_logits(Tensor input, Tensor weight, Tensor? target=None, " TORCHMARGIN_LINEAR_OPTIONS_SCHEMA
                  TORCHMARGIN_HARDEST_SCHEMA ") -> Tensor");
  library.def("margin_cross_entropy(" TORCHMARGIN_COSINE_SCHEMA TORCHMARGIN_LOSS_SCHEMA ") -> Tensor");
  library.def("margin_transform(" TORCHMARGIN_TRANSFORM_SCHEMA ") -> Tensor");
  // Private: the loss with what the modules report of a batch, 0-dim each.
  library.def("_linear_margin_cross_entropy_statistics(" TORCHMARGIN_LINEAR_SCHEMA TORCHMARGIN_HARDEST_SCHEMA
                  TORCHMARGIN_LOSS_SCHEMA
              ") -> (Tensor loss, Tensor target_angle, Tensor accuracy, Tensor hardest_negative_logit)");
  library.def("linear_margin_binary_cross_entropy(" TORCHMARGIN_BINARY_SCHEMA ") -> Tensor");
  library.def("_linear_margin_binary_cross_entropy_statistics(" TORCHMARGIN_BINARY_SCHEMA
              ") -> (Tensor loss, Tensor target_angle, Tensor accuracy, Tensor hardest_negative_logit)");
  // Private: one block of classes among others. See ops/linear.cpp.
  library.def("_linear_margin_partials(" TORCHMARGIN_LINEAR_SCHEMA TORCHMARGIN_PARTIALS_SCHEMA
              ") -> (Tensor other_lse, Tensor target_logit, Tensor logit_sum, Tensor target_angle, "
              "Tensor max_other_logit, Tensor plain_target_logit, Tensor hardest_logit, Tensor hardest_class)");
  library.def("_linear_margin_binary_partials(" TORCHMARGIN_BINARY_SCHEMA
              ", int calls=1) -> (Tensor other_sum, Tensor target_logit, Tensor logit_sum, Tensor target_angle, "
              "Tensor max_other_logit, Tensor plain_target_logit, Tensor hardest_logit, Tensor hardest_class)");
  // Private: what shards exchange before a margin of their rows' own, and make of it. See ops/linear.cpp.
  library.def("_linear_target_angle(Tensor input, Tensor weight, Tensor target, int sub_centers) -> Tensor");
  library.def(
      "_plain_margin(Tensor target_angle, float m1, float m2, float m3, Tensor? sample_m2, Tensor? sample_m3) -> "
      "Tensor");
  // Private: the loss from the forward's results. See ops/cross_entropy.cpp.
  library.def("_margin_loss(" TORCHMARGIN_LOSS_OP_SCHEMA ") -> Tensor");
  library.def("_margin_loss_backward(" TORCHMARGIN_LOSS_BACKWARD_OP_SCHEMA
              ") -> (Tensor grad_other_lse, Tensor grad_target_logit, Tensor grad_mean_logit)");
  library.def(
      "_with_hardest(Tensor other_lse, Tensor logit_sum, Tensor hardest_logit, float scale, "
      "float hardest_margin) -> (Tensor other_lse, Tensor logit_sum)");
  library.def(
      "_margin_binary_loss(Tensor other_sum, Tensor target_logit, Tensor target, int num_classes, "
      "float positive_weight, float negative_weight, int ignore_index) -> Tensor");
  // Private: the forward with what its backward needs, and that backward. See ops/problem.h.
  library.def("_linear_margin_forward(" TORCHMARGIN_PACKED_LINEAR_SCHEMA TORCHMARGIN_FORWARD_REQUEST_SCHEMA
              ") -> (Tensor other_lse, Tensor target_logit, Tensor logit_sum, Tensor hardest_logit, "
              "Tensor target_angle, Tensor max_other_logit, Tensor hardest_class, Tensor kept, Tensor winners, "
              "Tensor inverse_norms, Tensor weight_sum, Tensor row_state, Tensor weight_scale)");
  library.def("_linear_margin_backward(" TORCHMARGIN_PACKED_LINEAR_SCHEMA TORCHMARGIN_BACKWARD_REQUEST_SCHEMA
              ") -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_sample_m2, "
              "Tensor grad_sample_m3)");
  library.def("_linear_target_rows(" TORCHMARGIN_PACKED_LINEAR_SCHEMA ") -> (Tensor target_angle, Tensor row_state)");
  library.def("_margin_logits_forward(" TORCHMARGIN_PACKED_LINEAR_SCHEMA
              ") -> (Tensor logits, Tensor inverse_norms, Tensor row_state)");
  library.def("_margin_logits_backward(" TORCHMARGIN_PACKED_LINEAR_SCHEMA TORCHMARGIN_LOGITS_BACKWARD_REQUEST_SCHEMA
              ") -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_sample_m2, "
              "Tensor grad_sample_m3)");
  // The same for given cosines. See ops/cosine_problem.h.
  library.def("_margin_cosine_forward(" TORCHMARGIN_PACKED_COSINE_SCHEMA
              ", int? ignore_index, bool with_logit_sum) -> (Tensor other_lse, Tensor target_logit, "
              "Tensor logit_sum)");
  library.def("_margin_cosine_backward(" TORCHMARGIN_PACKED_COSINE_SCHEMA TORCHMARGIN_COSINE_BACKWARD_REQUEST_SCHEMA
              ") -> (Tensor grad_cosine, Tensor grad_sample_m2, Tensor grad_sample_m3)");
  library.def("_margin_transform_forward(Tensor cosine, float[] numbers) -> Tensor");
  library.def("_margin_transform_backward(Tensor grad, Tensor cosine, float[] numbers) -> Tensor");
  // A stateful loss's state under activation checkpointing. See ops/recall_state.cpp.
  library.def(
      "_recall_state(Tensor(a!) log, Tensor key, Tensor state) -> (Tensor state_then, Tensor fresh)",
      {at::Tag::cudagraph_unsafe, at::Tag::nondeterministic_seeded});
}
