// Chooses the row kernels for the running CPU, as ATen chooses its own (and as
// ATEN_CPU_CAPABILITY overrides).
#include <ATen/Version.h>

#include <string_view>

#include "cpu/row_kernels.h"

namespace torchmargin::cpu {

#define TORCHMARGIN_DECLARE_ISA(name)         \
  namespace name {                            \
  const RowKernels<float>& float_kernels();   \
  const RowKernels<double>& double_kernels(); \
  }
TORCHMARGIN_DECLARE_ISA(baseline)
#if defined(__x86_64__)
TORCHMARGIN_DECLARE_ISA(avx2)
TORCHMARGIN_DECLARE_ISA(avx512)
#endif

namespace {
enum class Isa { baseline, avx2, avx512 };

Isa running_isa() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    return Isa::avx512;
  }
  if (capability == "AVX2") {
    return Isa::avx2;
  }
#endif
  return Isa::baseline;
}

Isa isa() {
  static const Isa chosen = running_isa();
  return chosen;
}
} // namespace

template <>
const RowKernels<float>& row_kernels<float>() {
#if defined(__x86_64__)
  return isa() == Isa::avx512 ? avx512::float_kernels()
      : isa() == Isa::avx2    ? avx2::float_kernels()
                              : baseline::float_kernels();
#else
  return baseline::float_kernels();
#endif
}

template <>
const RowKernels<double>& row_kernels<double>() {
#if defined(__x86_64__)
  return isa() == Isa::avx512 ? avx512::double_kernels()
      : isa() == Isa::avx2    ? avx2::double_kernels()
                              : baseline::double_kernels();
#else
  return baseline::double_kernels();
#endif
}

} // namespace torchmargin::cpu
