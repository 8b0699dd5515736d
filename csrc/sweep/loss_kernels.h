// What a GPU is asked for by the loss op on [B] vectors, as raw pointers (ops/loss_op.h).
#pragma once

#include "sweep/kernels.h"

namespace torchmargin {

struct LossArgs {
  int64_t rows;
  const double* other_lse; // [B]
  const double* target_logit; // [B]
  const double* mean_logit; // [B], or nullptr: no smoothing
  const int64_t* target; // [B]
  double label_smoothing;
  int64_t ignore_index;
  bool reduced; // to a sum, or the mean of the rows that count; NaN without one
  bool mean;
  bool wide; // loss is float64, else float32
  void* loss; // [B], or [1]
};

struct LossGradientArgs {
  int64_t rows;
  RawMatrix grad; // of the loss: [B, 1], row_stride 0 where it is reduced
  const double* other_lse; // [B]
  const double* target_logit;
  const int64_t* target;
  double label_smoothing;
  int64_t ignore_index;
  bool mean;
  double* to_other; // [B] each
  double* to_own;
  double* to_mean;
};

} // namespace torchmargin
