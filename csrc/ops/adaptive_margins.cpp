// Composite ops: autograd, Meta, torch.compile and the devices meet ATen's ops only, and nothing waits for a device.
#include "ops/adaptive_margins.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <limits>

namespace torchmargin {

EmbeddingLengths
embedding_lengths(const at::Tensor& embeddings, const at::Tensor& labels, int64_t ignore_index, at::ScalarType dtype) {
  TORCH_CHECK(
      embeddings.dim() == 2 && labels.dim() == 1 && labels.sym_size(0) == embeddings.sym_size(0),
      "_embedding_lengths: expected embeddings to have shape [B, D] and labels [B], but got ", embeddings.sym_sizes(),
      " and ", labels.sym_sizes());
  const at::Tensor finite = at::isfinite(embeddings).all(1);
  const at::Tensor ignored = labels.eq(ignore_index);
  const at::Tensor counted = finite.logical_and(ignored.logical_not());
  const at::Tensor rows = at::where(counted.unsqueeze(1), embeddings, 1.0);
  const at::Tensor lengths = at::linalg_vector_norm(rows, 2, at::IntArrayRef{1}, /*keepdim=*/false, dtype);
  return {
      .lengths = at::where(finite.logical_or(ignored), lengths, std::numeric_limits<double>::quiet_NaN()),
      .counted = counted};
}

namespace {

// What AdaFace's statistics and margins read: held, and without a gradient (detach: nor a tangent of forward AD).
at::Tensor adaface_lengths(const at::Tensor& lengths) {
  return lengths.detach().clamp(0.001, 100.0);
}

} // namespace

std::tuple<at::Tensor, at::Tensor> adaface_statistics(
    const EmbeddingLengths& batch,
    const at::Tensor& mean,
    const at::Tensor& deviation,
    const at::Tensor& momentum) {
  const at::Tensor counted = batch.counted.logical_and(at::isfinite(batch.lengths));
  const at::Tensor lengths = adaface_lengths(batch.lengths);
  const at::Tensor count = counted.sum();
  const at::Tensor of_batch = at::where(counted, lengths, 0.0).sum() / count.clamp_min(1);
  const at::Tensor square = at::where(counted, (lengths - of_batch).square(), 0.0).sum() / (count - 1).clamp_min(1);
  const at::Tensor weight = at::where(count > 1, momentum, 0.0).to(mean.scalar_type());
  return {
      mean.lerp(of_batch.to(mean.options()), weight), deviation.lerp(square.sqrt().to(deviation.options()), weight)};
}

std::tuple<at::Tensor, at::Tensor> adaface_margins(
    const at::Tensor& lengths,
    const at::Tensor& mean,
    const at::Tensor& deviation,
    const at::Tensor& margin,
    const at::Tensor& h) {
  const at::Tensor quality = ((adaface_lengths(lengths) - mean) / (deviation + 1e-3) * h).clamp(-1, 1);
  return {-margin * quality, margin * (1 + quality)};
}

at::Tensor magface_margins(
    const at::Tensor& lengths,
    const at::Tensor& a_min,
    const at::Tensor& a_max,
    const at::Tensor& m_min,
    const at::Tensor& m_max) {
  const at::Tensor slope = (m_max - m_min) / (a_max - a_min);
  return m_min + slope * (lengths.clamp(a_min, a_max) - a_min);
}

at::Tensor magface_penalty(const at::Tensor& lengths, const at::Tensor& a_min, const at::Tensor& a_max) {
  const at::Tensor held = lengths.clamp(a_min, a_max);
  return held.reciprocal() + held / a_max.square();
}

namespace {

std::tuple<at::Tensor, at::Tensor> embedding_lengths_op(
    const at::Tensor& embeddings,
    const at::Tensor& labels,
    int64_t ignore_index,
    at::ScalarType dtype) {
  const EmbeddingLengths batch = embedding_lengths(embeddings, labels, ignore_index, dtype);
  return {batch.lengths, batch.counted};
}

std::tuple<at::Tensor, at::Tensor> adaface_statistics_op(
    const at::Tensor& lengths,
    const at::Tensor& counted,
    const at::Tensor& mean,
    const at::Tensor& deviation,
    const at::Tensor& momentum) {
  return adaface_statistics({.lengths = lengths, .counted = counted}, mean, deviation, momentum);
}

TORCH_LIBRARY_FRAGMENT(torchmargin, library) {
  library.def(
      "_embedding_lengths(Tensor embeddings, Tensor labels, int ignore_index, ScalarType dtype) -> "
      "(Tensor lengths, Tensor counted)");
  library.def(
      "_adaface_statistics(Tensor lengths, Tensor counted, Tensor mean, Tensor deviation, Tensor momentum) -> "
      "(Tensor new_mean, Tensor new_deviation)");
  library.def(
      "_adaface_margins(Tensor lengths, Tensor mean, Tensor deviation, Tensor margin, Tensor h) -> (Tensor m2, Tensor "
      "m3)");
  library.def("_magface_margins(Tensor lengths, Tensor a_min, Tensor a_max, Tensor m_min, Tensor m_max) -> Tensor");
  library.def("_magface_penalty(Tensor lengths, Tensor a_min, Tensor a_max) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchmargin, CompositeImplicitAutograd, library) {
  library.impl("_embedding_lengths", embedding_lengths_op);
  library.impl("_adaface_statistics", adaface_statistics_op);
  library.impl("_adaface_margins", adaface_margins);
  library.impl("_magface_margins", magface_margins);
  library.impl("_magface_penalty", magface_penalty);
}

} // namespace
} // namespace torchmargin
