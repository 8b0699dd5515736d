// From a dtype to a type, for kernel bodies and launchers: no ATen.
#pragma once

#include <c10/core/ScalarType.h>

#include <stdexcept>

namespace torchmargin {

// Calls body(T()) with T = double or float.
template <typename Body>
void with_acc(c10::ScalarType acc, Body body) {
  acc == c10::ScalarType::Double ? body(double()) : body(float());
}

// Calls body(Scalar()) for the dtype of a caller's tensor.
template <typename Body>
void with_dtype(c10::ScalarType dtype, Body body) {
  switch (dtype) {
    case c10::ScalarType::Double:
      return body(double());
    case c10::ScalarType::Float:
      return body(float());
    case c10::ScalarType::Half:
      return body(c10::Half());
    case c10::ScalarType::BFloat16:
      return body(c10::BFloat16());
    default:
      throw std::logic_error("torchmargin: a kernel was given a dtype that it does not know");
  }
}

// Calls body(Scalar(), T()) with the dtype of a caller's tensor and that of its sums.
template <typename Body>
void with_dtype_and_acc(c10::ScalarType dtype, Body body) {
  with_dtype(dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    if constexpr (sizeof(Scalar) == sizeof(double)) {
      body(scalar, double());
    } else {
      body(scalar, float());
    }
  });
}

} // namespace torchmargin
