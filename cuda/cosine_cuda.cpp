// The private ops on given cosines on CUDA (sweep/cosine_ops.h).
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/launch.h"
#include "sweep/cosine_ops.h"
#include "target_values.h"

namespace torchmargin::cuda {
namespace {

template <typename Args>
void enqueue(void (*launch)(const Args&, int64_t, cudaStream_t), const Args& args, int64_t count) {
  launch(args, count, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void forward(const CosineForwardArgs& args, int64_t rows) {
  enqueue(device::launch_cosine_forward, args, rows);
}
void backward(const CosineBackwardArgs& args, int64_t rows) {
  enqueue(device::launch_cosine_backward, args, rows);
}
void transform(const TransformArgs& args, int64_t count) {
  enqueue(device::launch_transform, args, count);
}

constexpr CosineKernels kKernels{forward, backward, transform};

TORCH_LIBRARY_IMPL(torchmargin, CUDA, library) {
  CosineOps<OnCuda, kKernels>::add_to(library);
}

} // namespace
} // namespace torchmargin::cuda
