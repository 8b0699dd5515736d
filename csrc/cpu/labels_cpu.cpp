// _checked_labels on the CPU: every rank sees the labels of all, so a bad one is the same error on each of them.
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "ops/labels_of_ranks.h"

namespace torchmargin::cpu {
namespace {

at::Tensor checked_labels(const at::Tensor& labels, int64_t num_classes, int64_t ignore_index, int64_t group_size) {
  at::Tensor checked = labels.clone(at::MemoryFormat::Contiguous);
  const int64_t* const values = checked.const_data_ptr<int64_t>();
  const int64_t rows = checked.numel() / group_size; // of each rank
  for (int64_t i = 0; i < checked.numel(); ++i) {
    TORCH_CHECK(values[i] != kRefusedLabel || ignore_index == kRefusedLabel, refusal_of(i / rows));
    TORCH_CHECK_INDEX(
        (values[i] >= 0 && values[i] < num_classes) || values[i] == ignore_index,
        "class_parallel: expected target values in [0, ", num_classes, ") or ignore_index (", ignore_index,
        "), but got ", values[i], " at row ", i % rows, " of rank ", i / rows, " with C = ", num_classes, " classes");
  }
  return checked;
}

TORCH_LIBRARY_IMPL(torchmargin, CPU, library) {
  library.impl("_checked_labels", checked_labels);
}

} // namespace
} // namespace torchmargin::cpu
