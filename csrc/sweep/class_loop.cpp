#include "sweep/class_loop.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/util/Exception.h>

#include <limits>
#include <tuple>

#include "ops/logit_bounds.h"
#include "sweep/raw.h"

namespace torchmargin {
namespace {

int64_t class_count(const LinearProblem& problem) {
  return problem.weight.size(0) / problem.sub_centers;
}

// The largest power of two that brings every row of the weight to a norm of at most 1, [1] float64.
at::Tensor unit_power_of_two(const ClassLoop& loop) {
  const at::Tensor norms = loop.empty({loop.sizes().classes});
  loop.kernels().load_rows(
      {.rows = raw_matrix(loop.problem().weight),
       .row_count = loop.sizes().classes,
       .features = loop.sizes().features,
       .measured = true,
       .inverse_norms = norms.data_ptr()},
      loop.acc());
  const at::Tensor infinity = loop.double_zeros({}).fill_(std::numeric_limits<double>::infinity());
  const at::Tensor smallest = at::where(norms > 0, norms.to(at::kDouble), infinity).min().view({1});
  const at::Tensor scale = smallest / (2 * std::get<0>(at::frexp(smallest))); // 2^(exponent - 1), exactly
  return at::where(at::isfinite(scale), scale, at::ones_like(scale));
}

// Or it is copied before it is read.
bool begins_at_16_bytes(const at::Tensor& matrix) {
  return matrix.scalar_type() != at::kBFloat16 || reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 16 == 0;
}

} // namespace

// A small problem is one tile, and a view costs as much as its arithmetic.
at::Tensor rows_of(const at::Tensor& tensor, Range rows) {
  return rows.begin == 0 && rows.count == tensor.size(0) ? tensor : tensor.narrow(0, rows.begin, rows.count);
}

bool reads_in_place(const at::Tensor& matrix, const OperandFormat& operands) {
  return !operands.unit_vectors && matrix.scalar_type() == operands.dtype && has_contiguous_rows(matrix);
}

at::Tensor columns_of(const at::Tensor& matrix, Range columns) {
  return columns.begin == 0 && columns.count == matrix.size(1) ? matrix
                                                               : matrix.narrow(1, columns.begin, columns.count);
}

ClassLoop::ClassLoop(
    const LinearProblem& problem,
    const Device& device,
    Operands operands,
    const at::Tensor& weight_scale)
    : problem_(problem),
      device_(device),
      options_(problem.input.options().dtype(problem.acc()).requires_grad(false)),
      target_(problem.target.contiguous()),
      plan_(make_sweep_plan(
          {.rows = problem.input.size(0),
           .features = problem.input.size(1),
           .classes = class_count(problem),
           .dtype = problem.weight.scalar_type(),
           .compute_dtype = problem.compute_dtype,
           .weight_in_rows = has_contiguous_rows(problem.weight),
           // NB: slopes past what 16 bits hold, where the angle is next to nothing.
           .wide = operands == Operands::wide || problem.binary.kind == BinaryKind::angle,
           .centers = problem.sub_centers,
           .fused =
               fits_fused_tiles(problem) && begins_at_16_bytes(problem.input) && begins_at_16_bytes(problem.weight)},
          device.traits,
          problem.input.device().type())),
      bounded_(sums_are_bounded(problem)) {
  TORCH_CHECK(
      plan().fits, "torchmargin: the workspace limit of ", plan_.limit, " bytes is too small for a problem with ",
      sizes().rows, " rows, ", sizes().features, " features and ", sizes().classes, " classes in ",
      problem.input.scalar_type(), "; it needs at least ", plan().scratch_bytes, " bytes");
  if (problem.bias.has_value()) {
    bias_ = problem.bias->to(acc()).contiguous(); // [C], or 0-dim: one against all
  }
  if (this->operands().unit_vectors && !problem.normalize_weight) {
    weight_scale_ = weight_scale.defined() ? weight_scale : unit_power_of_two(*this);
  }
}

at::Tensor ClassLoop::empty(at::IntArrayRef shape) const {
  return empty(shape, acc());
}

at::Tensor ClassLoop::empty(at::IntArrayRef shape, at::ScalarType dtype) const {
  at::Tensor tensor = at::empty(shape, options_.dtype(dtype));
  kernels().prepare_buffer(tensor.data_ptr(), static_cast<int64_t>(tensor.nbytes()));
  return tensor;
}

at::Tensor ClassLoop::double_zeros(at::IntArrayRef shape) const {
  return at::zeros(shape, options_.dtype(at::kDouble));
}

at::Tensor ClassLoop::weight_buffer() const {
  return sizes().convert_weight
      ? empty({plan().class_chunk * centers(), sizes().padded(sizes().features)}, operands().dtype)
      : at::Tensor();
}

at::Tensor ClassLoop::load_weight(
    Range classes_of_chunk,
    const at::Tensor& buffer,
    const at::Tensor& inverse_norms,
    double* weight_sum) const {
  const Range classes = weight_rows(classes_of_chunk);
  const at::Tensor chunk = rows_of(problem_.weight, classes);
  at::Tensor rows = chunk; // what the kernel reads
  at::Tensor operand = chunk;
  if (sizes().convert_weight) {
    operand = columns_of(rows_of(buffer, {0, classes.count}), {0, sizes().features});
    if (!traits().reads_any_rows) {
      rows = operand.copy_(chunk);
    }
  }
  const bool converts = operand.data_ptr() != rows.data_ptr();
  void* const norms =
      problem_.normalize_weight && inverse_norms.defined() ? rows_of(inverse_norms, classes).data_ptr() : nullptr;
  // NB: the sum is made of rows times the norms that are written here.
  TORCH_INTERNAL_ASSERT(weight_sum == nullptr || norms != nullptr || !problem_.normalize_weight);
  if (converts || norms != nullptr || weight_sum != nullptr) {
    LoadRowsArgs args = conversion(rows, operand);
    args.out = converts ? args.out : nullptr;
    args.inverse_norms = norms;
    args.sum = weight_sum;
    args.sum_sets = traits().sum_sets;
    kernels().load_rows(args, acc());
  }
  return operand;
}

// The norms were taken by the forward; a CPU takes them again as it goes.
at::Tensor ClassLoop::reload_weight(Range classes_of_chunk, const at::Tensor& buffer, const at::Tensor& inverse_norms)
    const {
  const Range classes = weight_rows(classes_of_chunk);
  if (!traits().reads_any_rows || !sizes().convert_weight || !problem_.normalize_weight) {
    return load_weight(classes_of_chunk, buffer);
  }
  const at::Tensor operand = columns_of(rows_of(buffer, {0, classes.count}), {0, sizes().features});
  LoadRowsArgs args = conversion(rows_of(problem_.weight, classes), operand);
  args.given_norms = rows_of(inverse_norms, classes).data_ptr();
  kernels().load_rows(args, acc());
  return operand;
}

// Rows of the weight to an operand.
LoadRowsArgs ClassLoop::conversion(const at::Tensor& rows, const at::Tensor& operand) const {
  LoadRowsArgs args{};
  args.rows = raw_matrix(rows);
  args.row_count = rows.size(0);
  args.features = sizes().features;
  args.measured = problem_.normalize_weight;
  args.out = operand.data_ptr();
  args.out_dtype = operands().dtype;
  args.out_row_stride = operand.stride(0);
  args.to_unit = operands().unit_vectors && problem_.normalize_weight;
  args.operand_scale = pointer<double>(weight_scale_);
  return args;
}

at::Tensor ClassLoop::tile_buffer(at::ScalarType dtype) const {
  return empty({plan().row_tile * sizes().padded(plan().class_chunk) * centers()}, dtype);
}

at::Tensor ClassLoop::winner_buffer() const {
  return centers() == 1 ? at::Tensor() : empty({plan().row_tile * sizes().padded(plan().class_chunk)}, at::kByte);
}

at::Tensor ClassLoop::planes_in(const at::Tensor& buffer, Range rows, Range classes) const {
  const int64_t plane = sizes().padded(classes.count);
  return buffer.as_strided({rows.count, centers(), classes.count}, {centers() * plane, plane, 1});
}

at::Tensor ClassLoop::center_factors(Range classes, const at::Tensor& inverse_norms) const {
  if (operands().unit_vectors) {
    return at::Tensor();
  }
  return rows_of(inverse_norms, weight_rows(classes)).view({classes.count, centers()}).t().contiguous();
}

at::Tensor ClassLoop::hard_rows(const at::Tensor& state) const {
  if (!problem_.hard_coefficients.has_value()) {
    return at::Tensor();
  }
  static_assert(sizeof(HardRow) == 6 * sizeof(double));
  const at::Tensor hard = empty({sizes().rows, 6}, at::kDouble);
  const at::Tensor& coefficients = *problem_.hard_coefficients;
  kernels().hard_rows(
      {.context = context(),
       .rows = sizes().rows,
       .state = row_state(state),
       .threshold = raw_vector(problem_.hard_threshold),
       .coefficients =
           {.data = coefficients.data_ptr(),
            .dtype = coefficients.scalar_type(),
            .row_stride = coefficients.dim() == 1 ? 0 : coefficients.stride(0),
            .column_stride = coefficients.stride(-1)},
       .with_bias = problem_.bias.has_value(),
       .hard = reinterpret_cast<HardRow*>(pointer<double>(hard))},
      acc());
  return hard;
}

at::Tensor ClassLoop::tile_in(const at::Tensor& buffer, Range rows, Range classes) const {
  return buffer.as_strided({rows.count, classes.count}, {sizes().padded(classes.count), 1});
}

Tile ClassLoop::tile(
    Range rows,
    Range classes,
    const ForwardRecord& record,
    const at::Tensor& row_factors,
    bool kept,
    const at::Tensor& products_buffer,
    const at::Tensor& winner_buffer) const {
  Tile tile;
  if (kept) {
    tile.products = columns_of(rows_of(record.kept, rows), classes);
  }
  if (centers() > 1) {
    tile.planes.centers = centers();
    tile.planes.factors = center_factors(classes, record.inverse_norms);
    if (products_buffer.defined()) {
      tile.planes.products = planes_in(products_buffer, rows, classes);
    }
    if (kept) {
      tile.planes.winner = columns_of(rows_of(record.winners, rows), classes);
    } else {
      tile.products = tile.planes.products.select(1, 0);
      tile.planes.winner = winner_buffer.defined() ? tile_in(winner_buffer, rows, classes) : at::Tensor();
    }
  } else if (!kept && !fused()) {
    tile.products = tile_in(products_buffer, rows, classes);
  }
  tile.logits = describe(tile.products, rows, classes, record.inverse_norms, row_factors);
  return tile;
}

TargetContext ClassLoop::context() const {
  return {
      .input = raw_matrix(problem_.input),
      .weight = raw_matrix(problem_.weight),
      .target = pointer<int64_t>(target_),
      .features = sizes().features,
      .classes = sizes().classes,
      .margin = margin(),
      .normalize_input = problem_.normalize_input,
      .normalize_weight = problem_.normalize_weight,
      .centers = centers(),
      .bias = raw_vector(problem_.bias),
      .sample_m2 = raw_vector(problem_.margins.sample_m2),
      .sample_m3 = raw_vector(problem_.margins.sample_m3),
      .sample_margin_weight = raw_vector(problem_.margins.sample_margin_weight),
      .binary = problem_.binary};
}

ProductsTile ClassLoop::describe(
    const at::Tensor& products,
    Range rows,
    Range classes,
    const at::Tensor& inverse_norms,
    const at::Tensor& row_factors) const {
  return {
      .products = pointer(products),
      .row_stride = products.defined() ? products.stride(0) : 0,
      .row_count = rows.count,
      .class_count = classes.count,
      .first_class = classes.begin,
      .target = target_.data_ptr<int64_t>() + rows.begin,
      .scale = margin().scale,
      .row_factors = row_factors.defined() ? rows_of(row_factors, rows).data_ptr() : nullptr,
      .class_factors = pointer(class_factors(classes, inverse_norms)),
      .bias = bias_.has_value() && !problem_.one_against_all() ? rows_of(*bias_, classes).data_ptr() : nullptr};
}

at::Tensor ClassLoop::class_factors(Range classes, const at::Tensor& inverse_norms) const {
  return problem_.normalize_weight && !operands().unit_vectors && centers() == 1 ? rows_of(inverse_norms, classes)
                                                                                 : at::Tensor();
}

ClassLoop::TargetRows ClassLoop::target_rows(const std::optional<at::Tensor>& given_state) const {
  TargetRows targets;
  // NB: a copy, for it is returned too, and an op's results do not share memory with its arguments.
  targets.state = given_state.has_value() ? given_state->clone(at::MemoryFormat::Contiguous)
                                          : empty({sizes().rows, kRowStateSize}, at::kDouble);
  targets.logit = empty({sizes().rows}, at::kDouble);
  targets.angle = empty({sizes().rows});
  kernels().target_rows(
      {.context = context(),
       .rows = sizes().rows,
       .measured = given_state.has_value(),
       .state = row_state(targets.state),
       .target_logit = targets.logit.data_ptr<double>(),
       .target_angle = targets.angle.data_ptr()},
      acc());
  return targets;
}

} // namespace torchmargin
