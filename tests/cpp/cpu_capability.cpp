// This binary has no ATen: it answers the one question that the kernels ask of it.
#include <string>

namespace at {
std::string get_cpu_capability() {
  return "AVX2";
}
} // namespace at
