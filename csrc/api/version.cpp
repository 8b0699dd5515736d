#include <torch/version.h>

#include "torchmargin/torchmargin.h"

namespace torchmargin {

const char* version() {
  return TORCHMARGIN_VERSION;
}

const char* built_for_torch() {
  return TORCH_VERSION;
}

} // namespace torchmargin
