// The backward sweep: each chunk's products are taken from what the forward kept or made
// again, turned into the softmax weights Q of the other classes, and two products made of
// them. Each row of grad_weight is written once. The formulas are those of docs/design.md.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "sweep/class_loop.h"
#include "sweep/class_sweep.h"
#include "sweep/products.h"
#include "sweep/upstream.h"

namespace torchmargin {
namespace {

// One lane's workspace.
struct Lane {
  at::Tensor logits; // a tile of raw products, acc
  at::Tensor softmax; // a tile of operands; the logits' memory if they are acc
  at::Tensor weight_buffer; // [class_chunk, D], if weights are converted
  at::Tensor weight_products; // [class_chunk, D] acc
  at::Tensor input_products; // [splits, B, D] acc, this lane's parts of V
};

class BackwardSweep {
 public:
  BackwardSweep(
      const LinearProblem& problem,
      const BackwardRequest& request,
      const SweepKernels& kernels,
      Operands operands = Operands::as_allowed)
      : problem_(problem),
        request_(request),
        kernels_(kernels),
        loop_(problem, kernels, operands),
        sizes_(loop_.sizes()),
        want_input_(request.wanted[0]),
        want_weight_(request.wanted[1]),
        want_bias_(request.wanted[2] && problem.bias.has_value()),
        kept_classes_(std::min(request.kept.size(1), sizes_.classes)),
        upstream_(widen_upstream(loop_, request)) {}

  // For margin_logits: `grad_logits` [B, C] instead of the upstream gradients of `request`. They may have any
  // range, so they are multiplied in acc.
  BackwardSweep(
      const LinearProblem& problem,
      const BackwardRequest& request,
      const at::Tensor& grad_logits,
      const SweepKernels& kernels)
      : BackwardSweep(problem, request, kernels, Operands::wide) {
    grad_logits_ = grad_logits;
    upstream_ = logits_upstream(loop_, grad_logits);
  }

  Gradients run() {
    if (want_input_ || want_weight_ || want_bias_) {
      allocate();
      sum_input();
      load_operands();
      loop_.for_each_chunk(kept_classes_, [&](int64_t lane, Range classes) { sweep_chunk(lanes_[lane], classes); });
    }
    return finish();
  }

 private:
  void allocate() {
    lanes_.resize(loop_.plan().lanes);
    for (Lane& lane : lanes_) {
      lane.logits = loop_.tile_buffer(loop_.acc());
      lane.softmax = narrow_ ? loop_.tile_buffer(loop_.operands().dtype) : lane.logits;
      lane.weight_buffer = loop_.weight_buffer();
      if (want_input_) {
        lane.input_products = loop_.empty({loop_.plan().input_splits, sizes_.rows, sizes_.features}).zero_();
      }
      if (want_weight_) {
        // NB: not grad_weight itself: a product that writes fresh memory waits for its pages.
        lane.weight_products =
            columns_of(loop_.empty({loop_.plan().class_chunk, sizes_.padded(sizes_.features)}), {0, sizes_.features});
      }
    }
    if (want_weight_) {
      grad_weight_ = loop_.empty({sizes_.classes, sizes_.features}, problem_.weight.scalar_type());
    }
    if (want_bias_) {
      bias_products_ = loop_.empty({sizes_.classes}).zero_();
    }
    if (want_weight_ || want_bias_) {
      std::tie(sorted_target_, sorted_row_) =
          at::sort(loop_.target(), /*stable=*/true, /*dim=*/0, /*descending=*/false);
    }
  }

  // R and the sum of g_Z: what label smoothing adds to every class.
  void sum_input() {
    if (!request_.grad_logit_sum.has_value()) {
      return;
    }
    logit_sum_total_ = upstream_.logit_sum.sum();
    input_sum_ = loop_.double_zeros({sizes_.features});
    input_inverse_norms(loop_, pointer<double>(upstream_.logit_sum), pointer<double>(input_sum_));
  }

  // A for products that were not kept, and A times the upstream gradient.
  void load_operands() {
    if (!grad_logits_.has_value()) {
      row_factors_ = row_factors(loop_);
      if (kept_classes_ < sizes_.classes) {
        input_.emplace(loop_);
      }
    }
    weight_factor_ = upstream_.other_lse * problem_.margins.parameters.scale;
    operand_scale_ = grad_logits_.has_value() ? loop_.double_zeros({1}).fill_(1.0)
                                              : choose_operand_scale(loop_, upstream_, weight_factor_, want_bias_);
    weight_products_scale_ = operand_scale_ * loop_.operands().softmax_scale;
    if (want_weight_) {
      weighted_input_.emplace(loop_, pointer<double>(weight_factor_), pointer<double>(operand_scale_));
    }
    if (want_bias_) {
      bias_factor_ = (upstream_.other_lse * operand_scale_).to(loop_.operands().dtype);
    }
  }

  void sweep_chunk(Lane& lane, Range classes) {
    const at::Tensor weight = loop_.load_weight(classes, lane.weight_buffer);
    at::Tensor products; // [class_count, D] for the chunk's grad_weight
    if (want_weight_) {
      products = rows_of(lane.weight_products, {0, classes.count});
      if (sizes_.rows == 0) {
        products.zero_();
      }
    }
    loop_.for_each_tile([&](Range rows) {
      const at::Tensor softmax =
          grad_logits_.has_value() ? grad_logits_tile(lane, rows, classes) : softmax_tile(lane, rows, classes, weight);
      if (want_bias_) {
        multiply_bias(rows, classes, softmax);
      }
      if (want_input_) {
        multiply_split(lane.input_products.narrow(1, rows.begin, rows.count), softmax, weight);
      }
      if (want_weight_) {
        multiply(products, softmax.t(), weighted_input_->tile(rows), /*accumulate=*/rows.begin > 0);
      }
    });
    if (want_weight_ || want_bias_) {
      finish_chunk(classes, weight, products);
    }
  }

  // Q of a tile (times 1 / |w_j| where the products need it) as an operand.
  at::Tensor softmax_tile(const Lane& lane, Range rows, Range classes, const at::Tensor& weight) {
    const at::Tensor softmax = loop_.tile_in(lane.softmax, rows, classes);
    at::Tensor logits;
    if (classes.begin < kept_classes_) {
      logits = columns_of(rows_of(request_.kept, rows), classes); // read only
    } else {
      logits = loop_.tile_in(lane.logits, rows, classes);
      multiply(logits, input_->tile(rows), weight.t());
    }
    // The bias alone needs Q itself; see multiply_bias.
    kernels_.softmax_chunk(
        {loop_.describe(logits, rows, classes, request_.inverse_norms, row_factors_),
         rows_of(request_.other_lse, rows).data_ptr<double>(), rows_of(upstream_.other_lse, rows).data_ptr<double>(),
         /*times_class_factors=*/!want_bias_, softmax.data_ptr(), softmax.stride(0), softmax.scalar_type(),
         loop_.operands().softmax_scale},
        loop_.acc());
    return softmax;
  }

  // The upstream gradients of a tile, 0 at the target, in the place of Q.
  at::Tensor grad_logits_tile(const Lane& lane, Range rows, Range classes) const {
    at::Tensor tile = loop_.tile_in(lane.softmax, rows, classes);
    tile.copy_(columns_of(rows_of(*grad_logits_, rows), classes));
    const at::Tensor columns = at::arange(classes.begin, classes.begin + classes.count, loop_.target().options());
    tile.masked_fill_(columns.unsqueeze(0).eq(rows_of(loop_.target(), rows).unsqueeze(1)), 0.0);
    if (!want_bias_) {
      multiply_by_class_factors(tile, classes);
    }
    return tile;
  }

  void multiply_bias(Range rows, Range classes, const at::Tensor& softmax) {
    const at::Tensor products = rows_of(bias_products_, classes);
    const at::Tensor factor = rows_of(bias_factor_, rows);
    if (narrow_) {
      multiply(products.unsqueeze(1), softmax.t(), factor.unsqueeze(1), /*accumulate=*/true);
    } else {
      products.addmv_(softmax.t(), factor);
    }
    multiply_by_class_factors(softmax, classes);
  }

  void multiply_by_class_factors(const at::Tensor& softmax, Range classes) const {
    const at::Tensor factors = loop_.class_factors(classes, request_.inverse_norms);
    if (factors.defined()) {
      softmax.mul_(factors);
    }
  }

  void finish_chunk(Range classes, const at::Tensor& weight, const at::Tensor& products) {
    const bool any_rows = kernels_.traits.reads_any_rows;
    const bool in_place = sizes_.widen_gradients && !any_rows;
    const at::Tensor to = !want_weight_ || in_place ? products : rows_of(grad_weight_, classes);
    kernels_.finish_classes(
        {loop_.context(), upstream_.pointers(), classes.begin, classes.count, pointer(products),
         want_weight_ ? products.stride(0) : 0,
         /*products_lack_norms=*/loop_.operands().unit_vectors && problem_.normalize_weight, pointer(to),
         raw_matrix(any_rows ? rows_of(problem_.weight, classes) : weight),
         problem_.normalize_weight ? rows_of(request_.inverse_norms, classes).data_ptr() : nullptr,
         want_bias_ ? rows_of(bias_products_, classes).data_ptr() : nullptr, weight_products_scale_.data_ptr<double>(),
         pointer<double>(input_sum_), pointer<double>(logit_sum_total_), pointer<int64_t>(sorted_target_),
         pointer<int64_t>(sorted_row_), sizes_.rows},
        loop_.acc());
    if (want_weight_ && in_place) {
      rows_of(grad_weight_, classes).copy_(products);
    }
  }

  // V of all rows, times the scale that is left in it: the sum of slices (into fresh memory, for this becomes the
  // gradient) or of lanes, in order.
  at::Tensor sum_input_products() const {
    if (loop_.plan().input_splits > 1) {
      return lanes_[0].input_products.sum(0);
    }
    const at::Tensor total = lanes_[0].input_products.select(0, 0);
    for (size_t lane = 1; lane < lanes_.size(); ++lane) {
      total.add_(lanes_[lane].input_products.select(0, 0));
    }
    return total;
  }

  Gradients finish() {
    const auto sample_gradient = [&](size_t index, const std::optional<at::Tensor>& sample) {
      return request_.wanted[index] && sample.has_value() ? loop_.double_zeros({sizes_.rows}) : at::Tensor();
    };
    const at::Tensor grad_m2 = sample_gradient(3, problem_.margins.sample_m2);
    const at::Tensor grad_m3 = sample_gradient(4, problem_.margins.sample_m3);
    const at::Tensor input_products = want_input_ ? sum_input_products() : at::Tensor();
    at::Tensor input_products_scale = loop_.double_zeros({1}).fill_(loop_.operands().softmax_scale);
    if (loop_.weight_scale().defined()) {
      input_products_scale.mul_(loop_.weight_scale());
    }
    kernels_.finish_rows(
        {loop_.context(), upstream_.pointers(), sizes_.rows,
         request_.grad_logit_sum.has_value() ? pointer<double>(request_.weight_sum) : nullptr, pointer(input_products),
         input_products_scale.data_ptr<double>(), pointer<double>(grad_m2), pointer<double>(grad_m3)},
        loop_.acc());
    const auto returned = [&](const at::Tensor& gradient, const std::optional<at::Tensor>& of) {
      return gradient.defined() ? gradient.to(of->scalar_type()) : at::empty({0}, problem_.input.options());
    };
    return {
        returned(input_products, problem_.input), returned(grad_weight_, problem_.weight),
        returned(bias_products_, problem_.bias), returned(grad_m2, problem_.margins.sample_m2),
        returned(grad_m3, problem_.margins.sample_m3)};
  }

  const LinearProblem& problem_;
  const BackwardRequest& request_;
  const SweepKernels& kernels_;
  const ClassLoop loop_;
  const SweepSizes& sizes_;
  const bool want_input_, want_weight_, want_bias_;
  const int64_t kept_classes_;
  const bool narrow_ = loop_.operands().dtype != loop_.acc(); // 16-bit operands
  UpstreamVectors upstream_;
  std::optional<at::Tensor> grad_logits_; // [B, C] acc

  std::vector<Lane> lanes_;
  std::optional<RowOperand> input_; // A
  at::Tensor row_factors_; // [B] acc, or undefined
  at::Tensor operand_scale_; // [1]
  std::optional<RowOperand> weighted_input_; // operand_scale scale g_o A
  at::Tensor weight_factor_; // [B] scale g_o
  at::Tensor bias_factor_; // [B] operand_scale g_o, as an operand
  at::Tensor weight_products_scale_; // [1] of the products of grad_weight and grad_bias
  at::Tensor bias_products_; // [C] acc, becomes grad_bias
  at::Tensor grad_weight_; // [C, D]
  at::Tensor input_sum_; // R [D]
  at::Tensor logit_sum_total_; // 0-dim
  at::Tensor sorted_target_, sorted_row_; // [B]
};

} // namespace

Gradients sweep_backward(const LinearProblem& problem, const BackwardRequest& request, const SweepKernels& kernels) {
  BackwardRequest contiguous = request;
  for (at::Tensor* tensor :
       {&contiguous.other_lse, &contiguous.kept, &contiguous.inverse_norms, &contiguous.weight_sum}) {
    *tensor = tensor->contiguous();
  }
  return BackwardSweep(problem, contiguous, kernels).run();
}

Gradients
sweep_logits_backward(const LinearProblem& problem, const LogitsBackwardRequest& request, const SweepKernels& kernels) {
  const at::TensorOptions options = problem.input.options().dtype(problem.acc());
  const BackwardRequest backward{
      std::nullopt,
      std::nullopt,
      std::nullopt,
      /*other_lse=*/at::zeros({problem.input.size(0)}, options.dtype(at::kDouble)),
      /*kept=*/at::empty({problem.input.size(0), 0}, options),
      request.inverse_norms.contiguous(),
      /*weight_sum=*/at::Tensor(),
      request.wanted};
  return BackwardSweep(problem, backward, request.grad_logits, kernels).run();
}

} // namespace torchmargin
