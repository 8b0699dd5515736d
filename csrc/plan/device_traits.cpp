#include "plan/device_traits.h"

#include <atomic>

namespace torchmargin {
namespace {

using Describe = GpuShape (*)(c10::DeviceIndex);

std::atomic<Describe>& describe_gpu() {
  static std::atomic<Describe> describe{nullptr};
  return describe;
}

} // namespace

DeviceTraits traits_of(c10::Device device) {
  if (device.type() != c10::DeviceType::CUDA) {
    return kCpuTraits;
  }
  const Describe describe = describe_gpu().load();
  return gpu_traits(describe != nullptr ? describe(device.index()) : kSomeGpu);
}

void describe_gpus_by(Describe describe) {
  describe_gpu().store(describe);
}

} // namespace torchmargin
