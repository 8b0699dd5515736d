#include "bindings/introspection.h"

#include <algorithm>
#include <array>
#include <sstream>
#include <stdexcept>

#include "ops/margins.h"
#include "plan/sweep_plan.h"
#include "torchmargin/presets.h"
#include "torchmargin/settings.h"
#include "torchmargin/version.h"

namespace torchmargin::bindings {
namespace {

c10::DeviceType parse_device(const std::string& device_type) {
  if (device_type == "cpu") {
    return c10::DeviceType::CPU;
  }
  if (device_type == "cuda") {
    return c10::DeviceType::CUDA;
  }
  throw std::invalid_argument("torchmargin: expected device type 'cpu' or 'cuda', but got '" + device_type + "'");
}

struct Dtype {
  const char* name;
  c10::ScalarType type;
};
constexpr std::array<Dtype, 4> kDtypes{
    {{"float64", c10::ScalarType::Double},
     {"float32", c10::ScalarType::Float},
     {"float16", c10::ScalarType::Half},
     {"bfloat16", c10::ScalarType::BFloat16}}};

const char* name_of(c10::ScalarType type) {
  return std::find_if(kDtypes.begin(), kDtypes.end(), [&](const Dtype& dtype) { return dtype.type == type; })->name;
}

c10::ScalarType parse_dtype(const char* argument, const std::string& name) {
  for (const Dtype& dtype : kDtypes) {
    if (name == dtype.name) {
      return dtype.type;
    }
  }
  throw std::invalid_argument(
      std::string("torchmargin: expected ") + argument + " float64, float32, bfloat16 or float16, but got '" + name +
      "'");
}

std::string plain(Extension extension) {
  return std::string(extension_name(extension));
}

std::string plain(MarginGradient margin_gradient) {
  return std::string(margin_gradient_name(margin_gradient));
}

std::string plain(const char* text) {
  return text;
}

template <typename Value>
Value plain(Value value) {
  return value;
}

// What a loss of the table has, of all that any has.
template <typename Loss>
Published shown() {
  Published values;
#define TORCHMARGIN_SHOW(name)              \
  if constexpr (requires { Loss::name; }) { \
    values[#name] = plain(Loss::name);      \
  }
  TORCHMARGIN_SHOW(scale)
  TORCHMARGIN_SHOW(margin)
  TORCHMARGIN_SHOW(m1)
  TORCHMARGIN_SHOW(m2)
  TORCHMARGIN_SHOW(m3)
  TORCHMARGIN_SHOW(extension)
  TORCHMARGIN_SHOW(margin_gradient)
  TORCHMARGIN_SHOW(normalize_input)
  TORCHMARGIN_SHOW(normalize_weight)
  TORCHMARGIN_SHOW(bias)
  TORCHMARGIN_SHOW(lambda_base)
  TORCHMARGIN_SHOW(lambda_gamma)
  TORCHMARGIN_SHOW(lambda_min)
  TORCHMARGIN_SHOW(h)
  TORCHMARGIN_SHOW(momentum)
  TORCHMARGIN_SHOW(length_mean)
  TORCHMARGIN_SHOW(length_std)
  TORCHMARGIN_SHOW(a_min)
  TORCHMARGIN_SHOW(a_max)
  TORCHMARGIN_SHOW(m_min)
  TORCHMARGIN_SHOW(m_max)
  TORCHMARGIN_SHOW(regularizer)
  TORCHMARGIN_SHOW(kind)
  TORCHMARGIN_SHOW(deviation)
  TORCHMARGIN_SHOW(t)
  TORCHMARGIN_SHOW(sub_centers)
  TORCHMARGIN_SHOW(hardest)
  TORCHMARGIN_SHOW(hardest_margin)
  TORCHMARGIN_SHOW(positive_weight)
#undef TORCHMARGIN_SHOW
  return values;
}

} // namespace

std::string version() {
  return torchmargin::version();
}

std::string built_for_torch() {
  return torchmargin::built_for_torch();
}

std::vector<std::string> cuda_architectures() {
  std::vector<std::string> names;
  std::istringstream list(TORCHMARGIN_CUDA_ARCHITECTURES); // "8.0 9.0+PTX", empty without CUDA kernels
  for (std::string name; list >> name;) {
    names.push_back(name);
  }
  return names;
}

int64_t get_workspace_limit(const std::string& device_type) {
  return torchmargin::workspace_limit(parse_device(device_type));
}

void set_workspace_limit(const std::string& device_type, int64_t bytes) {
  if (bytes < 1) {
    throw std::invalid_argument(
        "torchmargin: expected the workspace limit to be a positive number of bytes, but got " + std::to_string(bytes));
  }
  torchmargin::set_workspace_limit(parse_device(device_type), bytes);
}

Plan choose_plan(
    int64_t rows,
    int64_t features,
    int64_t classes,
    const std::string& dtype,
    const std::string& device_type,
    const std::string& compute_dtype) {
  const c10::ScalarType scalar = parse_dtype("dtype", dtype);
  std::optional<c10::ScalarType> compute;
  if (!compute_dtype.empty()) {
    compute = parse_dtype("compute_dtype", compute_dtype);
    if (scalar != c10::ScalarType::Float || compute == c10::ScalarType::Double) {
      throw std::invalid_argument(
          "torchmargin: expected compute_dtype float16, bfloat16 or float32, with dtype float32 only, but got '" +
          compute_dtype + "' with '" + dtype + "'");
    }
  }
  if (rows < 0 || features < 1 || classes < 1) {
    throw std::invalid_argument("torchmargin: expected B >= 0, D >= 1 and C >= 1");
  }
  const bool cpu = parse_device(device_type) == c10::DeviceType::CPU;
  if (!cpu && cuda_architectures().empty()) {
    throw std::invalid_argument("torchmargin: this build has no CUDA kernels to plan for");
  }
  const torchmargin::Plan plan = torchmargin::plan(rows, features, classes, scalar, parse_device(device_type), compute);
  return {
      cpu ? "cpu-sweep" : "cuda-sweep", plan.lanes,        plan.row_tile,      plan.class_chunk,     plan.input_splits,
      name_of(plan.operand_dtype),      plan.kept_classes, plan.scratch_bytes, plan.workspace_limit, plan.fits};
}

Plan choose_plan_for_gpu(
    int64_t rows,
    int64_t features,
    int64_t classes,
    int64_t processors,
    int64_t l2_bytes,
    bool fused_tiles) {
  PlanRequest request{};
  request.rows = rows;
  request.features = features;
  request.classes = classes;
  request.dtype = c10::ScalarType::Float;
  request.compute_dtype = c10::ScalarType::Half;
  request.fused = true;
  const GpuShape gpu{processors, l2_bytes, fused_tiles};
  const SweepPlan made = make_sweep_plan(request, gpu_traits(gpu), c10::DeviceType::CUDA);
  const ChunkPlan& plan = made.chunks;
  return {"cuda-sweep", plan.lanes,        plan.row_tile,      plan.class_chunk, plan.input_splits,
          "float16",    plan.kept_classes, plan.scratch_bytes, made.limit,       plan.fits};
}

std::map<std::string, Published> published_losses() {
  return {
      {"SoftmaxLoss", shown<published::Softmax>()},
      {"ModifiedSoftmaxLoss", shown<published::ModifiedSoftmax>()},
      {"NormalizedSoftmaxLoss", shown<published::NormalizedSoftmax>()},
      {"SphereFaceLoss", shown<published::SphereFace>()},
      {"SphereFaceLoss.normalized", shown<published::NormalizedSphereFace>()},
      {"LargeMarginSoftmaxLoss", shown<published::LargeMarginSoftmax>()},
      {"CosFaceLoss", shown<published::CosFace>()},
      {"ArcFaceLoss", shown<published::ArcFace>()},
      {"CombinedMarginLoss", shown<published::CombinedMargin>()},
      {"AdaFaceLoss", shown<published::AdaFace>()},
      {"MagFaceLoss", shown<published::MagFace>()},
      {"ElasticFaceLoss", shown<published::ElasticFace>()},
      {"SubCenterArcFaceLoss", shown<published::SubCenterArcFace>()},
      {"CurricularFaceLoss", shown<published::CurricularFace>()},
      {"MVSoftmaxLoss", shown<published::MVSoftmax>()},
      {"InterTopKArcFaceLoss", shown<published::InterTopKArcFace>()},
      {"SphereFace2Loss", shown<published::SphereFace2>()},
      {"UniFaceLoss", shown<published::UniFace>()}};
}

} // namespace torchmargin::bindings
