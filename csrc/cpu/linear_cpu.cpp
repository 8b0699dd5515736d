// The private linear ops on the CPU (sweep/linear_ops.h).
#include "cpu/device.h"
#include "cpu/target_values.h"
#include "sweep/linear_ops.h"

namespace torchmargin::cpu {
namespace {

TORCH_LIBRARY_IMPL(torchmargin, CPU, library) {
  LinearOps<OnCpu, device>::add_to(library);
}

} // namespace
} // namespace torchmargin::cpu
