// The CPU's kernels: range_kernels.h in parallel. No row is shared between
// threads and every sum has a fixed order, so results do not depend on the number of threads
// (the products' own may).
#include "cpu/device.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/loops.h"
#include "cpu/range_kernels.h"
#include "sweep/tile_steps.h"

namespace torchmargin::cpu {
namespace {

// Shares [0, size) out among the threads.
template <typename Args>
void in_parallel(
    const Args& args,
    c10::ScalarType acc,
    int64_t size,
    int64_t grain_size,
    void (*range)(const Args&, c10::ScalarType, int64_t, int64_t)) {
  at::parallel_for(0, size, grain_size, [&](int64_t begin, int64_t end) { range(args, acc, begin, end); });
}

void load_rows(const LoadRowsArgs& args, c10::ScalarType acc) {
  if (args.inverse_norms != nullptr || args.out != nullptr) {
    in_parallel(args, acc, args.row_count, grain(args.features), load_rows_range);
  }
  if (args.sum != nullptr) {
    // NB: without them the rows would be added as they are, silently.
    TORCH_INTERNAL_ASSERT(!args.measured || args.inverse_norms != nullptr);
    in_parallel(args, acc, args.features, 64, sum_rows_range);
  }
}

void accumulate_chunk(const AccumulateChunkArgs& args, c10::ScalarType acc) {
  in_parallel(args, acc, args.tile.row_count, grain(args.tile.class_count), accumulate_range);
}

void softmax_chunk(const SoftmaxChunkArgs& args, c10::ScalarType acc) {
  in_parallel(args, acc, args.tile.row_count, grain(args.tile.class_count), softmax_range);
}

void target_rows(const TargetRowsArgs& args, c10::ScalarType acc) {
  in_parallel(args, acc, args.rows, grain(args.context.features * 4), target_rows_range);
}

void combine_rows(const CombineRowsArgs& args, c10::ScalarType acc) {
  in_parallel(args, acc, args.rows, grain(args.context.features * 4), combine_rows_range);
}

void hard_rows(const HardRowsArgs& args, c10::ScalarType acc) {
  in_parallel(args, acc, args.rows, grain(64), hard_rows_range);
}

void merge_hardest(const MergeHardestArgs& args, c10::ScalarType acc) {
  const int64_t work = args.context.features * 4 * args.hardest * args.context.centers;
  in_parallel(args, acc, args.rows, grain(work), merge_hardest_range);
}

void fold_centers(const FoldCentersArgs& args, c10::ScalarType acc) {
  in_parallel(args, acc, args.row_count, grain(args.class_count * args.centers), fold_centers_range);
}

void spread_centers(const SpreadCentersArgs& args, c10::ScalarType acc) {
  in_parallel(args, acc, args.row_count, grain(args.class_count * args.centers), spread_centers_range);
}

void add_binary(const AddBinaryArgs& args, c10::ScalarType acc) {
  in_parallel(args, acc, args.tile.row_count, grain(args.tile.class_count), add_binary_range);
}

void weigh_binary(const WeighBinaryArgs& args, c10::ScalarType acc) {
  in_parallel(args, acc, args.tile.row_count, grain(args.tile.class_count), weigh_binary_range);
}

void write_hardest(const WriteHardestArgs& args, c10::ScalarType acc) {
  in_parallel(args, acc, args.row_count, grain(args.hardest), write_hardest_range);
}

void finish_classes(const FinishClassesArgs& args, c10::ScalarType acc) {
  in_parallel(args, acc, args.class_count, grain(args.context.features), finish_classes_range);
}

void finish_rows(const FinishRowsArgs& args, c10::ScalarType acc) {
  in_parallel(args, acc, args.rows, grain(args.context.features * 8), finish_rows_range);
}

void run_lanes(int64_t lanes, const std::function<void(int64_t)>& body) {
  if (lanes == 1) { // the products and kernels inside share out the threads
    body(0);
    return;
  }
  at::parallel_for(0, lanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; ++lane) {
      body(lane);
    }
  });
}

// Fresh memory costs a page fault per 4 KiB, which for a large gradient takes as long as
// the product that fills it; 2 MiB pages make that negligible.
void prepare_buffer(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (data != nullptr && end > begin) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE); // a refusal changes nothing
  }
#endif
}

} // namespace

const Device& device() {
  static const Device cpu{
      .traits = kCpuTraits,
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
           .fused_tile = nullptr,
           .fold_sets = nullptr,
           .finish_classes = finish_classes,
           .finish_own_classes = nullptr,
           .finish_rows = finish_rows,
           .widen_upstream = widen_upstream,
           .run_lanes = run_lanes,
           .prepare_buffer = prepare_buffer},
      .steps = kPortableSteps};
  return cpu;
}

} // namespace torchmargin::cpu
