// _checked_labels on CUDA: a device-side assertion, on every rank.
#include <torch/library.h>

#include "target_values.h"

namespace torchmargin::cuda {
namespace {

at::Tensor checked_labels(const at::Tensor& labels, int64_t num_classes, int64_t ignore_index, int64_t /*group_size*/) {
  const OnCuda::Guard guard(labels.device());
  OnCuda::check_target_values("_checked_labels", labels, num_classes, ignore_index);
  return labels.clone();
}

TORCH_LIBRARY_IMPL(torchmargin, CUDA, library) {
  library.impl("_checked_labels", checked_labels);
}

} // namespace
} // namespace torchmargin::cuda
