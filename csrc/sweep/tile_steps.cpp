#include "sweep/tile_steps.h"

#include <ATen/Context.h>
#include <ATen/Functions.h>

namespace torchmargin {
namespace {

// Products of 16-bit numbers are summed in float32, whatever is allowed: with
// torch.backends.cuda.matmul.allow_fp16_accumulation ATen refuses such a product. NB: a setting of the whole process;
// another thread's product between the two lines is more exact than it had to be.
class WideSums {
 public:
  WideSums() : narrow_(at::globalContext().allowFP16AccumulationCuBLAS()) {
    set(false);
  }
  ~WideSums() {
    set(narrow_);
  }
  WideSums(const WideSums&) = delete;
  WideSums& operator=(const WideSums&) = delete;

 private:
  void set(bool allowed) const {
    if (narrow_) {
      at::globalContext().setAllowFP16AccumulationCuBLAS(allowed);
    }
  }
  bool narrow_;
};

} // namespace

void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
  at::Tensor result = out;
  if (a.scalar_type() == out.scalar_type()) {
    accumulate ? at::addmm_out(result, out, a, b) : at::mm_out(result, a, b);
  } else if (a.is_cuda()) {
    const WideSums wide;
    accumulate ? at::addmm_out(result, out, a, b, out.scalar_type()) : at::mm_out(result, a, b, out.scalar_type());
  } else { // only a GPU has such products; elsewhere they are those of the same numbers in float32
    multiply(out, a.to(out.scalar_type()), b.to(out.scalar_type()), accumulate);
  }
}

namespace {

constexpr int64_t kAlignment = 8; // elements: slices begin at 16 bytes

// Each of S equal slices of n goes to sums of its own: more output tiles for a GPU. Their sum, in order, is the
// product.
void add_slices(const at::Tensor& outs, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
  const int64_t splits = outs.size(0);
  const int64_t inner = a.size(1);
  const int64_t slice = splits == 1 ? 0 : inner / splits / kAlignment * kAlignment;
  const int64_t sliced = slice * splits;
  if (slice > 0) {
    const at::Tensor lefts =
        a.as_strided({splits, a.size(0), slice}, {slice * a.stride(1), a.stride(0), a.stride(1)}, a.storage_offset());
    const at::Tensor rights =
        b.as_strided({splits, slice, b.size(1)}, {slice * b.stride(0), b.stride(0), b.stride(1)}, b.storage_offset());
    at::Tensor result = outs;
    if (a.scalar_type() == outs.scalar_type()) {
      at::baddbmm_out(result, outs, lefts, rights);
    } else if (a.is_cuda()) {
      const WideSums wide;
      at::baddbmm_out(result, outs, lefts, rights, outs.scalar_type());
    } else {
      at::baddbmm_out(result, outs, lefts.to(outs.scalar_type()), rights.to(outs.scalar_type()));
    }
  }
  if (sliced < inner) {
    multiply(
        outs.select(0, 0), a.narrow(1, sliced, inner - sliced), b.narrow(0, sliced, inner - sliced),
        accumulate || slice > 0);
  }
}

// Of a matrix [n K, D] the rows of every class's k-th center, [n, D].
at::Tensor rows_of_center(const at::Tensor& matrix, int64_t centers, int64_t k) {
  return matrix.as_strided(
      {matrix.size(0) / centers, matrix.size(1)}, {centers * matrix.stride(0), matrix.stride(1)},
      matrix.storage_offset() + k * matrix.stride(0));
}

// The raw products, or with several centers the largest cosine of each class: the same products, one center at a time.
void make_products(const SweepKernels& kernels, const Tile& tile) {
  const CenterPlanes& planes = tile.planes;
  if (planes.centers == 1) {
    multiply(tile.products, tile.row_operand, tile.class_operand.t());
    return;
  }
  for (int64_t k = 0; k < planes.centers; ++k) {
    multiply(planes.products.select(1, k), tile.row_operand, rows_of_center(tile.class_operand, planes.centers, k).t());
  }
  kernels.fold_centers(
      {.products = planes.products.data_ptr(),
       .row_stride = planes.products.stride(0),
       .plane_stride = planes.products.stride(1),
       .row_count = planes.products.size(0),
       .class_count = planes.products.size(2),
       .centers = planes.centers,
       .factors = planes.factors.defined() ? planes.factors.data_ptr() : nullptr,
       .out = tile.products.data_ptr(),
       .out_row_stride = tile.products.stride(0),
       .winner = planes.winner.defined() ? planes.winner.data_ptr<uint8_t>() : nullptr,
       .winner_row_stride = planes.winner.defined() ? planes.winner.stride(0) : 0},
      tile.products.scalar_type());
}

FusedTileArgs fused_tile(const Tile& tile) {
  FusedTileArgs args{};
  args.tile = tile.logits;
  args.dtype = tile.row_operand.scalar_type();
  args.row_operand = tile.row_operand.data_ptr();
  args.row_operand_stride = tile.row_operand.stride(0);
  args.class_operand = tile.class_operand.data_ptr();
  args.class_operand_stride = tile.class_operand.stride(0);
  args.features = tile.row_operand.size(1);
  return args;
}

void score(const SweepKernels& kernels, const Tile& tile, const Scoring& scoring) {
  if (!tile.products.defined()) {
    FusedTileArgs args = fused_tile(tile);
    args.sum = scoring.set_sum;
    args.maximum = scoring.set_maximum;
    args.set_stride = scoring.set_stride;
    kernels.fused_tile(args);
    return;
  }
  make_products(kernels, tile);
  if (scoring.binary.kind != BinaryKind::none) {
    kernels.add_binary(
        {.tile = tile.logits,
         .form = scoring.binary,
         .bias = scoring.binary_bias,
         .first = scoring.first,
         .softplus_sum = scoring.sums.shift,
         .slope_sum = scoring.sums.sum,
         .maximum = scoring.sums.maximum},
        tile.products.scalar_type());
    return;
  }
  kernels.accumulate_chunk(
      {.tile = tile.logits,
       .bounded = scoring.bounded,
       .first = scoring.first,
       .sums = scoring.sums,
       .hard = scoring.hard,
       .logit_sum = scoring.logit_sum,
       .sum_of_changes = scoring.sum_of_changes,
       .hardest = scoring.hardest,
       .top_logit = scoring.top_logit,
       .top_class = scoring.top_class},
      tile.products.scalar_type());
}

void write_hardest(
    const SweepKernels& kernels,
    const Tile& tile,
    const Weighing& weighing,
    const at::Tensor& weights,
    c10::ScalarType acc) {
  kernels.write_hardest(
      {.classes = weighing.hardest.classes,
       .values = weighing.hardest.values,
       .hardest = weighing.hardest.count,
       .row_count = tile.logits.row_count,
       .first_class = tile.logits.first_class,
       .class_count = tile.logits.class_count,
       .class_factors = weighing.times_class_factors ? tile.logits.class_factors : nullptr,
       .out = weights.data_ptr(),
       .out_row_stride = weights.stride(0),
       .out_dtype = weights.scalar_type(),
       .out_scale = weighing.scale},
      acc);
}

void spread_centers(
    const SweepKernels& kernels,
    const CenterPlanes& planes,
    const at::Tensor& weights,
    c10::ScalarType acc) {
  kernels.spread_centers(
      {.weights = weights.data_ptr(),
       .dtype = weights.scalar_type(),
       .row_stride = weights.stride(0),
       .plane_stride = weights.stride(1),
       .row_count = weights.size(0),
       .class_count = weights.size(2),
       .centers = planes.centers,
       .factors = planes.factors.defined() ? planes.factors.data_ptr() : nullptr,
       .winner = planes.winner.data_ptr<uint8_t>(),
       .winner_row_stride = planes.winner.stride(0)},
      acc);
}

void weigh_softmax(
    const SweepKernels& kernels,
    const Tile& tile,
    const Weighing& weighing,
    const at::Tensor& weights,
    c10::ScalarType acc) {
  kernels.softmax_chunk(
      {.tile = tile.logits,
       .other_lse = weighing.other_lse,
       .upstream = weighing.upstream,
       .times_class_factors = weighing.times_class_factors,
       .out = weights.data_ptr(),
       .out_row_stride = weights.stride(0),
       .out_dtype = weights.scalar_type(),
       .out_scale = weighing.scale,
       .of_lse = weighing.of_lse,
       .of_sum = weighing.of_sum,
       .sum_of_changes = weighing.sum_of_changes,
       .hard = weighing.hard,
       .slopes = weighing.slopes},
      acc);
}

void weigh_binary(
    const SweepKernels& kernels,
    const Tile& tile,
    const Weighing& weighing,
    const at::Tensor& weights,
    c10::ScalarType acc) {
  kernels.weigh_binary(
      {.tile = tile.logits,
       .form = weighing.binary,
       .bias = weighing.binary_bias,
       .upstream = weighing.upstream,
       .factor = weighing.binary_factor,
       .times_class_factors = weighing.times_class_factors,
       .out = weights.data_ptr(),
       .out_row_stride = weights.stride(0),
       .out_dtype = weights.scalar_type(),
       .out_scale = weighing.scale},
      acc);
}

void weigh(const SweepKernels& kernels, const Tile& tile, const Weighing& weighing, const at::Tensor& weights) {
  if (!tile.products.defined()) {
    FusedTileArgs args = fused_tile(tile);
    args.other_lse = weighing.other_lse;
    args.upstream = weighing.upstream;
    args.times_class_factors = weighing.times_class_factors;
    args.out = weights.data_ptr();
    args.out_row_stride = weights.stride(0);
    args.out_scale = weighing.scale;
    kernels.fused_tile(args);
    return;
  }
  const c10::ScalarType acc = tile.products.scalar_type();
  if (tile.row_operand.defined()) {
    make_products(kernels, tile);
  }
  weighing.binary.kind != BinaryKind::none ? weigh_binary(kernels, tile, weighing, weights, acc)
                                           : weigh_softmax(kernels, tile, weighing, weights, acc);
  if (weighing.hardest.count > 0) {
    write_hardest(kernels, tile, weighing, weights, acc);
  }
  if (weights.dim() == 3) {
    spread_centers(kernels, tile.planes, weights, acc);
  }
}

void add_to_weight(const at::Tensor& sums, const at::Tensor& weights, const at::Tensor& row_operand, bool accumulate) {
  if (weights.dim() == 2) {
    multiply(sums, weights.t(), row_operand, accumulate);
    return;
  }
  const int64_t centers = weights.size(1);
  for (int64_t k = 0; k < centers; ++k) {
    multiply(rows_of_center(sums, centers, k), weights.select(1, k).t(), row_operand, accumulate);
  }
}

void add_to_input(const at::Tensor& sums, const at::Tensor& weights, const at::Tensor& class_operand, bool accumulate) {
  if (weights.dim() == 2) {
    add_slices(sums, weights, class_operand, accumulate);
    return;
  }
  const int64_t centers = weights.size(1);
  for (int64_t k = 0; k < centers; ++k) {
    add_slices(sums, weights.select(1, k), rows_of_center(class_operand, centers, k), accumulate || k > 0);
  }
}

} // namespace

const TileSteps kPortableSteps{
    .score = score,
    .weigh = weigh,
    .add_to_input = add_to_input,
    .add_to_weight = add_to_weight};

} // namespace torchmargin
