// The CPU's side of the seam in sweep/kernels.h.
#pragma once

#include "sweep/kernels.h"

namespace torchmargin::cpu {

const SweepKernels& sweep_kernels();

} // namespace torchmargin::cpu
