// What all sweeps share: a problem, its plan, and the loop over chunks of classes and tiles of rows.
#pragma once

#include <ATen/ThreadLocalState.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

#include "ops/problem.h"
#include "plan/sweep_plan.h"
#include "sweep/device.h"
#include "sweep/raw.h"

namespace torchmargin {

struct Range {
  int64_t begin;
  int64_t count;
};

// In which form a sweep's products read their operands.
enum class Operands {
  as_allowed, // 16 bits where the device takes them and the caller allows it
  wide // acc
};

at::Tensor rows_of(const at::Tensor& tensor, Range rows);
at::Tensor columns_of(const at::Tensor& matrix, Range columns);

// Can a product of such operands read these rows as they are?
bool reads_in_place(const at::Tensor& matrix, const OperandFormat& operands);

class ClassLoop {
 public:
  // `weight_scale`: as the forward's record has it, if there has been one.
  ClassLoop(
      const LinearProblem& problem,
      const Device& device,
      Operands operands = Operands::as_allowed,
      const at::Tensor& weight_scale = at::Tensor());

  const LinearProblem& problem() const {
    return problem_;
  }
  const MarginParameters& margin() const {
    return problem_.margins.parameters;
  }
  const DeviceTraits& traits() const {
    return device_.traits;
  }
  const SweepKernels& kernels() const {
    return device_.kernels;
  }
  const TileSteps& steps() const {
    return device_.steps;
  }
  const SweepSizes& sizes() const {
    return plan_.sizes;
  }
  const ChunkPlan& plan() const {
    return plan_.chunks;
  }
  at::ScalarType acc() const {
    return problem_.acc();
  }
  const OperandFormat& operands() const {
    return plan_.operands;
  }
  // [B] int64, contiguous.
  const at::Tensor& target() const {
    return target_;
  }
  // [C] acc, or 0-dim where it is one against all, if there is one.
  const std::optional<at::Tensor>& bias() const {
    return bias_;
  }
  // No sum of exp(z) can overflow, see AccumulateChunkArgs.
  bool bounded() const {
    return bounded_;
  }
  // Tiles are those of FusedTileArgs, but for kept ones.
  bool fused() const {
    return sizes().fused;
  }
  // The power of two that operands of weights which are not normalised were multiplied by, [1] float64; or
  // undefined: 1.
  const at::Tensor& weight_scale() const {
    return weight_scale_;
  }

  // Fresh memory for results of dtype acc (or another), and zeros in float64.
  at::Tensor empty(at::IntArrayRef shape) const;
  at::Tensor empty(at::IntArrayRef shape, at::ScalarType dtype) const;
  at::Tensor double_zeros(at::IntArrayRef shape) const;

  // Calls body(lane, classes) for each chunk. Chunks are dealt to the lanes in turn, whatever
  // the timing: the same bits every run. A chunk never straddles the end of the kept classes,
  // so that forward and backward need not agree on the plan (the limit may change between
  // them).
  template <typename Body>
  void for_each_chunk(int64_t kept_classes, Body body) const {
    const auto run_lane = [&](int64_t lane) {
      int64_t chunk = 0;
      for (int64_t begin = 0; begin < sizes().classes; ++chunk) {
        const int64_t end = begin < kept_classes ? kept_classes : sizes().classes;
        const int64_t count = std::min(plan().class_chunk, end - begin);
        if (chunk % plan().lanes == lane) {
          body(lane, Range{begin, count});
        }
        begin += count;
      }
    };
    if (plan().lanes == 1) {
      run_lane(0);
      return;
    }
    const at::ThreadLocalState state; // other lanes run on other threads
    kernels().run_lanes(plan().lanes, [&](int64_t lane) {
      const at::ThreadLocalStateGuard guard(state);
      run_lane(lane);
    });
  }

  // Calls body(rows) for each tile.
  template <typename Body>
  void for_each_tile(Body body) const {
    for (int64_t begin = 0; begin < sizes().rows; begin += plan().row_tile) {
      body(Range{begin, std::min(plan().row_tile, sizes().rows - begin)});
    }
  }

  // The chunk's weights as the products read them: a view where that can be, else written to `buffer`. Beside
  // that their inverse norms into their place of `inverse_norms` [C], and `weight_sum` [traits().sum_sets, D] += the
  // (normalised) weights, where these are given.
  at::Tensor load_weight(
      Range classes,
      const at::Tensor& buffer,
      const at::Tensor& inverse_norms = at::Tensor(),
      double* weight_sum = nullptr) const;
  // The same weights again, whose norms are known.
  at::Tensor reload_weight(Range classes, const at::Tensor& buffer, const at::Tensor& inverse_norms) const;
  // Room for one chunk of converted weights; undefined where none are.
  at::Tensor weight_buffer() const;

  // Room for a tile's products or softmax weights, and a tile in it.
  at::Tensor tile_buffer(at::ScalarType dtype) const;
  at::Tensor tile_in(const at::Tensor& buffer, Range rows, Range classes) const;
  // With sub-centers: a plane for each, [R, K, n], in such a buffer, and what the products of one lack, [K, n] or
  // undefined.
  at::Tensor planes_in(const at::Tensor& buffer, Range rows, Range classes) const;
  at::Tensor center_factors(Range classes, const at::Tensor& inverse_norms) const;
  // Room for the winners of a tile.
  at::Tensor winner_buffer() const;

  // A tile without its operands. Its products (with sub-centers the largest cosines, and their winners) are among what
  // is kept, or go to a lane's buffers, or are undefined where the tile is fused; an undefined buffer is not needed.
  Tile tile(
      Range rows,
      Range classes,
      const ForwardRecord& record,
      const at::Tensor& row_factors,
      bool kept,
      const at::Tensor& products_buffer,
      const at::Tensor& winner_buffer) const;

  // What the kernels are told. `row_factors`: [B] acc, or undefined.
  TargetContext context() const;
  ProductsTile describe(
      const at::Tensor& products,
      Range rows,
      Range classes,
      const at::Tensor& inverse_norms,
      const at::Tensor& row_factors) const;
  // Factors of the raw products' columns, [class_count] acc; undefined where operands are unit vectors,
  // nothing is normalised or a column is the largest of several centers'.
  at::Tensor class_factors(Range classes, const at::Tensor& inverse_norms) const;

  // K, and the rows of the weight that such classes have.
  int64_t centers() const {
    return sizes().centers;
  }
  Range weight_rows(Range classes) const {
    return {classes.begin * centers(), classes.count * centers()};
  }
  // Each row's HardRow, [B, 6] float64; undefined where nothing is hard.
  at::Tensor hard_rows(const at::Tensor& state) const;

  // The target of every row before the sweep: its state [B, 5] as it was given, or made; its logit [B] float64; its
  // angle [B] acc.
  struct TargetRows {
    at::Tensor state;
    at::Tensor logit;
    at::Tensor angle;
  };
  TargetRows target_rows(const std::optional<at::Tensor>& given_state) const;

 private:
  LoadRowsArgs conversion(const at::Tensor& rows, const at::Tensor& operand) const;

  const LinearProblem& problem_;
  const Device& device_;
  at::TensorOptions options_;
  at::Tensor target_;
  SweepPlan plan_;
  bool bounded_ = false;
  std::optional<at::Tensor> bias_;
  at::Tensor weight_scale_;
};

} // namespace torchmargin
