// The schemas of all ops, public and private. Kernels are registered where they stand.
#include <torch/library.h>

#include "ops/problem.h"

TORCH_LIBRARY(torchmargin, library) {
  library.def(
      "linear_margin_lse(" TORCHMARGIN_LINEAR_SCHEMA
      ") -> (Tensor other_lse, Tensor target_logit, Tensor logit_sum, Tensor target_angle, Tensor max_other_logit)");
  library.def("linear_margin_cross_entropy(" TORCHMARGIN_LINEAR_SCHEMA
              ", float label_smoothing=0.0, int ignore_index=-100, str reduction=\"mean\") -> Tensor");
  // Private: the forward with what its backward needs, and that backward. See ops/problem.h.
  library.def("_linear_margin_forward(" TORCHMARGIN_LINEAR_SCHEMA
              ", int? ignore_index=None, bool with_logit_sum=True, int kept_classes=0) -> (Tensor other_lse, "
              "Tensor target_logit, Tensor logit_sum, Tensor target_angle, Tensor max_other_logit, "
              "Tensor kept, Tensor inverse_norms, Tensor weight_sum)");
  library.def("_linear_margin_backward(" TORCHMARGIN_LINEAR_SCHEMA
              ", Tensor? grad_other_lse, Tensor? grad_target_logit, Tensor? grad_logit_sum, Tensor other_lse, "
              "Tensor kept, Tensor inverse_norms, Tensor weight_sum, bool[5] wanted) -> (Tensor grad_input, "
              "Tensor grad_weight, Tensor grad_bias, Tensor grad_sample_m2, Tensor grad_sample_m3)");
}
