#include "distributed/collectives.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <functional>

#include "ops/autograd_node.h"
#include "ops/checks.h"
#include "ops/labels_of_ranks.h"

namespace torchmargin {
namespace {

// NB: boxed, by the schema: how torch spells the C++ type of a group's name has changed between versions.
template <typename... Arguments>
at::Tensor call(const char* name, Arguments... arguments) {
  const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
  TORCH_CHECK(
      op.has_value(), "torchmargin: there is no ", name,
      ": class-parallel training wants a LibTorch with torch.distributed, and in Python an import of it");
  torch::jit::Stack stack{c10::IValue(std::move(arguments))...};
  op->callBoxed(stack);
  return stack.front().toTensor();
}

at::Tensor start_all_gather(const at::Tensor& tensor, const Group& group) {
  return call("_c10d_functional::all_gather_into_tensor", tensor.contiguous(), group.size, group.name);
}

at::Tensor reduce_scatter(const at::Tensor& tensor, const Group& group) {
  return wait_tensor(
      call("_c10d_functional::reduce_scatter_tensor", tensor.contiguous(), std::string("sum"), group.size, group.name));
}

// Chunk r of the first dimension goes to rank r, chunk s of the result comes from rank s.
at::Tensor all_to_all(const at::Tensor& tensor, const Group& group) {
  const std::vector<int64_t> sizes(group.size, tensor.size(0) / group.size);
  return wait_tensor(call("_c10d_functional::all_to_all_single", tensor.contiguous(), sizes, sizes, group.name));
}

at::Tensor padded(const at::Tensor& rows, int64_t count, const at::Scalar& value) {
  const int64_t missing = count - rows.size(0);
  if (missing == 0) {
    return rows;
  }
  std::vector<int64_t> padding(2 * rows.dim(), 0);
  padding.back() = missing;
  return at::constant_pad_nd(rows, padding, value);
}

// NB: the derivatives of what crosses ranks are not written; autograd would leave out the part of the other ranks.
void refuse_second_derivatives() {
  TORCH_CHECK(
      !c10::GradMode::is_enabled(),
      "class_parallel: second derivatives across ranks are not available; differentiate without create_graph");
}

// What compiled autograd tells groups apart by.
std::vector<double> numbers_of(const Group& group) {
  const size_t hash = std::hash<std::string>()(group.name);
  return {static_cast<double>(group.size), static_cast<double>(hash >> 32), static_cast<double>(hash & 0xffffffffU)};
}

} // namespace

at::Tensor wait_tensor(const at::Tensor& tensor) {
  return call("_c10d_functional::wait_tensor", tensor);
}

at::Tensor all_gather(const at::Tensor& tensor, const Group& group) {
  return wait_tensor(start_all_gather(tensor, group));
}

at::Tensor all_reduce(const at::Tensor& tensor, const char* op, const Group& group) {
  return wait_tensor(call("_c10d_functional::all_reduce", tensor.contiguous(), std::string(op), group.name));
}

at::Tensor gather_rows(
    const at::Tensor& rows,
    int64_t rows_per_rank,
    at::ScalarType dtype,
    double grad_scale,
    const Group& group) {
  at::Tensor gathered;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    gathered = all_gather(padded(rows, rows_per_rank, 0.0), group).to(dtype);
  }
  if (!any_requires_grad({rows})) {
    return gathered;
  }
  const auto backward = [group, grad_scale, own = rows.size(0), to = rows.scalar_type()](
                            const Tensors& grads, const Tensors&, const std::vector<bool>&) -> Tensors {
    refuse_second_derivatives();
    const at::Tensor wide = grads[0].to(acc_dtype(grads[0].scalar_type()));
    at::Tensor sum = reduce_scatter(wide, group).narrow(0, 0, own);
    return {(grad_scale == 1.0 ? sum : sum * grad_scale).to(to)};
  };
  std::vector<double> numbers = numbers_of(group);
  numbers.push_back(grad_scale);
  attach_node({gathered}, /*outputs=*/1, {rows}, {"GatherRowsBackward", {}, {}, std::move(numbers), backward});
  return gathered;
}

at::Tensor gather_labels(
    const at::Tensor& labels,
    std::optional<int64_t> max_rows,
    int64_t ignore_index,
    bool refused,
    const Group& group) {
  const auto options = labels.options().dtype(at::kLong);
  int64_t rows = max_rows.value_or(1);
  if (!max_rows.has_value()) {
    const at::Tensor counts = all_gather(at::full({1}, refused ? -1 : labels.size(0), options), group).cpu();
    for (int64_t rank = 0; rank < group.size; ++rank) {
      const int64_t count = counts.const_data_ptr<int64_t>()[rank];
      TORCH_CHECK(count >= 0 || refused, refusal_of(rank));
      rows = std::max(rows, count);
    }
    if (refused) {
      return at::full({rows}, kRefusedLabel, options); // and its caller raises what it has to say
    }
  }
  const bool too_many = !refused && labels.size(0) > rows;
  const at::Tensor gathered = start_all_gather(
      refused || too_many ? at::full({rows}, kRefusedLabel, options) : padded(labels, rows, ignore_index), group);
  if (too_many) {
    wait_tensor(gathered);
    TORCH_CHECK(
        false, "class_parallel: expected at most max_rows = ", rows, " rows on each rank, but got ", labels.size(0));
  }
  return gathered;
}

std::vector<at::Tensor>
exchange_partials(const std::vector<at::Tensor>& partials, int64_t differentiable, const Group& group) {
  const int64_t count = static_cast<int64_t>(partials.size());
  Tensors exchanged;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor all = all_to_all(at::stack(partials, 1), group); // [R n, k]
    const at::Tensor by_kind = all.view({group.size, -1, count}).permute({2, 0, 1}).contiguous(); // [k, R, n]
    for (const at::Tensor& kind : by_kind.unbind(0)) {
      exchanged.push_back(kind.clone()); // NB: outputs of a node, not views of one tensor
    }
  }
  const OptionalTensors inputs(partials.begin(), partials.begin() + differentiable);
  if (!any_requires_grad(inputs)) {
    return exchanged;
  }
  const auto backward = [group, like = exchanged[0].options()](
                            const Tensors& grads, const Tensors& saved, const std::vector<bool>&) -> Tensors {
    refuse_second_derivatives();
    Tensors columns;
    for (const at::Tensor& grad : grads) {
      columns.push_back(grad.defined() ? grad.reshape({-1}) : at::zeros_like(saved[0]).reshape({-1}));
    }
    return all_to_all(at::stack(columns, 1), group).unbind(1);
  };
  attach_node(
      exchanged, differentiable, inputs,
      {"ExchangePartialsBackward", {exchanged[0].detach()}, {}, numbers_of(group), backward});
  return exchanged;
}

at::Tensor global_sum(const at::Tensor& value, const Group& group) {
  at::Tensor sum;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    sum = all_reduce(value, "sum", group);
  }
  if (any_requires_grad({value})) {
    const auto backward = [](const Tensors& grads, const Tensors&, const std::vector<bool>&) -> Tensors {
      return {grads[0]};
    };
    attach_node({sum}, /*outputs=*/1, {value}, {"GlobalSumBackward", {}, {}, numbers_of(group), backward});
  }
  return sum;
}

at::Tensor shared_by_ranks(const at::Tensor& value, const Group& group) {
  at::Tensor here;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    here = value.clone();
  }
  if (any_requires_grad({value})) {
    const auto backward = [group](const Tensors& grads, const Tensors&, const std::vector<bool>&) -> Tensors {
      refuse_second_derivatives();
      const at::Tensor wide = grads[0].to(acc_dtype(grads[0].scalar_type()));
      return {all_reduce(wide, "sum", group).to(grads[0].scalar_type())};
    };
    attach_node({here}, /*outputs=*/1, {value}, {"SharedByRanksBackward", {}, {}, numbers_of(group), backward});
  }
  return here;
}

} // namespace torchmargin
