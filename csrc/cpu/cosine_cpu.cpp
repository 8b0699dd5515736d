// The private ops on given cosines on the CPU (sweep/cosine_ops.h): the loops.
#include <ATen/Parallel.h>

#include "cpu/cosine_kernels.h"
#include "cpu/loops.h"
#include "cpu/target_values.h"
#include "sweep/cosine_ops.h"

namespace torchmargin::cpu {
namespace {

void forward(const CosineForwardArgs& args, int64_t rows) {
  at::parallel_for(
      0, rows, grain(args.context.classes), [&](int64_t begin, int64_t end) { cosine_forward(args, begin, end); });
}

void backward(const CosineBackwardArgs& args, int64_t rows) {
  at::parallel_for(
      0, rows, grain(args.context.classes), [&](int64_t begin, int64_t end) { cosine_backward(args, begin, end); });
}

void transform_all(const TransformArgs& args, int64_t count) {
  at::parallel_for(0, count, grain(1), [&](int64_t begin, int64_t end) { transform(args, begin, end); });
}

constexpr CosineKernels kKernels{forward, backward, transform_all};

TORCH_LIBRARY_IMPL(torchmargin, CPU, library) {
  CosineOps<OnCpu, kKernels>::add_to(library);
}

} // namespace
} // namespace torchmargin::cpu
