// One class chunk after the other: product of a tile of rows with the chunk into a
// small workspace, one fused pass over it, next. Each row of grad_weight is written
// once; nothing of size B x C exists. The formulas are those of docs/design.md.
#include "sweep/class_sweep.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "sweep/settings.h"

namespace torchmargin {
namespace {

template <typename T = void>
T* pointer(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.defined() && tensor.numel() > 0 ? tensor.data_ptr() : nullptr);
}

RawMatrix raw(const at::Tensor& matrix) {
  return {matrix.data_ptr(), matrix.scalar_type(), matrix.stride(0), matrix.stride(1)};
}

// A vector, or a 0-dim tensor that stands for every row.
RawMatrix raw_vector(const std::optional<at::Tensor>& vector) {
  if (!vector.has_value()) {
    return {nullptr, at::kFloat, 0, 0};
  }
  return {vector->data_ptr(), vector->scalar_type(), vector->dim() == 0 ? 0 : vector->stride(0), 0};
}

// Can a product and the kernels read these rows as they are?
bool reads_in_place(const at::Tensor& matrix) {
  const bool wide = matrix.scalar_type() == acc_dtype(matrix.scalar_type());
  return wide && matrix.stride(1) == 1 && matrix.stride(0) >= matrix.size(1);
}

struct Range {
  int64_t begin;
  int64_t count;
};

at::Tensor rows_of(const at::Tensor& tensor, Range rows) {
  return tensor.narrow(0, rows.begin, rows.count);
}

at::Tensor columns_of(const at::Tensor& matrix, Range columns) {
  return matrix.narrow(1, columns.begin, columns.count);
}

// The first elements of a flat workspace as a matrix.
at::Tensor matrix_in(const at::Tensor& workspace, int64_t rows, int64_t columns) {
  return workspace.narrow(0, 0, rows * columns).view({rows, columns});
}

// A problem, its plan and its workspace: what the two passes share.
class ClassSweep {
 public:
  ClassSweep(const LinearProblem& problem, const SweepKernels& kernels)
      : problem_(problem),
        kernels_(kernels),
        acc_(problem.acc()),
        options_(problem.input.options().dtype(acc_).requires_grad(false)),
        target_(problem.target.contiguous()),
        sizes_(sweep_sizes(problem.input.size(0), problem.input.size(1), problem.weight.size(0), problem.weight)) {
    const int64_t limit = workspace_limit(problem.input.device().type());
    plan_ = choose_chunk_plan(sizes_, limit);
    TORCH_CHECK(
        plan_.fits,
        "torchmargin: the workspace limit of ", limit, " bytes is too small for a problem with ", sizes_.rows,
        " rows, ", sizes_.features, " features and ", sizes_.classes, " classes in ", problem.input.scalar_type(),
        "; it needs at least ", plan_.scratch_bytes, " bytes");
    const MarginParameters& margin = problem.margin;
    // scale * log2(e) + log2(C) < 127: a sum of exp(z) cannot overflow without a shift.
    bounded_ = problem.normalize_input && problem.normalize_weight && !problem.bias.has_value() &&
        margin.scale * 1.4426950408889634 + std::log2(static_cast<double>(sizes_.classes)) < 127.0 &&
        margin.scale <= 71.0;
    if (problem.bias.has_value()) {
      bias_ = problem.bias->to(acc_).contiguous();
    }
    if (sizes_.convert_weight) {
      weight_copy_ = at::empty({plan_.class_chunk, sizes_.features}, options_);
    }
  }

  const SweepSizes& sizes() const {
    return sizes_;
  }
  const ChunkPlan& plan() const {
    return plan_;
  }
  const at::TensorOptions& options() const {
    return options_;
  }
  at::TensorOptions double_options() const {
    return options_.dtype(at::kDouble);
  }
  const at::Tensor& target() const {
    return target_;
  }
  bool bounded() const {
    return bounded_;
  }
  const std::optional<at::Tensor>& bias() const {
    return bias_;
  }

  TargetContext context() const {
    return {
        raw(problem_.input),
        raw(problem_.weight),
        pointer<int64_t>(target_),
        sizes_.features,
        sizes_.classes,
        problem_.margin,
        problem_.normalize_input,
        problem_.normalize_weight,
        raw_vector(problem_.bias),
        raw_vector(problem_.sample_m2),
        raw_vector(problem_.sample_m3),
        raw_vector(problem_.sample_margin_weight)};
  }

  // Chunks never straddle the end of the kept classes, so that forward and backward need
  // not agree on the plan: the workspace limit may change between them.
  template <typename Body> // void(Range)
  void for_each_chunk(int64_t kept_classes, Body body) const {
    for (int64_t begin = 0; begin < sizes_.classes;) {
      const int64_t end = begin < kept_classes ? kept_classes : sizes_.classes;
      const int64_t count = std::min(plan_.class_chunk, end - begin);
      body(Range{begin, count});
      begin += count;
    }
  }

  template <typename Body> // void(Range)
  void for_each_tile(Body body) const {
    for (int64_t begin = 0; begin < sizes_.rows; begin += plan_.row_tile) {
      body(Range{begin, std::min(plan_.row_tile, sizes_.rows - begin)});
    }
  }

  // The chunk's weights in acc, as given: a view where a product can read them.
  at::Tensor load_weight(Range classes) const {
    const at::Tensor chunk = rows_of(problem_.weight, classes);
    return sizes_.convert_weight ? rows_of(weight_copy_, {0, classes.count}).copy_(chunk) : chunk;
  }

  // The tile's rows A_i, unit vectors if the input is normalised, times factor_i operand_scale.
  // Their sum goes to `sum` if it is asked for.
  at::Tensor load_input(
      Range rows, const at::Tensor& buffer, const double* factor, const double* operand_scale, double* sum) const {
    at::Tensor tile = rows_of(buffer, {0, rows.count}).copy_(rows_of(problem_.input, rows));
    kernels_.load_rows(
        {tile.data_ptr(), tile.stride(0), rows.count, sizes_.features, problem_.normalize_input,
         /*scale_in_place=*/true, factor == nullptr ? nullptr : factor + rows.begin, operand_scale,
         /*inverse_norms=*/nullptr, sum},
        acc_);
    return tile;
  }

  LogitsTile describe(const at::Tensor& logits, Range rows, Range classes, const at::Tensor& inverse_norms) const {
    return {
        logits.data_ptr(),
        logits.stride(0),
        rows.count,
        classes.count,
        classes.begin,
        target_.data_ptr<int64_t>() + rows.begin,
        problem_.margin.scale,
        problem_.normalize_weight ? rows_of(inverse_norms, classes).data_ptr() : nullptr,
        bias_.has_value() ? rows_of(*bias_, classes).data_ptr() : nullptr};
  }

  at::Tensor empty(at::IntArrayRef sizes) const {
    at::Tensor tensor = at::empty(sizes, options_);
    kernels_.prepare_buffer(tensor.data_ptr(), tensor.nbytes());
    return tensor;
  }

 private:
  const LinearProblem& problem_;
  const SweepKernels& kernels_;
  at::ScalarType acc_;
  at::TensorOptions options_; // of acc
  at::Tensor target_; // [B] contiguous
  SweepSizes sizes_;
  ChunkPlan plan_;
  bool bounded_ = false;
  std::optional<at::Tensor> bias_; // [C] acc
  at::Tensor weight_copy_; // [class_chunk, D], if weights are converted
};

} // namespace

SweepSizes sweep_sizes(int64_t rows, int64_t features, int64_t classes, const at::Tensor& weight) {
  const at::ScalarType acc = acc_dtype(weight.scalar_type());
  return {
      rows,
      features,
      classes,
      static_cast<int64_t>(c10::elementSize(acc)),
      /*convert_weight=*/!reads_in_place(weight),
      /*widen_gradients=*/weight.scalar_type() != acc};
}

ForwardResult sweep_forward(const LinearProblem& problem, const ForwardRequest& request, const SweepKernels& kernels) {
  const ClassSweep sweep(problem, kernels);
  const SweepSizes& sizes = sweep.sizes();
  TORCH_CHECK(
      request.kept_classes >= 0 && request.kept_classes <= sizes.classes,
      "_linear_margin_forward: expected kept_classes in [0, ", sizes.classes, "], but got ", request.kept_classes);

  ForwardResult result;
  result.kept = sweep.empty({sizes.rows, request.kept_classes});
  result.inverse_norms = at::empty({problem.normalize_weight ? sizes.classes : 0}, sweep.options());
  result.weight_sum = at::zeros({request.with_logit_sum ? sizes.features : 0}, sweep.double_options());

  // Every row's running (shift, sum) and maximum over the other classes.
  const double infinity = std::numeric_limits<double>::infinity();
  const at::Tensor shift = at::full({sizes.rows}, -infinity, sweep.double_options());
  const at::Tensor sum = at::zeros({sizes.rows}, sweep.double_options());
  const at::Tensor maximum = at::full({sizes.rows}, -infinity, sweep.double_options());

  const at::Tensor operand = at::empty({sweep.plan().row_tile, sizes.features}, sweep.options());
  const at::Tensor scratch = request.kept_classes < sizes.classes
      ? at::empty({sweep.plan().row_tile * sweep.plan().class_chunk}, sweep.options())
      : at::Tensor();
  const bool one_tile = sizes.rows <= sweep.plan().row_tile;
  if (one_tile) {
    sweep.load_input({0, sizes.rows}, operand, nullptr, nullptr, nullptr);
  }
  sweep.for_each_chunk(request.kept_classes, [&](Range classes) {
    const at::Tensor weight = sweep.load_weight(classes);
    if (problem.normalize_weight || request.with_logit_sum) {
      kernels.load_rows(
          {weight.data_ptr(), weight.stride(0), classes.count, sizes.features, problem.normalize_weight,
           /*scale_in_place=*/false, nullptr, nullptr,
           problem.normalize_weight ? rows_of(result.inverse_norms, classes).data_ptr() : nullptr,
           pointer<double>(result.weight_sum)},
          problem.acc());
    }
    sweep.for_each_tile([&](Range rows) {
      const at::Tensor input = one_tile ? rows_of(operand, rows)
                                        : sweep.load_input(rows, operand, nullptr, nullptr, nullptr);
      at::Tensor logits = classes.begin < request.kept_classes
          ? columns_of(rows_of(result.kept, rows), classes)
          : matrix_in(scratch, rows.count, classes.count);
      at::mm_out(logits, input, weight.t());
      kernels.accumulate_chunk(
          {sweep.describe(logits, rows, classes, result.inverse_norms), sweep.bounded(),
           shift.data_ptr<double>() + rows.begin, sum.data_ptr<double>() + rows.begin,
           maximum.data_ptr<double>() + rows.begin},
          problem.acc());
    });
  });

  const auto vector = [&] { return at::empty({sizes.rows}, sweep.options()); };
  result.other_lse = vector();
  result.target_logit = vector();
  result.logit_sum = vector();
  result.target_angle = vector();
  result.max_other_logit = vector();
  at::Tensor bias_sum;
  if (problem.bias.has_value()) {
    bias_sum = sweep.bias()->sum(at::kDouble);
  }
  kernels.target_pass(
      {sweep.context(), sizes.rows, pointer<double>(shift), pointer<double>(sum), pointer<double>(maximum),
       pointer<double>(result.weight_sum), pointer<double>(bias_sum), result.other_lse.data_ptr(), result.target_logit.data_ptr(),
       result.logit_sum.data_ptr(), result.target_angle.data_ptr(), result.max_other_logit.data_ptr()},
      problem.acc());
  return result;
}

namespace {

// The upstream gradients of all rows in float64, and the power of two that brings the
// largest gradient of other_lse to [1/2, 1): gradients scaled by 2^k then pass through the
// same products bit for bit, and tiny ones do not make them denormal.
struct UpstreamVectors {
  at::Tensor other_lse; // g_o [B], 0 where there is no other class
  at::Tensor target_logit; // T [B]
  at::Tensor logit_sum; // g_Z [B], or [0]
  at::Tensor operand_scale; // [1]

  Upstream pointers() const {
    return {pointer<double>(other_lse), pointer<double>(target_logit), pointer<double>(logit_sum)};
  }
};

UpstreamVectors widen_upstream(const ClassSweep& sweep, const BackwardRequest& request) {
  const auto widen = [&](const std::optional<at::Tensor>& grad) {
    return grad.has_value() ? grad->to(at::kDouble).contiguous()
                            : at::zeros({sweep.sizes().rows}, sweep.double_options());
  };
  UpstreamVectors upstream;
  const at::Tensor none = at::zeros({}, sweep.double_options());
  upstream.other_lse = at::where(
      request.other_lse == -std::numeric_limits<double>::infinity(), none, widen(request.grad_other_lse));
  upstream.target_logit = widen(request.grad_target_logit);
  upstream.logit_sum = at::empty({0}, sweep.double_options());
  if (request.grad_logit_sum.has_value()) {
    upstream.logit_sum = widen(request.grad_logit_sum);
    upstream.target_logit = upstream.target_logit + upstream.logit_sum;
  }
  const at::Tensor present = sweep.target().ge(0).logical_and(sweep.target().lt(sweep.sizes().classes));
  upstream.target_logit = at::where(present, upstream.target_logit, none);

  const at::Tensor one = at::ones({1}, sweep.double_options());
  if (sweep.sizes().rows == 0) {
    upstream.operand_scale = one;
    return upstream;
  }
  const at::Tensor largest = upstream.other_lse.abs().max().view({1});
  // mantissa / largest is 2^-exponent, exactly.
  const at::Tensor scale = std::get<0>(at::frexp(largest)) / largest;
  upstream.operand_scale = at::where(at::isfinite(scale).logical_and(largest > 0), scale, one);
  return upstream;
}

class BackwardSweep {
 public:
  BackwardSweep(const LinearProblem& problem, const BackwardRequest& request, const SweepKernels& kernels)
      : problem_(problem),
        request_(request),
        kernels_(kernels),
        sweep_(problem, kernels),
        sizes_(sweep_.sizes()),
        want_input_(request.wanted[0]),
        want_weight_(request.wanted[1]),
        want_bias_(request.wanted[2] && problem.bias.has_value()),
        kept_classes_(request.kept.size(1)),
        upstream_(widen_upstream(sweep_, request)) {}

  Gradients run() {
    allocate();
    if (want_input_ || want_weight_ || want_bias_) {
      if (request_.grad_logit_sum.has_value()) {
        sum_input();
      }
      if (one_tile()) {
        load_tile({0, sizes_.rows});
      }
      sweep_.for_each_chunk(kept_classes_, [&](Range classes) { sweep_chunk(classes); });
    }
    return finish();
  }

 private:
  bool one_tile() const {
    return sizes_.rows <= sweep_.plan().row_tile;
  }

  void allocate() {
    const int64_t rows = sweep_.plan().row_tile;
    const int64_t classes = sweep_.plan().class_chunk;
    scratch_ = at::empty({rows * classes}, sweep_.options());
    operand_ = at::empty({rows, sizes_.features}, sweep_.options());
    if (want_input_) {
      input_products_ = sweep_.empty({sizes_.rows, sizes_.features}).zero_();
    }
    if (want_weight_) {
      weighted_operand_ = at::empty({rows, sizes_.features}, sweep_.options());
      weight_factor_ = upstream_.other_lse * problem_.margin.scale;
      grad_weight_ = at::empty({sizes_.classes, sizes_.features}, problem_.weight.options().memory_format(at::MemoryFormat::Contiguous));
      kernels_.prepare_buffer(grad_weight_.data_ptr(), grad_weight_.nbytes());
      // NB: not into grad_weight itself: a product that writes fresh memory waits for its pages.
      weight_products_ = at::empty({classes, sizes_.features}, sweep_.options());
    }
    if (want_bias_) {
      bias_products_ = at::zeros({sizes_.classes}, sweep_.options());
      bias_factor_ = (upstream_.other_lse * upstream_.operand_scale).to(problem_.acc());
    }
    if (want_weight_ || want_bias_) {
      std::tie(sorted_target_, sorted_row_) =
          at::sort(sweep_.target(), /*stable=*/true, /*dim=*/0, /*descending=*/false);
    }
  }

  // R and the sum of g_Z.
  void sum_input() {
    input_sum_ = at::zeros({sizes_.features}, sweep_.double_options());
    sweep_.for_each_tile([&](Range rows) {
      sweep_.load_input(rows, operand_, pointer<double>(upstream_.logit_sum), nullptr, pointer<double>(input_sum_));
    });
    logit_sum_total_ = upstream_.logit_sum.sum();
  }

  // A for products that were not kept, and A times the upstream gradient.
  void load_tile(Range rows) {
    if (kept_classes_ < sizes_.classes) {
      sweep_.load_input(rows, operand_, nullptr, nullptr, nullptr);
    }
    if (want_weight_) {
      sweep_.load_input(
          rows, weighted_operand_, pointer<double>(weight_factor_), pointer<double>(upstream_.operand_scale), nullptr);
    }
  }

  void sweep_chunk(Range classes) {
    const at::Tensor weight = sweep_.load_weight(classes);
    at::Tensor products; // [class_count, D] for the chunk's grad_weight
    if (want_weight_) {
      products = rows_of(weight_products_, {0, classes.count});
      if (sizes_.rows == 0) {
        products.zero_();
      }
    }
    sweep_.for_each_tile([&](Range rows) {
      if (!one_tile()) {
        load_tile(rows);
      }
      multiply(rows, classes, weight, softmax_tile(rows, classes, weight), products);
    });
    if (want_weight_ || want_bias_) {
      finish_chunk(classes, weight, products);
    }
  }

  // Q of a tile (times 1 / |w_j| where classes are normalised), in the scratch.
  at::Tensor softmax_tile(Range rows, Range classes, const at::Tensor& weight) {
    at::Tensor softmax = matrix_in(scratch_, rows.count, classes.count);
    at::Tensor logits = softmax;
    if (classes.begin < kept_classes_) {
      logits = columns_of(rows_of(request_.kept, rows), classes); // read only
    } else {
      at::mm_out(logits, rows_of(operand_, {0, rows.count}), weight.t());
    }
    // The bias alone needs Q itself; see multiply.
    const bool times_inverse_norms = problem_.normalize_weight && !want_bias_;
    kernels_.softmax_chunk(
        {sweep_.describe(logits, rows, classes, request_.inverse_norms),
         rows_of(request_.other_lse, rows).data_ptr(),
         rows_of(upstream_.other_lse, rows).data_ptr<double>(),
         times_inverse_norms,
         softmax.data_ptr()},
        problem_.acc());
    return softmax;
  }

  void multiply(Range rows, Range classes, const at::Tensor& weight, at::Tensor softmax, at::Tensor& products) {
    if (want_bias_) {
      rows_of(bias_products_, classes).addmv_(softmax.t(), rows_of(bias_factor_, rows));
      if (problem_.normalize_weight) {
        softmax.mul_(rows_of(request_.inverse_norms, classes));
      }
    }
    if (want_input_) {
      rows_of(input_products_, rows).addmm_(softmax, weight);
    }
    if (want_weight_) {
      const at::Tensor weighted = rows_of(weighted_operand_, {0, rows.count});
      if (rows.begin == 0) {
        at::mm_out(products, softmax.t(), weighted);
      } else {
        products.addmm_(softmax.t(), weighted);
      }
    }
  }

  void finish_chunk(Range classes, const at::Tensor& weight, const at::Tensor& products) {
    kernels_.finish_classes(
        {sweep_.context(),
         upstream_.pointers(),
         classes.begin,
         classes.count,
         pointer(products),
         want_weight_ ? (sizes_.widen_gradients ? products : rows_of(grad_weight_, classes)).data_ptr() : nullptr,
         weight.data_ptr(),
         weight.stride(0),
         problem_.normalize_weight ? rows_of(request_.inverse_norms, classes).data_ptr() : nullptr,
         want_bias_ ? rows_of(bias_products_, classes).data_ptr() : nullptr,
         upstream_.operand_scale.data_ptr<double>(),
         pointer<double>(input_sum_),
         pointer<double>(logit_sum_total_),
         pointer<int64_t>(sorted_target_),
         pointer<int64_t>(sorted_row_),
         sizes_.rows},
        problem_.acc());
    if (want_weight_ && sizes_.widen_gradients) {
      rows_of(grad_weight_, classes).copy_(products);
    }
  }

  Gradients finish() {
    const auto sample_gradient = [&](size_t index, const std::optional<at::Tensor>& sample) {
      return request_.wanted[index] && sample.has_value() ? at::empty({sizes_.rows}, sweep_.double_options())
                                                          : at::Tensor();
    };
    const at::Tensor grad_m2 = sample_gradient(3, problem_.sample_m2);
    const at::Tensor grad_m3 = sample_gradient(4, problem_.sample_m3);
    kernels_.finish_rows(
        {sweep_.context(),
         upstream_.pointers(),
         sizes_.rows,
         request_.grad_logit_sum.has_value() ? pointer<double>(request_.weight_sum) : nullptr,
         pointer(input_products_),
         pointer<double>(grad_m2),
         pointer<double>(grad_m3)},
        problem_.acc());
    const auto returned = [&](const at::Tensor& gradient, const std::optional<at::Tensor>& of) {
      return gradient.defined() ? gradient.to(of->scalar_type()) : at::empty({0}, problem_.input.options());
    };
    return {
        returned(input_products_, problem_.input),
        returned(grad_weight_, problem_.weight),
        returned(bias_products_, problem_.bias),
        returned(grad_m2, problem_.sample_m2),
        returned(grad_m3, problem_.sample_m3)};
  }

  const LinearProblem& problem_;
  const BackwardRequest& request_;
  const SweepKernels& kernels_;
  const ClassSweep sweep_;
  const SweepSizes& sizes_;
  const bool want_input_, want_weight_, want_bias_;
  const int64_t kept_classes_;
  const UpstreamVectors upstream_;

  at::Tensor scratch_; // [row_tile * class_chunk] acc
  at::Tensor operand_; // [row_tile, D] acc
  at::Tensor weighted_operand_; // [row_tile, D] acc
  at::Tensor weight_factor_; // [B] scale g_o
  at::Tensor bias_factor_; // [B] acc, scaled g_o
  at::Tensor input_products_; // [B, D] acc, becomes grad_input
  at::Tensor weight_products_; // [class_chunk, D] acc
  at::Tensor bias_products_; // [C] acc, becomes grad_bias
  at::Tensor grad_weight_; // [C, D]
  at::Tensor input_sum_; // R [D]
  at::Tensor logit_sum_total_; // 0-dim
  at::Tensor sorted_target_, sorted_row_; // [B]
};

} // namespace

Gradients sweep_backward(const LinearProblem& problem, const BackwardRequest& request, const SweepKernels& kernels) {
  return BackwardSweep(problem, request, kernels).run();
}

} // namespace torchmargin
