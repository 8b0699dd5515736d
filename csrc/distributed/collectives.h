// The collectives of class-parallel training, through the dispatcher (`_c10d_functional`): no header of c10d, so that a
// LibTorch without torch.distributed builds and loads this. Where autograd meets them they are nodes of their own, for
// functional collectives get their autograd from Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace torchmargin {

struct Group {
  std::string name;
  int64_t size;
};

// [B, ...] of each rank to [R B, ...], ordered by rank, without autograd.
at::Tensor all_gather(const at::Tensor& tensor, const Group& group);
at::Tensor all_reduce(const at::Tensor& tensor, const char* op, const Group& group);

// Rows [n, ...] of this rank, padded with zeros to `rows_per_rank`, those of all ranks [R rows_per_rank, ...] in
// `dtype`. They travel in their own dtype. Its gradient is summed over the ranks (in float64 for float64, else in
// float32) and multiplied by `grad_scale`.
at::Tensor
gather_rows(const at::Tensor& rows, int64_t rows_per_rank, at::ScalarType dtype, double grad_scale, const Group& group);

// Labels [n] of this rank, padded with `ignore_index` to `max_rows` or to the most that a rank has (at least one);
// those of all ranks. It does not wait for them: wait_tensor does. `refused`: this rank will not go on, and no rank
// shall wait for it: its labels are kRefused then, or all ranks raise here.
at::Tensor gather_labels(
    const at::Tensor& labels,
    std::optional<int64_t> max_rows,
    int64_t ignore_index,
    bool refused,
    const Group& group);
at::Tensor wait_tensor(const at::Tensor& tensor);

// What this rank found for the rows of all ranks, [R n] float64 each, to the ranks that own the rows: [R, n] each, what
// every rank found for this rank's rows. Gradients of the first `differentiable` ones go the way back.
std::vector<at::Tensor>
exchange_partials(const std::vector<at::Tensor>& partials, int64_t differentiable, const Group& group);

// The sum over the ranks. The gradient goes to this rank's own addend as it is: each rank differentiates its own rows'
// share, and what crosses ranks crosses in the nodes above.
at::Tensor global_sum(const at::Tensor& value, const Group& group);

// A tensor that all ranks have, whose gradient is the sum of theirs.
at::Tensor shared_by_ranks(const at::Tensor& value, const Group& group);

} // namespace torchmargin
