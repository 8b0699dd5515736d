// The two kernels that end the backward sweep: products in, gradients out.
#pragma once

#include "sweep/kernels.h"

namespace torchmargin::cpu {

void finish_classes(const FinishClassesArgs& args, c10::ScalarType acc);
void finish_rows(const FinishRowsArgs& args, c10::ScalarType acc);

} // namespace torchmargin::cpu
