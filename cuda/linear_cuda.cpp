// The private linear ops on CUDA (sweep/linear_ops.h): the sweep with this device's kernels on the current stream.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "fused_tile.h"
#include "kernels/launch.h"
#include "sweep/linear_ops.h"
#include "sweep/tile_steps.h"
#include "target_values.h"

namespace torchmargin::cuda {
namespace {

// Enqueues a kernel on the current stream and checks the launch.
template <typename Args>
void enqueue(void (*launch)(const Args&, c10::ScalarType, cudaStream_t), const Args& args, c10::ScalarType acc) {
  launch(args, acc, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void load_rows(const LoadRowsArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_load_rows, args, acc);
}
void accumulate_chunk(const AccumulateChunkArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_accumulate_chunk, args, acc);
}
void softmax_chunk(const SoftmaxChunkArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_softmax_chunk, args, acc);
}
void target_rows(const TargetRowsArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_target_rows, args, acc);
}
void combine_rows(const CombineRowsArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_combine_rows, args, acc);
}
void finish_classes(const FinishClassesArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_finish_classes, args, acc);
}
void finish_own_classes(const FinishClassesArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_finish_own_classes, args, acc);
}
void widen_upstream(const WidenUpstreamArgs& args) {
  device::launch_widen_upstream(args, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
void fold_sets(const FoldSetsArgs& args) {
  device::launch_fold_sets(args, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
void finish_rows(const FinishRowsArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_finish_rows, args, acc);
}
void hard_rows(const HardRowsArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_hard_rows, args, acc);
}
void merge_hardest(const MergeHardestArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_merge_hardest, args, acc);
}
void fold_centers(const FoldCentersArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_fold_centers, args, acc);
}
void spread_centers(const SpreadCentersArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_spread_centers, args, acc);
}
void write_hardest(const WriteHardestArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_write_hardest, args, acc);
}
void add_binary(const AddBinaryArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_add_binary, args, acc);
}
void weigh_binary(const WeighBinaryArgs& args, c10::ScalarType acc) {
  enqueue(device::launch_weigh_binary, args, acc);
}
void run_lanes(int64_t lanes, const std::function<void(int64_t)>& body) {
  for (int64_t lane = 0; lane < lanes; ++lane) { // the plan makes one: a stream is one queue
    body(lane);
  }
}
void prepare_buffer(void* /*data*/, int64_t /*bytes*/) {}

GpuShape look_at(c10::DeviceIndex index) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
    return value;
  };
  return {
      .processors = attribute(cudaDevAttrMultiProcessorCount),
      .l2_bytes = attribute(cudaDevAttrL2CacheSize),
      .fused_tiles = fused_tiles_run_on(
          attribute(cudaDevAttrComputeCapabilityMajor), attribute(cudaDevAttrComputeCapabilityMinor))};
}

// Looked at once. Without a GPU, or without that one, some.
GpuShape shape_of(c10::DeviceIndex index) {
  static const std::vector<GpuShape> shapes = [] {
    std::vector<GpuShape> found;
    for (c10::DeviceIndex each = 0; each < c10::cuda::device_count(); ++each) {
      found.push_back(look_at(each));
    }
    return found;
  }();
  if (shapes.empty()) {
    return kSomeGpu;
  }
  const size_t wanted = static_cast<size_t>(index < 0 ? c10::cuda::current_device() : index);
  return wanted < shapes.size() ? shapes[wanted] : kSomeGpu;
}

[[maybe_unused]] const bool described = (describe_gpus_by(shape_of), true);

Device make_device(const GpuShape& shape) {
  return {
      .traits = gpu_traits(shape),
      .kernels =
          {.load_rows = load_rows,
           .target_rows = target_rows,
           .accumulate_chunk = accumulate_chunk,
           .combine_rows = combine_rows,
           .hard_rows = hard_rows,
           .merge_hardest = merge_hardest,
           .fold_centers = fold_centers,
           .spread_centers = spread_centers,
           .write_hardest = write_hardest,
           .add_binary = add_binary,
           .weigh_binary = weigh_binary,
           .softmax_chunk = softmax_chunk,
           .fused_tile = shape.fused_tiles ? fused_tile : nullptr,
           .fold_sets = fold_sets,
           .finish_classes = finish_classes,
           .finish_own_classes = finish_own_classes,
           .finish_rows = finish_rows,
           .widen_upstream = widen_upstream,
           .run_lanes = run_lanes,
           .prepare_buffer = prepare_buffer},
      .steps = kPortableSteps};
}

const Device& this_device() {
  static const std::vector<Device> devices = [] {
    std::vector<Device> made;
    for (c10::DeviceIndex each = 0; each < c10::cuda::device_count(); ++each) {
      made.push_back(make_device(shape_of(each)));
    }
    return made;
  }();
  return devices.at(static_cast<size_t>(c10::cuda::current_device()));
}

TORCH_LIBRARY_IMPL(torchmargin, CUDA, library) {
  LinearOps<OnCuda, this_device>::add_to(library);
}

} // namespace
} // namespace torchmargin::cuda
