#include "sweep/class_loop.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <cmath>

#include "sweep/class_sweep.h"
#include "sweep/raw.h"
#include "sweep/settings.h"

namespace torchmargin {
namespace {

// Can a product and the kernels read these rows as they are?
bool reads_in_place(const at::Tensor& matrix) {
  const bool wide = matrix.scalar_type() == acc_dtype(matrix.scalar_type());
  return wide && matrix.stride(1) == 1 && matrix.stride(0) >= matrix.size(1);
}

// scale * log2(e) + log2(C) < 127, and no exp(-scale) below the smallest normal number.
bool sums_are_bounded(const LinearProblem& problem) {
  const double scale = problem.margin.scale;
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

at::Tensor matrix_in(const at::Tensor& workspace, int64_t rows, int64_t columns) {
  return workspace.narrow(0, 0, rows * columns).view({rows, columns});
}

SweepSizes sweep_sizes(int64_t rows, int64_t features, int64_t classes, const at::Tensor& weight) {
  const at::ScalarType acc = acc_dtype(weight.scalar_type());
  return {
      rows,
      features,
      classes,
      static_cast<int64_t>(c10::elementSize(acc)),
      /*convert_weight=*/!reads_in_place(weight),
      /*widen_gradients=*/weight.scalar_type() != acc,
      /*threads=*/weight.is_cpu() && !at::in_parallel_region() ? at::get_num_threads() : 1,
      /*preferred=*/weight.is_cpu() ? kCpuTile : kGpuTile};
}

ClassLoop::ClassLoop(const LinearProblem& problem, const SweepKernels& kernels)
    : problem_(problem),
      kernels_(kernels),
      options_(problem.input.options().dtype(problem.acc()).requires_grad(false)),
      target_(problem.target.contiguous()),
      sizes_(sweep_sizes(problem.input.size(0), problem.input.size(1), problem.weight.size(0), problem.weight)),
      bounded_(sums_are_bounded(problem)) {
  const int64_t limit = workspace_limit(problem.input.device().type());
  plan_ = choose_chunk_plan(sizes_, limit);
  TORCH_CHECK(
      plan_.fits, "torchmargin: the workspace limit of ", limit, " bytes is too small for a problem with ", sizes_.rows,
      " rows, ", sizes_.features, " features and ", sizes_.classes, " classes in ", problem.input.scalar_type(),
      "; it needs at least ", plan_.scratch_bytes, " bytes");
  if (problem.bias.has_value()) {
    bias_ = problem.bias->to(acc()).contiguous();
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
  return sizes_.convert_weight ? empty({plan_.class_chunk, sizes_.features}) : at::Tensor();
}

at::Tensor ClassLoop::load_weight(Range classes, const at::Tensor& buffer) const {
  const at::Tensor chunk = rows_of(problem_.weight, classes);
  return sizes_.convert_weight ? rows_of(buffer, {0, classes.count}).copy_(chunk) : chunk;
}

void ClassLoop::load_inverse_norms(
    const at::Tensor& weight,
    Range classes,
    const at::Tensor& inverse_norms,
    double* weight_sum) const {
  kernels_.load_rows(
      {weight.data_ptr(), weight.stride(0), classes.count, sizes_.features, problem_.normalize_weight,
       /*scale_in_place=*/false, /*row_factor=*/nullptr, /*operand_scale=*/nullptr,
       problem_.normalize_weight ? rows_of(inverse_norms, classes).data_ptr() : nullptr, weight_sum},
      acc());
}

TargetContext ClassLoop::context() const {
  return {
      raw_matrix(problem_.input),
      raw_matrix(problem_.weight),
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

LogitsTile ClassLoop::describe(const at::Tensor& logits, Range rows, Range classes, const at::Tensor& inverse_norms)
    const {
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

RowOperand::RowOperand(const ClassLoop& loop, const double* factor, const double* operand_scale, double* sum)
    : loop_(loop),
      factor_(factor),
      operand_scale_(operand_scale),
      sum_(sum),
      whole_(loop.plan().whole_operands(loop.sizes().rows)),
      buffer_(loop.empty({whole_ ? loop.sizes().rows : loop.plan().row_tile, loop.sizes().features})) {
  if (whole_) {
    loop.for_each_tile([&](Range rows) { load(rows, rows_of(buffer_, rows)); });
  }
}

at::Tensor RowOperand::tile(Range rows) const {
  return whole_ ? rows_of(buffer_, rows) : load(rows, rows_of(buffer_, {0, rows.count}));
}

at::Tensor RowOperand::load(Range rows, const at::Tensor& to) const {
  to.copy_(rows_of(loop_.problem().input, rows));
  loop_.kernels().load_rows(
      {to.data_ptr(), to.stride(0), rows.count, loop_.sizes().features, loop_.problem().normalize_input,
       /*scale_in_place=*/true, factor_ == nullptr ? nullptr : factor_ + rows.begin, operand_scale_,
       /*inverse_norms=*/nullptr, sum_},
      loop_.acc());
  return to;
}

} // namespace torchmargin
