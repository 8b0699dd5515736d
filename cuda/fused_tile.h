// A tile's product and what is made of it in one kernel, on the GPUs that have it.
#pragma once

#include "sweep/kernels.h"

namespace torchmargin::cuda {

// Has this build the kernel for such a GPU, and the driver what it needs?
bool fused_tiles_run_on(int major, int minor);

// On the current stream.
void fused_tile(const FusedTileArgs& args);

} // namespace torchmargin::cuda
