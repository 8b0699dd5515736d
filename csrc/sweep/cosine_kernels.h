// The seam of the ops on given cosines: what a device is asked for, as raw pointers.
#pragma once

#include "sweep/kernels.h"

namespace torchmargin {

// All that a kernel needs to know of margin_cross_entropy's arguments.
struct CosineContext {
  RawMatrix cosine; // [B, C]
  const int64_t* target; // [B]; outside [0, classes): absent
  int64_t classes; // C
  MarginParameters margin;
  RawMatrix sample_m2, sample_m3, sample_margin_weight; // [B, 1] or data == nullptr
};

struct CosineForwardArgs {
  CosineContext context;
  bool with_logit_sum; // false: logit_sum = 0
  double* other_lse; // [B] each
  double* target_logit;
  double* logit_sum;
};

struct CosineBackwardArgs {
  CosineContext context;
  const double* other_lse; // [B]
  // Gradients of the three results, [B] float64.
  const double* grad_other_lse;
  const double* grad_target_logit;
  const double* grad_logit_sum;
  void* grad_cosine; // [B, C] contiguous, in the cosine's dtype; or nullptr
  double* grad_m2; // [B], or nullptr
  double* grad_m3; // [B], or nullptr
};

struct TransformArgs {
  MarginParameters margin;
  c10::ScalarType dtype;
  const void* cosine; // [n]
  const void* grad; // [n], or nullptr: psi itself is written, else grad * dpsi/dc
  void* out; // [n]
};

// A device's loops over rows (elements).
struct CosineKernels {
  void (*forward)(const CosineForwardArgs&, int64_t rows);
  void (*backward)(const CosineBackwardArgs&, int64_t rows);
  void (*transform)(const TransformArgs&, int64_t count);
};

} // namespace torchmargin
