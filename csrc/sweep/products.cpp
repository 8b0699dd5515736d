#include "sweep/products.h"

#include <ATen/Functions.h>

namespace torchmargin {
namespace {

constexpr int64_t kAlignment = 8; // elements: slices begin at 16 bytes

} // namespace

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

void multiply_split(const at::Tensor& outs, const at::Tensor& a, const at::Tensor& b) {
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
        /*accumulate=*/true);
  }
}

} // namespace torchmargin
