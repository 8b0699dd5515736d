// The kernel of FusedTileArgs for sm_90a.
#pragma once

#include <driver_types.h>

#include "sweep/kernels.h"

namespace torchmargin::hopper {

// Does the driver know the copies that this is made of?
bool can_describe_matrices();

// Enqueues the tile on the current device.
cudaError_t launch_fused_tile(const FusedTileArgs& args, cudaStream_t stream);

} // namespace torchmargin::hopper
