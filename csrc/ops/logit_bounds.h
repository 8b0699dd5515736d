// What is known of a problem's logits before any is made.
#pragma once

#include "ops/problem.h"

namespace torchmargin {

// scale * log2(e) + log2(C) < 127, and no exp(-scale) below the smallest normal number: sums of exp(z) need no shift.
bool sums_are_bounded(const LinearProblem& problem);

// Can a device that has FusedTileArgs use it for all tiles? NB: by strides and options; where rows begin in memory is
// not looked at.
bool fits_fused_tiles(const LinearProblem& problem);

} // namespace torchmargin
