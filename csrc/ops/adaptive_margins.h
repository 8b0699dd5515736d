// Margins that are read from an embedding's length, and the statistics behind them: what the loss modules of Python and
// of C++ share, as private ops. Numbers of a loss are 0-dim float64 tensors: in Python they are buffers, which
// torch.compile neither freezes nor compiles again for.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>

namespace torchmargin {

struct EmbeddingLengths {
  at::Tensor lengths; // [B] of `dtype`: NaN for a row that is not finite, some finite number for an ignored one
  at::Tensor counted; // [B] bool: finite and not ignored
};

// The rows' lengths before they are normalised. A row that is ignored or not finite may hold anything: it is replaced
// before the arithmetic, so that no NaN of it reaches a gradient.
EmbeddingLengths embedding_lengths(
    const at::Tensor& embeddings, // [B, D]
    const at::Tensor& labels, // [B] int64
    int64_t ignore_index,
    at::ScalarType dtype);

// AdaFace: Kim et al., CVPR 2022 (arXiv:2204.00964), section 3.2 and its code. With a_i the lengths, held within
// [0.001, 100], the running statistics move to the batch's,
//   mean' = (1 - momentum) mean + momentum mean(a_i),   deviation' = (1 - momentum) deviation + momentum std(a_i),
// std(a_i) the unbiased deviation, both over the rows that count and are of finite length; fewer than two change
// nothing. Returns (mean', deviation'), 0-dim in their dtypes.
std::tuple<at::Tensor, at::Tensor> adaface_statistics(
    const EmbeddingLengths& batch,
    const at::Tensor& mean,
    const at::Tensor& deviation,
    const at::Tensor& momentum);

// The same paper, eq. 13 to 17: q_i = clip(h (a_i - mean) / (deviation + 0.001), -1, 1);  m2_i = -margin q_i is added
// to the angle, m3_i = margin (1 + q_i) taken from its cosine. Returns (m2, m3) [B]. No gradient flows through the
// length.
std::tuple<at::Tensor, at::Tensor> adaface_margins(
    const at::Tensor& lengths,
    const at::Tensor& mean,
    const at::Tensor& deviation,
    const at::Tensor& margin,
    const at::Tensor& h);

// MagFace: Meng et al., CVPR 2021 (arXiv:2103.06627). With a_i the lengths, held within [a_min, a_max],
// m2_i = m_min + (m_max - m_min) (a_i - a_min) / (a_max - a_min) is added to the angle. [B]; the gradient flows to the
// lengths inside.
at::Tensor magface_margins(
    const at::Tensor& lengths,
    const at::Tensor& a_min,
    const at::Tensor& a_max,
    const at::Tensor& m_min,
    const at::Tensor& m_max);

// The same paper's regulariser: g(a_i) = 1 / a_i + a_i / a_max^2, smallest at a_max. [B]; with a gradient.
at::Tensor magface_penalty(const at::Tensor& lengths, const at::Tensor& a_min, const at::Tensor& a_max);

} // namespace torchmargin
