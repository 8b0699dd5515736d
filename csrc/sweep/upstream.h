// The upstream gradients of a backward sweep, in float64.
#pragma once

#include "sweep/class_loop.h"
#include "sweep/row_operand.h"

namespace torchmargin {

// What a tile's classes weigh where that is not Q alone: see SoftmaxChunkArgs. Undefined: nothing of the kind.
struct HeadWeights {
  at::Tensor of_lse; // [B]
  at::Tensor of_sum; // [B], or undefined: 0
  at::Tensor hardest; // [B, hardest], or undefined
};

struct UpstreamVectors {
  // g_o [B], 0 where there is no other class. Where classes weigh more than Q: f, which their weights are divided by.
  at::Tensor others;
  at::Tensor own; // T [B]
  at::Tensor sum; // g_Z [B] of what all classes have in common, or undefined: all 0
  at::Tensor bias_sum; // g_Z [B] of the biases, or undefined
  HeadWeights head;
  at::Tensor weight_factor; // scale g_o [B]
  // [1]: the power of two that the operands of grad_weight and grad_bias are multiplied by. In acc it brings the
  // largest g_o to [1/2, 1); float16 unit vectors: the largest row to [2^9, 2^10).
  at::Tensor operand_scale;

  bool smoothed() const {
    return sum.defined();
  }
  Upstream pointers() const {
    return {pointer<double>(others), pointer<double>(own), pointer<double>(sum)};
  }
};

// `hard`: of ClassLoop::hard_rows().
UpstreamVectors widen_upstream(
    const ClassLoop& loop,
    const BackwardRequest& request,
    bool with_bias,
    InputNorms& norms,
    const at::Tensor& hard);

// The upstream of margin_logits in the same form: a row's gradients of the other classes' logits take
// the place of g_o Q, with g_o = 1; a row without any gradient has g_o = 0.
UpstreamVectors logits_upstream(const ClassLoop& loop, const at::Tensor& grad_logits);

} // namespace torchmargin
