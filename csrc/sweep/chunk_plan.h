// How a B x C problem is cut into tiles that fit the workspace limit: a pure
// function from sizes to numbers. Classes shrink first, then rows; what is left of
// the limit keeps chunks of raw products for the backward pass.
#pragma once

#include <algorithm>
#include <cstdint>

namespace torchmargin {

// The tile that a device likes best.
struct TilePreference {
  int64_t rows;
  int64_t elements; // rows x classes
  int64_t classes;
};

// On the CPU a tile of 256 x 512 float32 logits, its operands and its gradients stay in the last
// cache levels, and the products run at the speed of the whole one (docs/design.md).
constexpr TilePreference kCpuTile{256, 256 * 512, 4096};
// On a GPU 24 MiB of float32 logits stay in the L2 cache between product and fused pass.
constexpr TilePreference kGpuTile{4096, 6 << 20, 1 << 16};

struct SweepSizes {
  int64_t rows; // B
  int64_t features; // D
  int64_t classes; // C
  int64_t acc_bytes; // size of an element of a product: 8 for float64, else 4
  bool convert_weight; // weight chunks are copied (16-bit, or strides that a product cannot read)
  bool widen_gradients; // gradients are summed in acc before they are rounded (16-bit)
  int64_t threads; // that can sweep side by side; 1 where the device works on one chunk at a time
  TilePreference preferred = kCpuTile;
};

struct ChunkPlan {
  // Chunks are dealt to this many lanes, each with a workspace of its own: `threads`, or 1
  // and every product is shared out among the threads.
  int64_t lanes = 1;
  int64_t row_tile = 0; // rows in one product
  int64_t class_chunk = 0; // classes in one product
  int64_t kept_classes = 0; // leading classes whose products the forward can keep
  int64_t scratch_bytes = 0; // the workspace without what is kept
  bool fits = false; // false: the limit is too small even for one row and one class

  // All rows' operands are loaded once; else a tile's, again for each chunk.
  bool whole_operands(int64_t rows) const {
    return lanes > 1 || rows <= row_tile;
  }
};

// The workspace of the backward pass, which is the larger one. Each lane: a tile of
// logits, a chunk of weight gradients, and a chunk of weights if they are converted.
// Together: the row operand twice (plain and times the upstream gradient), and the sums
// of input gradients that are not in the gradient itself.
inline int64_t scratch_bytes(const SweepSizes& sizes, const ChunkPlan& plan) {
  const int64_t weight_copies = sizes.convert_weight ? 2 : 1;
  const int64_t lane = plan.row_tile * plan.class_chunk + weight_copies * plan.class_chunk * sizes.features;
  const int64_t operand_rows = plan.whole_operands(sizes.rows) ? sizes.rows : plan.row_tile;
  const int64_t input_sums = plan.lanes - 1 + (sizes.widen_gradients ? 1 : 0);
  const int64_t elements =
      plan.lanes * lane + 2 * operand_rows * sizes.features + input_sums * sizes.rows * sizes.features;
  return elements * sizes.acc_bytes;
}

// A lane should have a few chunks, none of them so small that its products become slow.
constexpr int64_t kChunksPerLane = 4;
constexpr int64_t kSmallestLaneChunk = 128;

// Halves classes, then rows, then classes again until the scratch fits the budget or the
// floors are reached.
inline bool
shrink_to(ChunkPlan& plan, const SweepSizes& sizes, int64_t budget, int64_t rows_floor, int64_t classes_floor) {
  const auto too_large = [&] { return scratch_bytes(sizes, plan) > budget; };
  const auto halve = [&](int64_t& size, int64_t least) {
    while (too_large() && size > least) {
      size = std::max(size / 2, least);
    }
  };
  halve(plan.class_chunk, kSmallestLaneChunk);
  halve(plan.row_tile, rows_floor);
  halve(plan.class_chunk, classes_floor);
  return !too_large();
}

inline ChunkPlan choose_chunk_plan(const SweepSizes& sizes, int64_t workspace_limit) {
  ChunkPlan largest;
  largest.row_tile = std::clamp<int64_t>(sizes.rows, 1, sizes.preferred.rows);
  largest.class_chunk = std::clamp<int64_t>(
      sizes.preferred.elements / largest.row_tile, 1, std::min(sizes.classes, sizes.preferred.classes));
  // Half of the limit for the scratch leaves room for what is kept; if it must, it takes all.
  ChunkPlan plan = largest;
  plan.lanes = sizes.threads;
  plan.class_chunk = std::min(plan.class_chunk, sizes.classes / (sizes.threads * kChunksPerLane));
  const bool lanes = sizes.threads > 1 && plan.class_chunk >= kSmallestLaneChunk &&
      shrink_to(plan, sizes, workspace_limit / 2, sizes.preferred.rows, kSmallestLaneChunk);
  if (!lanes) {
    plan = largest;
    if (!shrink_to(plan, sizes, workspace_limit / 2, /*rows_floor=*/16, /*classes_floor=*/8)) {
      plan = largest;
      shrink_to(plan, sizes, workspace_limit, /*rows_floor=*/1, /*classes_floor=*/1);
    }
  }
  plan.scratch_bytes = scratch_bytes(sizes, plan);
  plan.fits = plan.scratch_bytes <= workspace_limit;
  if (plan.fits && sizes.rows > 0) {
    const int64_t spare = (workspace_limit - plan.scratch_bytes) / (sizes.rows * sizes.acc_bytes);
    plan.kept_classes = spare >= sizes.classes ? sizes.classes : spare - spare % plan.class_chunk;
  }
  return plan;
}

} // namespace torchmargin
