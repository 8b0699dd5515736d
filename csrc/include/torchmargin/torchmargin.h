/// @file
/// Everything a LibTorch program needs of torchmargin.
#pragma once

#include "torchmargin/class_parallel.h"
#include "torchmargin/export.h"
#include "torchmargin/functional.h"
#include "torchmargin/margin.h"
#include "torchmargin/margin_loss.h"
#include "torchmargin/modules.h"
#include "torchmargin/options.h"
#include "torchmargin/presets.h"
#include "torchmargin/settings.h"
#include "torchmargin/state_dict.h"
#include "torchmargin/version.h"

namespace torchmargin {

/// The version of the library that runs, and of the torch that it was built for.
TORCHMARGIN_API const char* version();
TORCHMARGIN_API const char* built_for_torch();

} // namespace torchmargin
