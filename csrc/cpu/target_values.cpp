#include "cpu/target_values.h"

#include <c10/util/Exception.h>

namespace torchmargin::cpu {

void OnCpu::check_target_values(std::string_view op, const at::Tensor& target, int64_t classes, int64_t ignore_index) {
  const at::Tensor contiguous = target.contiguous();
  const int64_t* const values = contiguous.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < contiguous.numel(); ++i) {
    TORCH_CHECK_INDEX(
        (values[i] >= 0 && values[i] < classes) || values[i] == ignore_index, op, ": expected target values in [0, ",
        classes, ") or ignore_index (", ignore_index, "), but got ", values[i], " at row ", i, " with C = ", classes,
        " classes");
  }
}

} // namespace torchmargin::cpu
