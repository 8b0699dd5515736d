#include "torchmargin/version.h"

#include <torch/version.h>

namespace torchmargin {

const char* version() {
  return TORCHMARGIN_VERSION;
}

const char* built_for_torch() {
  return TORCH_VERSION;
}

} // namespace torchmargin
