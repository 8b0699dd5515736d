// One pass over given cosines, row by row: the loss's core and its gradient, and the margin
// alone, over a (begin, end) range of rows or elements; no ATen.
#pragma once

#include "sweep/cosine_kernels.h"

namespace torchmargin::cpu {

void cosine_forward(const CosineForwardArgs& args, int64_t begin, int64_t end);
void cosine_backward(const CosineBackwardArgs& args, int64_t begin, int64_t end);
void transform(const TransformArgs& args, int64_t begin, int64_t end);

} // namespace torchmargin::cpu
