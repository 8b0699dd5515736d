// The CPU as the sweeps see it (sweep/device.h).
#pragma once

#include "sweep/device.h"

namespace torchmargin::cpu {

const Device& device();

} // namespace torchmargin::cpu
