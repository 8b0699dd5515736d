// An op by its name and C++ signature, for calls through the dispatcher. Keep the handle in a static.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace torchmargin {

template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

} // namespace torchmargin
