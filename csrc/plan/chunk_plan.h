// How a B x C problem is cut into tiles that fit the workspace limit: a pure
// function from sizes to numbers. Classes shrink first, then rows; what is left of
// the limit keeps chunks of raw products for the backward pass.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plan/device_traits.h"

namespace torchmargin {

constexpr int64_t kMostSplits = 8;
constexpr int64_t kSmallestSplit = 256; // classes
// An output tile of a GPU's product: of cuBLAS more often than not, and of the fused kernel.
constexpr int64_t kOutputRows = 128;
constexpr int64_t kOutputColumns = 256;

// Columns of the matrix [B, columns] that holds the kept products: all classes' rows begin at 32 bytes.
template <typename Size>
Size kept_columns(Size kept_classes, Size classes) {
  return kept_classes == classes ? (classes + 7) / 8 * 8 : kept_classes;
}

struct SweepSizes {
  int64_t rows; // B
  int64_t features; // D
  int64_t classes; // C
  int64_t acc_bytes; // size of an element of a product: 8 for float64, else 4
  int64_t operand_bytes; // of what a product reads: acc_bytes, or 2
  bool convert_weight; // weight chunks are copied (16-bit, or strides that a product cannot read)
  bool widen_gradients; // gradients are summed in acc before they are rounded (16-bit)
  int64_t threads; // that can sweep side by side; 1 where the device works on one chunk at a time
  TilePreference preferred = kCpuTile;
  int64_t centers = 1; // K: weights of each class
  bool fused = false; // logits are never written, and so none are kept

  // The row length of a workspace matrix with `columns` columns.
  int64_t padded(int64_t columns) const {
    return (columns + preferred.alignment - 1) / preferred.alignment * preferred.alignment;
  }
  // Of what is kept for a row and a class: a product, or the largest cosine and whose it is.
  int64_t kept_bytes() const {
    return acc_bytes + (centers > 1 ? 1 : 0);
  }
};

struct ChunkPlan {
  // Chunks are dealt to this many lanes, each with a workspace of its own: `threads`, or 1
  // and every product is shared out among the threads.
  int64_t lanes = 1;
  int64_t row_tile = 0; // rows in one product
  int64_t class_chunk = 0; // classes in one product
  // grad_input's product is cut into this many slices of the chunk's classes, which are summed at the end: a product
  // of few rows has too few output tiles for a GPU.
  int64_t input_splits = 1;
  int64_t kept_classes = 0; // leading classes whose products the forward can keep
  int64_t scratch_bytes = 0; // the workspace without what is kept
  bool fits = false; // false: the limit is too small even for one row and one class

  // All rows' operands are loaded once; else a tile's, again for each chunk.
  bool whole_operands(int64_t rows) const {
    return lanes > 1 || rows <= row_tile;
  }
};

// What a tile's element takes: a logit, and the softmax weight if it is narrower.
inline int64_t logit_bytes(const SweepSizes& sizes) {
  return (sizes.fused ? 0 : sizes.acc_bytes) + (sizes.operand_bytes < sizes.acc_bytes ? sizes.operand_bytes : 0);
}
// A chunk's feature: of the weights' gradient, and of the weights if they are converted.
inline int64_t weight_bytes(const SweepSizes& sizes) {
  return sizes.acc_bytes + (sizes.convert_weight ? sizes.operand_bytes : 0);
}

// The workspace of the backward pass, which is the larger one. Each lane: a tile of
// logits (with sub-centers a plane for each, and which of them wins), the softmax weights if they are narrower, a chunk
// of weight gradients, and a chunk of weights if they are converted. Together: the row operand twice (plain and times
// the upstream gradient), the sums of input gradients that are not in the gradient itself, and on a GPU the products of
// the classes that have rows.
inline int64_t scratch_bytes(const SweepSizes& sizes, const ChunkPlan& plan) {
  const int64_t features = sizes.padded(sizes.features);
  const int64_t winners = sizes.centers > 1 ? plan.row_tile * sizes.padded(plan.class_chunk) : 0;
  const int64_t lane = winners +
      sizes.centers *
          (plan.row_tile * sizes.padded(plan.class_chunk) * logit_bytes(sizes) +
           plan.class_chunk * features * weight_bytes(sizes));
  const int64_t operand_rows = plan.whole_operands(sizes.rows) ? sizes.rows : plan.row_tile;
  const int64_t own_memory = sizes.widen_gradients || plan.input_splits > 1 ? 1 : 0;
  const int64_t input_sums = plan.lanes * plan.input_splits - 1 + own_memory;
  const int64_t own_products = sizes.preferred.processors > 0 ? 1 : 0;
  return plan.lanes * lane + 2 * operand_rows * features * sizes.operand_bytes +
      (input_sums + own_products) * sizes.rows * sizes.features * sizes.acc_bytes;
}

// A lane should have a few chunks, none of them so small that its products become slow.
constexpr int64_t kChunksPerLane = 4;
constexpr int64_t kSmallestLaneChunk = 128;

// Gives up slices, then halves classes, then rows, then classes again until the scratch fits the budget or the
// floors are reached.
inline bool
shrink_to(ChunkPlan& plan, const SweepSizes& sizes, int64_t budget, int64_t rows_floor, int64_t classes_floor) {
  const auto too_large = [&] { return scratch_bytes(sizes, plan) > budget; };
  const auto halve = [&](int64_t& size, int64_t least) {
    while (too_large() && size > least) {
      size = std::max(size / 2, least);
    }
  };
  halve(plan.input_splits, 1);
  halve(plan.class_chunk, kSmallestLaneChunk);
  halve(plan.row_tile, rows_floor);
  halve(plan.class_chunk, classes_floor);
  return !too_large();
}

inline int64_t tiles_of(int64_t size, int64_t tile) {
  return (size + tile - 1) / tile;
}

// So many slices that the device has an output tile of kOutputRows^2 for about half of its processors: more slices cost
// more than they bring.
inline int64_t choose_input_splits(const SweepSizes& sizes, const ChunkPlan& plan) {
  if (sizes.preferred.processors == 0 || sizes.rows > plan.row_tile) {
    return 1;
  }
  const int64_t tiles = tiles_of(sizes.rows, kOutputRows) * tiles_of(sizes.features, kOutputRows);
  const int64_t wanted = tiles == 0 ? kMostSplits : (sizes.preferred.processors / 2 + tiles / 2) / tiles;
  return std::clamp<int64_t>(std::min(wanted, plan.class_chunk / kSmallestSplit), 1, kMostSplits);
}

// The largest chunk of at most `most` classes whose logits' output tiles fill the processors wave after wave, or fill
// them best. NB: a fused kernel's pairs of tiles on pairs of processors come to the same.
inline int64_t whole_waves(const SweepSizes& sizes, int64_t row_tile, int64_t most) {
  const int64_t processors = sizes.preferred.processors;
  const int64_t beside = tiles_of(row_tile, kOutputRows);
  int64_t best = 0;
  double best_filled = 0.0;
  for (int64_t waves = 1;; ++waves) {
    const int64_t columns = waves * processors / beside;
    if (columns * kOutputColumns > most) {
      break;
    }
    const double filled = static_cast<double>(columns * beside) / static_cast<double>(waves * processors);
    if (columns > 0 && filled >= best_filled) {
      best = columns * kOutputColumns;
      best_filled = filled;
    }
  }
  return best > 0 ? best : std::max(most / kOutputColumns * kOutputColumns, std::min(most, kOutputColumns));
}

// Of a GPU: what a chunk takes stays near its cache, and within `budget`.
inline int64_t choose_gpu_chunk(const SweepSizes& sizes, int64_t row_tile, int64_t budget) {
  const int64_t of_class =
      sizes.centers * (row_tile * logit_bytes(sizes) + sizes.padded(sizes.features) * weight_bytes(sizes));
  const int64_t bytes = std::min(sizes.preferred.cache_bytes, budget);
  const int64_t most = std::min(std::max<int64_t>(1, bytes / of_class), sizes.preferred.classes);
  return most >= sizes.classes ? sizes.classes : std::min(sizes.classes, whole_waves(sizes, row_tile, most));
}

// `calls` of this plan share the limit for what they keep: their scratch comes and goes.
inline ChunkPlan choose_chunk_plan(const SweepSizes& sizes, int64_t workspace_limit, int64_t calls = 1) {
  ChunkPlan largest;
  // Half of the limit for the scratch leaves room for what is kept, where something is; if it must, it takes all.
  const int64_t roomy = sizes.fused ? workspace_limit : workspace_limit / 2;
  const int64_t rows = std::min(sizes.preferred.elements / sizes.classes, sizes.preferred.most_rows);
  largest.row_tile = std::clamp<int64_t>(sizes.rows, 1, std::max(rows, sizes.preferred.rows));
  largest.class_chunk = sizes.preferred.processors > 0
      ? choose_gpu_chunk(sizes, largest.row_tile, roomy / 4 * 3)
      : std::clamp<int64_t>(
            sizes.preferred.elements / largest.row_tile / sizes.centers, 1,
            std::min(sizes.classes, sizes.preferred.classes));
  largest.input_splits = choose_input_splits(sizes, largest);
  ChunkPlan plan = largest;
  plan.lanes = sizes.threads;
  plan.class_chunk = std::min(plan.class_chunk, sizes.classes / (sizes.threads * kChunksPerLane));
  const bool lanes = sizes.threads > 1 && plan.class_chunk >= kSmallestLaneChunk &&
      shrink_to(plan, sizes, roomy, sizes.preferred.rows, kSmallestLaneChunk);
  if (!lanes) {
    plan = largest;
    if (!shrink_to(plan, sizes, roomy, /*rows_floor=*/16, /*classes_floor=*/8)) {
      plan = largest;
      shrink_to(plan, sizes, workspace_limit, /*rows_floor=*/1, /*classes_floor=*/1);
    }
  }
  plan.scratch_bytes = scratch_bytes(sizes, plan);
  plan.fits = plan.scratch_bytes <= workspace_limit;
  if (plan.fits && sizes.rows > 0 && !sizes.fused) {
    const int64_t spare = (workspace_limit - plan.scratch_bytes) / (calls * sizes.rows * sizes.kept_bytes());
    const int64_t some = std::min(spare, sizes.classes - 1);
    plan.kept_classes =
        spare >= kept_columns(sizes.classes, sizes.classes) ? sizes.classes : some - some % plan.class_chunk;
  }
  return plan;
}

} // namespace torchmargin
