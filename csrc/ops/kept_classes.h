// How many leading classes' products a forward should keep for its backward.
#pragma once

#include <cstdint>

#include "ops/problem.h"

namespace torchmargin {

// None where no backward will come or where the sizes are symbolic (the plan must not guard on them).
// `calls`: this many forwards hold what they keep at the same time.
int64_t choose_kept_classes(const LinearProblem& problem, int64_t calls = 1);

} // namespace torchmargin
