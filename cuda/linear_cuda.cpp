// The private linear ops on CUDA (sweep/linear_ops.h): the sweep with this device's kernels on the current stream.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

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

const Device& this_device() {
  static const Device gpu{
      .traits = kGpuTraits,
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
           .finish_classes = finish_classes,
           .finish_rows = finish_rows,
           .widen_upstream = nullptr,
           .run_lanes = run_lanes,
           .prepare_buffer = prepare_buffer},
      .steps = kPortableSteps};
  return gpu;
}

TORCH_LIBRARY_IMPL(torchmargin, CUDA, library) {
  LinearOps<OnCuda, this_device>::add_to(library);
}

} // namespace
} // namespace torchmargin::cuda
