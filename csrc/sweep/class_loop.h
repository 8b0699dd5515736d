// What the forward and the backward sweep share: a problem, its plan, and the loop over
// chunks of classes and tiles of rows.
#pragma once

#include <ATen/ThreadLocalState.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

#include "ops/problem.h"
#include "sweep/chunk_plan.h"
#include "sweep/kernels.h"
#include "sweep/raw.h"

namespace torchmargin {

struct Range {
  int64_t begin;
  int64_t count;
};

at::Tensor rows_of(const at::Tensor& tensor, Range rows);
at::Tensor columns_of(const at::Tensor& matrix, Range columns);
// The first elements of a flat workspace as a matrix.
at::Tensor matrix_in(const at::Tensor& workspace, int64_t rows, int64_t columns);

class ClassLoop {
 public:
  ClassLoop(const LinearProblem& problem, const SweepKernels& kernels);

  const LinearProblem& problem() const {
    return problem_;
  }
  const SweepKernels& kernels() const {
    return kernels_;
  }
  const SweepSizes& sizes() const {
    return sizes_;
  }
  const ChunkPlan& plan() const {
    return plan_;
  }
  at::ScalarType acc() const {
    return problem_.acc();
  }
  // [B] int64, contiguous.
  const at::Tensor& target() const {
    return target_;
  }
  // [C] acc, if there is one.
  const std::optional<at::Tensor>& bias() const {
    return bias_;
  }
  // No sum of exp(z) can overflow, see AccumulateChunkArgs.
  bool bounded() const {
    return bounded_;
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
    const at::ThreadLocalState state; // other lanes run on other threads
    kernels_.run_lanes(plan_.lanes, [&](int64_t lane) {
      const at::ThreadLocalStateGuard guard(state);
      int64_t chunk = 0;
      for (int64_t begin = 0; begin < sizes_.classes; ++chunk) {
        const int64_t end = begin < kept_classes ? kept_classes : sizes_.classes;
        const int64_t count = std::min(plan_.class_chunk, end - begin);
        if (chunk % plan_.lanes == lane) {
          body(lane, Range{begin, count});
        }
        begin += count;
      }
    });
  }

  // Calls body(rows) for each tile.
  template <typename Body>
  void for_each_tile(Body body) const {
    for (int64_t begin = 0; begin < sizes_.rows; begin += plan_.row_tile) {
      body(Range{begin, std::min(plan_.row_tile, sizes_.rows - begin)});
    }
  }

  // The chunk's weights in acc, as given: a view where a product can read them, else copied
  // into `buffer`.
  at::Tensor load_weight(Range classes, const at::Tensor& buffer) const;
  // Room for one chunk of converted weights; undefined where none are.
  at::Tensor weight_buffer() const;

  // The chunk's inverse norms into their place of `inverse_norms` [C] (or [0]: weights are taken as they are);
  // `weight_sum` [D] += the weights times them, unless it is nullptr.
  void load_inverse_norms(const at::Tensor& weight, Range classes, const at::Tensor& inverse_norms, double* weight_sum)
      const;

  // What the kernels are told.
  TargetContext context() const;
  LogitsTile describe(const at::Tensor& logits, Range rows, Range classes, const at::Tensor& inverse_norms) const;

 private:
  const LinearProblem& problem_;
  const SweepKernels& kernels_;
  at::TensorOptions options_;
  at::Tensor target_;
  SweepSizes sizes_;
  ChunkPlan plan_;
  bool bounded_ = false;
  std::optional<at::Tensor> bias_;
};

// The rows A_i as the products need them: unit vectors if the input is normalised, times a
// factor of each row. Loaded once for all rows, or a tile at a time, as the plan says.
class RowOperand {
 public:
  // A row with factor 0 is 0, whatever it holds. nullptr: no factors. `sum`: their sum, [D].
  RowOperand(const ClassLoop& loop, const double* factor, const double* operand_scale, double* sum = nullptr);

  // [row_count, D] acc; valid until the next call.
  at::Tensor tile(Range rows) const;

 private:
  at::Tensor load(Range rows, const at::Tensor& to) const;

  const ClassLoop& loop_;
  const double* factor_;
  const double* operand_scale_;
  double* sum_;
  bool whole_;
  at::Tensor buffer_; // [B or row_tile, D] acc
};

} // namespace torchmargin
