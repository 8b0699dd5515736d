#include "sweep/class_loop.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "sweep/class_sweep.h"
#include "sweep/raw.h"

namespace torchmargin {
namespace {

// Can a product of such operands read these rows as they are?
bool reads_in_place(const at::Tensor& matrix, const OperandFormat& operands) {
  return !operands.unit_vectors && matrix.scalar_type() == operands.dtype && has_contiguous_rows(matrix);
}

// The largest power of two that brings every row of the weight to a norm of at most 1, [1] float64.
at::Tensor unit_power_of_two(const ClassLoop& loop) {
  const at::Tensor norms = loop.empty({loop.sizes().classes});
  const LinearProblem& p = loop.problem();
  loop.kernels().load_rows(
      {raw_matrix(p.weight), loop.sizes().classes, loop.sizes().features, /*normalize=*/true, /*out=*/nullptr,
       loop.operands().dtype, /*out_row_stride=*/0, /*unit=*/false, /*row_factor=*/nullptr, /*operand_scale=*/nullptr,
       norms.data_ptr(), /*sum=*/nullptr},
      loop.acc());
  const at::Tensor infinity = loop.double_zeros({}).fill_(std::numeric_limits<double>::infinity());
  const at::Tensor smallest = at::where(norms > 0, norms.to(at::kDouble), infinity).min().view({1});
  const at::Tensor scale = smallest / (2 * std::get<0>(at::frexp(smallest))); // 2^(exponent - 1), exactly
  return at::where(at::isfinite(scale), scale, at::ones_like(scale));
}

// scale * log2(e) + log2(C) < 127, and no exp(-scale) below the smallest normal number.
bool sums_are_bounded(const LinearProblem& problem) {
  const double scale = problem.margins.parameters.scale;
  return problem.normalize_input && problem.normalize_weight && !problem.bias.has_value() && scale <= 71.0 &&
      scale * 1.4426950408889634 + std::log2(static_cast<double>(problem.weight.size(0))) < 127.0;
}

} // namespace

at::Tensor rows_of(const at::Tensor& tensor, Range rows) {
  return tensor.narrow(0, rows.begin, rows.count);
}

at::Tensor columns_of(const at::Tensor& matrix, Range columns) {
  return matrix.narrow(1, columns.begin, columns.count);
}

ClassLoop::ClassLoop(const LinearProblem& problem, const SweepKernels& kernels, Operands operands)
    : problem_(problem),
      kernels_(kernels),
      options_(problem.input.options().dtype(problem.acc()).requires_grad(false)),
      target_(problem.target.contiguous()),
      plan_(make_sweep_plan(
          {.rows = problem.input.size(0),
           .features = problem.input.size(1),
           .classes = problem.weight.size(0),
           .dtype = problem.weight.scalar_type(),
           .compute_dtype = problem.compute_dtype,
           .weight_in_rows = has_contiguous_rows(problem.weight),
           .wide = operands == Operands::wide},
          kernels.traits,
          problem.input.device().type())),
      bounded_(sums_are_bounded(problem)) {
  TORCH_CHECK(
      plan().fits, "torchmargin: the workspace limit of ", plan_.limit, " bytes is too small for a problem with ",
      sizes().rows, " rows, ", sizes().features, " features and ", sizes().classes, " classes in ",
      problem.input.scalar_type(), "; it needs at least ", plan().scratch_bytes, " bytes");
  if (problem.bias.has_value()) {
    bias_ = problem.bias->to(acc()).contiguous();
  }
  if (this->operands().unit_vectors && !problem.normalize_weight) {
    weight_scale_ = unit_power_of_two(*this);
  }
}

at::Tensor ClassLoop::empty(at::IntArrayRef shape) const {
  return empty(shape, acc());
}

at::Tensor ClassLoop::empty(at::IntArrayRef shape, at::ScalarType dtype) const {
  at::Tensor tensor = at::empty(shape, options_.dtype(dtype));
  kernels_.prepare_buffer(tensor.data_ptr(), static_cast<int64_t>(tensor.nbytes()));
  return tensor;
}

at::Tensor ClassLoop::double_zeros(at::IntArrayRef shape) const {
  return at::zeros(shape, options_.dtype(at::kDouble));
}

at::Tensor ClassLoop::weight_buffer() const {
  return sizes().convert_weight ? empty({plan().class_chunk, sizes().padded(sizes().features)}, operands().dtype)
                                : at::Tensor();
}

at::Tensor ClassLoop::load_weight(
    Range classes,
    const at::Tensor& buffer,
    const at::Tensor& inverse_norms,
    double* weight_sum) const {
  const at::Tensor chunk = rows_of(problem_.weight, classes);
  at::Tensor rows = chunk; // what the kernel reads
  at::Tensor operand = chunk;
  if (sizes().convert_weight) {
    operand = columns_of(rows_of(buffer, {0, classes.count}), {0, sizes().features});
    if (!kernels_.traits.reads_any_rows) {
      rows = operand.copy_(chunk);
    }
  }
  const bool converts = operand.data_ptr() != rows.data_ptr();
  void* const norms =
      problem_.normalize_weight && inverse_norms.defined() ? rows_of(inverse_norms, classes).data_ptr() : nullptr;
  // NB: the sum is made of rows times the norms that are written here.
  TORCH_INTERNAL_ASSERT(weight_sum == nullptr || norms != nullptr || !problem_.normalize_weight);
  if (converts || norms != nullptr || weight_sum != nullptr) {
    kernels_.load_rows(
        {raw_matrix(rows), classes.count, sizes().features, problem_.normalize_weight,
         converts ? operand.data_ptr() : nullptr, operands().dtype, operand.stride(0),
         operands().unit_vectors && problem_.normalize_weight, /*row_factor=*/nullptr, pointer<double>(weight_scale_),
         norms, weight_sum},
        acc());
  }
  return operand;
}

at::Tensor ClassLoop::tile_buffer(at::ScalarType dtype) const {
  return empty({plan().row_tile * sizes().padded(plan().class_chunk)}, dtype);
}

at::Tensor ClassLoop::tile_in(const at::Tensor& buffer, Range rows, Range classes) const {
  return buffer.as_strided({rows.count, classes.count}, {sizes().padded(classes.count), 1});
}

TargetContext ClassLoop::context() const {
  return {
      raw_matrix(problem_.input),
      raw_matrix(problem_.weight),
      pointer<int64_t>(target_),
      sizes().features,
      sizes().classes,
      problem_.margins.parameters,
      problem_.normalize_input,
      problem_.normalize_weight,
      raw_vector(problem_.bias),
      raw_vector(problem_.margins.sample_m2),
      raw_vector(problem_.margins.sample_m3),
      raw_vector(problem_.margins.sample_margin_weight)};
}

LogitsTile ClassLoop::describe(
    const at::Tensor& logits,
    Range rows,
    Range classes,
    const at::Tensor& inverse_norms,
    const at::Tensor& row_factors) const {
  return {
      logits.data_ptr(),
      logits.stride(0),
      rows.count,
      classes.count,
      classes.begin,
      target_.data_ptr<int64_t>() + rows.begin,
      problem_.margins.parameters.scale,
      row_factors.defined() ? rows_of(row_factors, rows).data_ptr() : nullptr,
      pointer(class_factors(classes, inverse_norms)),
      bias_.has_value() ? rows_of(*bias_, classes).data_ptr() : nullptr};
}

at::Tensor ClassLoop::class_factors(Range classes, const at::Tensor& inverse_norms) const {
  return problem_.normalize_weight && !operands().unit_vectors ? rows_of(inverse_norms, classes) : at::Tensor();
}

RowOperand::RowOperand(const ClassLoop& loop)
    : RowOperand(
          loop,
          // bfloat16 goes in as it is; row_factors() has the rest.
          loop.operands().unit_vectors || (loop.problem().normalize_input && loop.operands().dtype == loop.acc()),
          /*factor=*/nullptr,
          /*operand_scale=*/nullptr) {}

RowOperand::RowOperand(const ClassLoop& loop, const double* factor, const double* operand_scale)
    : RowOperand(loop, loop.problem().normalize_input, factor, operand_scale) {}

RowOperand::RowOperand(const ClassLoop& loop, bool unit, const double* factor, const double* operand_scale)
    : loop_(loop),
      unit_(unit),
      factor_(factor),
      operand_scale_(operand_scale),
      whole_(loop.plan().whole_operands(loop.sizes().rows)) {
  if (!unit && factor == nullptr && reads_in_place(loop.problem().input, loop.operands())) {
    return;
  }
  const SweepSizes& sizes = loop.sizes();
  const at::Tensor padded =
      loop.empty({whole_ ? sizes.rows : loop.plan().row_tile, sizes.padded(sizes.features)}, loop.operands().dtype);
  buffer_ = columns_of(padded, {0, sizes.features});
  if (whole_) {
    loop.for_each_tile([&](Range rows) { load(rows, rows_of(buffer_, rows)); });
  }
}

at::Tensor RowOperand::tile(Range rows) const {
  if (!buffer_.defined()) {
    return rows_of(loop_.problem().input, rows);
  }
  if (whole_) {
    return rows_of(buffer_, rows);
  }
  const at::Tensor to = rows_of(buffer_, {0, rows.count});
  load(rows, to);
  return to;
}

void RowOperand::load(Range rows, const at::Tensor& to) const {
  at::Tensor from = rows_of(loop_.problem().input, rows);
  if (!loop_.kernels().traits.reads_any_rows) {
    from = to.copy_(from);
  }
  loop_.kernels().load_rows(
      {raw_matrix(from), rows.count, loop_.sizes().features, /*normalize=*/unit_, to.data_ptr(), loop_.operands().dtype,
       to.stride(0), unit_, factor_ == nullptr ? nullptr : factor_ + rows.begin, operand_scale_,
       /*inverse_norms=*/nullptr, /*sum=*/nullptr},
      loop_.acc());
}

at::Tensor input_inverse_norms(const ClassLoop& loop, const double* factor, double* weighted_sum) {
  const LinearProblem& p = loop.problem();
  const at::Tensor norms = loop.empty({loop.sizes().rows});
  loop.for_each_tile([&](Range rows) {
    at::Tensor from = rows_of(p.input, rows);
    if (!loop.kernels().traits.reads_any_rows) {
      from = from.to(loop.acc()).contiguous();
    }
    loop.kernels().load_rows(
        {raw_matrix(from), rows.count, loop.sizes().features,
         /*normalize=*/weighted_sum == nullptr || p.normalize_input, /*out=*/nullptr, loop.operands().dtype,
         /*out_row_stride=*/0, /*unit=*/false, factor == nullptr ? nullptr : factor + rows.begin,
         /*operand_scale=*/nullptr, rows_of(norms, rows).data_ptr(), weighted_sum},
        loop.acc());
  });
  return norms;
}

at::Tensor row_factors(const ClassLoop& loop) {
  const LinearProblem& p = loop.problem();
  if (!loop.operands().unit_vectors) {
    const bool raw = p.normalize_input && loop.operands().dtype != loop.acc();
    return raw ? input_inverse_norms(loop) : at::Tensor();
  }
  if (p.normalize_input && p.normalize_weight) {
    return at::Tensor();
  }
  at::Tensor factors;
  if (p.normalize_input) {
    factors = loop.empty({loop.sizes().rows}).fill_(1.0);
  } else {
    const at::Tensor inverse = input_inverse_norms(loop);
    factors = at::where(inverse == 0, inverse, inverse.reciprocal()); // a zero row's length is 0
  }
  return p.normalize_weight ? factors : factors.div_(loop.weight_scale().to(loop.acc()));
}

} // namespace torchmargin
