// What both backward passes share: from the weights of each tile's classes, wherever they come from, to the gradients.
// Each row of grad_weight is written once. The formulas are those of docs/design.md.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <optional>
#include <vector>

#include "sweep/class_loop.h"
#include "sweep/row_operand.h"
#include "sweep/upstream.h"

namespace torchmargin {

// A tile of one lane whose weights are wanted.
struct WeightsWanted {
  int64_t lane;
  Range rows;
  Range classes;
  at::Tensor class_operand; // [n K, D]
  at::Tensor weights; // [R, n], or with sub-centers [R, K, n]: where they go
  bool times_class_factors; // with 1 / |w_j| in them: the products then need no normalised weights
  bool of_bias; // those of the bias, [R, n]: how a cosine changes is not in them
};
using Weigh = std::function<void(const WeightsWanted&)>;

// The forward's record, as far as gradients need it.
struct GradientRecord {
  const at::Tensor& inverse_norms;
  const at::Tensor& row_state;
  const at::Tensor& weight_sum; // [D] if upstream.sum is defined
};

class GradientSweep {
 public:
  // `wanted` as BackwardRequest has it.
  GradientSweep(
      const ClassLoop& loop,
      const GradientRecord& record,
      const UpstreamVectors& upstream,
      const std::array<bool, 5>& wanted);

  bool wants_products() const {
    return want_input_ || want_weight_ || want_bias_;
  }
  // Where a lane's weights go, in turn.
  const at::Tensor& weights_buffer(int64_t lane) const {
    return lanes_[lane].weights;
  }

  // Goes over the classes and asks `weigh` for every tile.
  void run(int64_t kept_classes, InputNorms& norms, const Weigh& weigh);

  Gradients finish();

 private:
  // One lane's workspace.
  struct Lane {
    at::Tensor weights; // a tile of operands
    at::Tensor weight_buffer; // [class_chunk, D], if weights are converted
    at::Tensor weight_products; // [class_chunk, D] acc
    at::Tensor input_products; // [splits, B, D] acc, this lane's parts of V
    bool has_input_products = false; // false: the first chunk writes them
  };

  void allocate();
  void sum_input(InputNorms& norms);
  void sweep_chunk(int64_t lane, Range classes, const Weigh& weigh);
  void multiply_bias(Range rows, Range classes, const at::Tensor& weights) const;
  void finish_chunk(Range classes, const at::Tensor& weight, const at::Tensor& products) const;
  FinishClassesArgs class_arguments(Range classes) const;
  FinishClassesArgs bias_arguments(Range classes) const;
  FinishClassesArgs
  weight_arguments(Range classes, const at::Tensor& products, const at::Tensor& weight, const at::Tensor& to) const;
  void finish_own_classes() const;
  at::Tensor sum_input_products() const;

  const ClassLoop& loop_;
  const LinearProblem& problem_;
  const SweepSizes& sizes_;
  const GradientRecord record_;
  const UpstreamVectors& upstream_;
  const std::array<bool, 5> wanted_;
  const bool want_input_, want_weight_, want_bias_;

  std::vector<Lane> lanes_;
  std::optional<RowOperand> weighted_input_; // operand_scale scale g_o A
  at::Tensor bias_factor_; // [B] operand_scale g_o, as an operand
  at::Tensor weight_products_scale_; // [1] of the products of grad_weight and grad_bias
  at::Tensor bias_products_; // [C] acc, becomes grad_bias
  at::Tensor grad_weight_; // [C, D]
  at::Tensor own_products_; // [B, D] acc: of classes that have rows, where the device finishes them by themselves
  at::Tensor input_sum_; // R [D]
  at::Tensor logit_sum_total_; // 0-dim
  at::Tensor sorted_target_, sorted_row_; // [B]: the rows of the weight that stand for the targets, and whose they are
  at::Tensor sorted_class_, sorted_row_of_class_; // the targets themselves, where a class has several centers
};

// tile *= 1 / |w_j|, where that is not in the operands already.
void multiply_by_class_factors(
    const ClassLoop& loop,
    const at::Tensor& tile,
    Range classes,
    const at::Tensor& inverse_norms);

} // namespace torchmargin
