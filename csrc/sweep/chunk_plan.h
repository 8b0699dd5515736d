// How a B x C problem is cut into tiles that fit the workspace limit: a pure
// function from sizes to numbers. Classes shrink first, then rows; what is left of
// the limit keeps chunks of raw products for the backward pass.
#pragma once

#include <algorithm>
#include <cstdint>

namespace torchmargin {

struct SweepSizes {
  int64_t rows; // B
  int64_t features; // D
  int64_t classes; // C
  int64_t acc_bytes; // size of an element of a product: 8 for float64, else 4
  bool convert_weight; // weight chunks are copied (16-bit, or strides that a product cannot read)
  bool widen_gradients; // gradients are summed in acc before they are rounded (16-bit)
};

struct ChunkPlan {
  int64_t row_tile = 0; // rows in one product
  int64_t class_chunk = 0; // classes in one product
  int64_t kept_classes = 0; // leading classes whose products the forward can keep
  int64_t scratch_bytes = 0; // the workspace without what is kept
  bool fits = false; // false: the limit is too small even for one row and one class

  int64_t row_tiles(int64_t rows) const {
    return (rows + row_tile - 1) / row_tile;
  }
  int64_t class_chunks(int64_t classes) const {
    return (classes + class_chunk - 1) / class_chunk;
  }
};

// The workspace of the backward pass, which is the larger one: a tile of logits, the
// row operand twice (plain and times the upstream gradient), a chunk of weight
// gradients, and, where the dtype asks for it, a chunk of weights and all input
// gradients.
inline int64_t scratch_bytes(const SweepSizes& sizes, int64_t row_tile, int64_t class_chunk) {
  const int64_t weight_copies = sizes.convert_weight ? 2 : 1;
  const int64_t elements = row_tile * class_chunk + 2 * row_tile * sizes.features +
      weight_copies * class_chunk * sizes.features +
      (sizes.widen_gradients ? sizes.rows * sizes.features : 0);
  return elements * sizes.acc_bytes;
}

// On the CPU a tile of 256 x 2048 float32 logits and its operands stay in the last
// cache levels, and the products run at the speed of the whole one (docs/design.md).
constexpr int64_t kPreferredRows = 256;
constexpr int64_t kPreferredTileElements = 256 * 2048;
constexpr int64_t kLargestChunk = 8192;

// Halves classes, then rows, then classes again until the scratch fits the budget or the
// floors are reached.
inline bool shrink_to(ChunkPlan& plan, const SweepSizes& sizes, int64_t budget, int64_t rows_floor, int64_t floor) {
  const auto too_large = [&] { return scratch_bytes(sizes, plan.row_tile, plan.class_chunk) > budget; };
  const auto halve = [&](int64_t& size, int64_t least) {
    while (too_large() && size > least) {
      size = std::max(size / 2, least);
    }
  };
  halve(plan.class_chunk, 128);
  halve(plan.row_tile, rows_floor);
  halve(plan.class_chunk, floor);
  return !too_large();
}

inline ChunkPlan choose_chunk_plan(const SweepSizes& sizes, int64_t workspace_limit) {
  ChunkPlan plan;
  plan.row_tile = std::clamp<int64_t>(sizes.rows, 1, kPreferredRows);
  plan.class_chunk =
      std::clamp<int64_t>(kPreferredTileElements / plan.row_tile, 1, std::min(sizes.classes, kLargestChunk));
  // Half of the limit for the scratch leaves room for what is kept; if it must, it takes all.
  const ChunkPlan largest = plan;
  if (!shrink_to(plan, sizes, workspace_limit / 2, /*rows_floor=*/16, /*floor=*/8)) {
    plan = largest;
    shrink_to(plan, sizes, workspace_limit, /*rows_floor=*/1, /*floor=*/1);
  }
  plan.scratch_bytes = scratch_bytes(sizes, plan.row_tile, plan.class_chunk);
  plan.fits = plan.scratch_bytes <= workspace_limit;
  if (plan.fits && sizes.rows > 0) {
    const int64_t spare = (workspace_limit - plan.scratch_bytes) / (sizes.rows * sizes.acc_bytes);
    plan.kept_classes = spare >= sizes.classes ? sizes.classes : spare - spare % plan.class_chunk;
  }
  return plan;
}

} // namespace torchmargin
