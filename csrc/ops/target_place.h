// Where a row's own class stands among C columns, if it does.
#pragma once

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

namespace torchmargin {

struct TargetPlace {
  at::Tensor present; // [B] bool: the target is one of the classes
  at::Tensor place; // [B] int64: the target, or 0 where it is absent
};

inline TargetPlace target_place(const at::Tensor& target, const c10::SymInt& classes) {
  const at::Tensor present = target.ge(0).logical_and(target.lt(classes));
  return {present, at::where(present, target, at::zeros({}, target.options()))};
}

} // namespace torchmargin
