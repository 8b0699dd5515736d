// Trains on real digits with the ten classes spread over the ranks of a process group.
#pragma once

#if defined(__cplusplus)
extern "C" {
#endif

// `group`: the name under which c10d knows the process group. `loss`: "arcface", "inter-top-k" (two centers for each
// class and a margin for the three hardest classes) or "sphereface2" (one against all). Every rank calls it. Returns
// the share of right answers over all digits, or -1 after printing what went wrong.
double train_class_parallel_digits(const char* data, const char* group, const char* loss, int epochs);

#if defined(__cplusplus)
}
#endif
