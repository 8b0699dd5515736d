// _recall_state: what a loss's state was in the forward that a backward pass runs again.
//
// torch.utils.checkpoint runs a forward twice, the second time inside the backward pass. A loss whose state moves
// with every call would move it twice and differentiate another loss. So each step writes (key, state) into a short
// log, and a recompute takes its state from there instead: `key` [K] is anything that the recompute has again bit
// for bit (or nearly: the nearest row is taken), such as sums over the batch.
//   log   [N, K + 1 + S] float64, newest row first: key, the backward pass that recalled it last (-1: none), state; an
//         empty row's key is +inf. Written to.
//   state [S] float64: the loss's state after this step, if it is a step
//   returns (state [S], fresh 0-dim bool): the state to compute with, and whether this was a step.
// Outside a backward pass the call is a step: it is logged, and (state, true) returned. Inside one it is a recompute:
// the nearest row's state and false; of equally near rows the newest that this backward pass has not had yet (two calls
// with one key are recomputed last first); of an empty log the given state. The place of the call is all that the host
// decides, at run time also under torch.compile: nothing waits for the device.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "ops/checks.h"

namespace torchmargin {
namespace {

constexpr int kNone = -1; // the number of no backward pass

using StateTuple = std::tuple<at::Tensor, at::Tensor>;

void check_arguments(const at::Tensor& log, const at::Tensor& key, const at::Tensor& state) {
  constexpr std::string_view op = "_recall_state";
  const auto check = [&](const char* argument, const at::Tensor& tensor) {
    TORCH_CHECK(
        tensor.scalar_type() == at::kDouble, op, ": expected ", argument, " to be Double, but got ",
        tensor.scalar_type());
    TORCH_CHECK(
        tensor.device() == log.device(), op, ": expected ", argument, " on the device of log, ", log.device(),
        ", but got ", tensor.device());
    TORCH_CHECK(!wants_gradient(tensor), op, ": expected ", argument, " not to require grad; detach it");
  };
  check("log", log);
  check("key", key);
  check("state", state);
  TORCH_CHECK(
      key.dim() == 1 && key.sym_size(0) > 0, op, ": expected key to have shape [K] with K > 0, but got ",
      key.sym_sizes());
  TORCH_CHECK(state.dim() == 1, op, ": expected state to have shape [S], but got ", state.sym_sizes());
  const c10::SymInt columns = key.sym_size(0) + state.sym_size(0) + 1;
  TORCH_CHECK(
      log.dim() == 2 && log.sym_size(0) > 0 && log.sym_size(1) == columns, op, ": expected log to have shape [N, ",
      columns, "] with N > 0, for ", key.sym_size(0), " numbers of key, one of a backward pass and ", state.sym_size(0),
      " of state, but got ", log.sym_sizes());
}

at::Tensor flag(const at::Tensor& like, bool value) {
  return at::full({}, value, like.options().dtype(at::kBool));
}

StateTuple remember(const at::Tensor& log, const at::Tensor& key, const at::Tensor& state) {
  const at::Tensor row = at::cat({key, at::full({1}, kNone, key.options()), state}).unsqueeze(0);
  log.copy_(at::cat({row, log.narrow(0, 0, log.size(0) - 1)}));
  return {state.clone(), flag(log, true)};
}

StateTuple recall(const at::Tensor& log, const at::Tensor& key, const at::Tensor& state, double backward) {
  const int64_t size = key.size(0);
  const at::Tensor keys = log.narrow(1, 0, size);
  const at::Tensor recalled = log.select(1, size);
  const at::Tensor infinity = at::full({}, std::numeric_limits<double>::infinity(), log.options());
  const at::Tensor empty = keys.eq(infinity).all(1);
  const at::Tensor alike = keys.eq(key).logical_or(keys.isnan().logical_and(key.isnan()));
  const at::Tensor apart = ((key - keys).abs() / (1 + key.abs())).masked_fill(alike, 0.0).sum(1);
  const at::Tensor distance = at::where(empty.logical_or(apart.isnan()), infinity, apart);
  const at::Tensor nearest = distance.eq(distance.min()).logical_and(empty.logical_not());
  // The first of equals is the newest; those that this backward pass has had come last.
  const at::Tensor had = recalled.eq(backward).to(at::kDouble);
  const at::Tensor place = at::where(nearest, had, infinity).argmin();
  const at::Tensor found = log.narrow(1, size + 1, state.size(0)).index_select(0, place.view({1})).squeeze(0);
  const at::Tensor used = at::arange(log.size(0), place.options()).eq(place).logical_and(empty.logical_not());
  const at::Tensor result = at::where(empty.all(), state, found);
  log.select(1, size).masked_fill_(used, backward);
  return {result, flag(log, false)};
}

StateTuple recall_state(const at::Tensor& log, const at::Tensor& key, const at::Tensor& state) {
  check_arguments(log, key, state);
  const at::NoGradGuard no_grad;
  const int backward = torch::autograd::get_current_graph_task_id();
  return backward == kNone ? remember(log, key, state) : recall(log, key, state, backward);
}

StateTuple recall_state_meta(const at::Tensor& log, const at::Tensor& key, const at::Tensor& state) {
  check_arguments(log, key, state);
  return {at::empty_symint(state.sym_sizes(), state.options()), at::empty({}, log.options().dtype(at::kBool))};
}

// One kernel for every device: it calls ATen's.
TORCH_LIBRARY_IMPL(torchmargin, CompositeExplicitAutograd, library) {
  library.impl("_recall_state", recall_state);
}

TORCH_LIBRARY_IMPL(torchmargin, Meta, library) {
  library.impl("_recall_state", recall_state_meta);
}

} // namespace
} // namespace torchmargin
