#include "fused_tile.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#if defined(TORCHMARGIN_HOPPER)
#include "hopper/fused_tile.h"

namespace torchmargin::cuda {

bool fused_tiles_run_on(int major, int minor) {
  return major == 9 && minor == 0 && hopper::can_describe_matrices(); // sm_90a runs nowhere else
}

void fused_tile(const FusedTileArgs& args) {
  C10_CUDA_CHECK(hopper::launch_fused_tile(args, c10::cuda::getCurrentCUDAStream()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

} // namespace torchmargin::cuda

#else

namespace torchmargin::cuda {

bool fused_tiles_run_on(int /*major*/, int /*minor*/) {
  return false;
}

void fused_tile(const FusedTileArgs& /*args*/) {
  TORCH_INTERNAL_ASSERT(false);
}

} // namespace torchmargin::cuda

#endif
