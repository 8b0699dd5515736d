#include "sweep/tile_steps.h"

#include <ATen/Functions.h>

namespace torchmargin {

void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
  at::Tensor result = out;
  if (a.scalar_type() == out.scalar_type()) {
    accumulate ? at::addmm_out(result, out, a, b) : at::mm_out(result, a, b);
  } else if (a.is_cuda()) {
    accumulate ? at::addmm_out(result, out, a, b, out.scalar_type()) : at::mm_out(result, a, b, out.scalar_type());
  } else { // only a GPU has such products; elsewhere they are those of the same numbers in float32
    multiply(out, a.to(out.scalar_type()), b.to(out.scalar_type()), accumulate);
  }
}

namespace {

constexpr int64_t kAlignment = 8; // elements: slices begin at 16 bytes

// Each of S equal slices of n goes to sums of its own: more output tiles for a GPU. Their sum, in order, is the
// product.
void add_to_input(const at::Tensor& outs, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
  const int64_t splits = outs.size(0);
  const int64_t inner = a.size(1);
  const int64_t slice = splits == 1 ? 0 : inner / splits / kAlignment * kAlignment;
  const int64_t sliced = slice * splits;
  if (slice > 0) {
    const at::Tensor lefts = a.as_strided({splits, a.size(0), slice}, {slice * a.stride(1), a.stride(0), a.stride(1)});
    const at::Tensor rights = b.as_strided({splits, slice, b.size(1)}, {slice * b.stride(0), b.stride(0), b.stride(1)});
    at::Tensor result = outs;
    if (a.scalar_type() == outs.scalar_type()) {
      at::baddbmm_out(result, outs, lefts, rights);
    } else if (a.is_cuda()) {
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

void score(const SweepKernels& kernels, const Tile& tile, const Scoring& scoring) {
  multiply(tile.products, tile.row_operand, tile.class_operand.t());
  kernels.accumulate_chunk(
      {.tile = tile.logits, .bounded = scoring.bounded, .first = scoring.first, .sums = scoring.sums},
      tile.products.scalar_type());
}

void weigh(const SweepKernels& kernels, const Tile& tile, const Weighing& weighing, const at::Tensor& weights) {
  if (tile.row_operand.defined()) {
    multiply(tile.products, tile.row_operand, tile.class_operand.t());
  }
  kernels.softmax_chunk(
      {.tile = tile.logits,
       .other_lse = weighing.other_lse,
       .upstream = weighing.upstream,
       .times_class_factors = weighing.times_class_factors,
       .out = weights.data_ptr(),
       .out_row_stride = weights.stride(0),
       .out_dtype = weights.scalar_type(),
       .out_scale = weighing.scale},
      tile.products.scalar_type());
}

void add_to_weight(const at::Tensor& sums, const at::Tensor& weights, const at::Tensor& row_operand, bool accumulate) {
  multiply(sums, weights.t(), row_operand, accumulate);
}

} // namespace

const TileSteps kPortableSteps{
    .score = score,
    .weigh = weigh,
    .add_to_input = add_to_input,
    .add_to_weight = add_to_weight};

} // namespace torchmargin
