// One hand-written autograd node for all private ops: it keeps tensors, calls a function of
// them, and says what compiled autograd must know. docs/design.md says why there is no
// autograd::Function here.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace torchmargin {

using Tensors = std::vector<at::Tensor>;
using OptionalTensors = std::vector<std::optional<at::Tensor>>;

struct NodeCall {
  std::string name;
  // What the node keeps and gives back to `run`, undefined where there is none.
  OptionalTensors saved;
  // Kept as well, behind `saved`: results of this op, by their place among `results`.
  std::vector<size_t> saved_results;
  // All that `run` captured beside tensors: compiled autograd tells two calls apart by it.
  std::vector<double> numbers;
  // Gradients of the inputs, from those of the results (undefined where there is none).
  std::function<Tensors(const Tensors& grads, const Tensors& saved, const std::vector<bool>& wanted)> run;
};

// Makes the first `outputs` of `results` the outputs of a node with edges to `inputs`.
void attach_node(const Tensors& results, size_t outputs, const OptionalTensors& inputs, NodeCall call);

// Does any of them require grad, with grad mode enabled?
bool any_requires_grad(const OptionalTensors& tensors);

// Does any of them carry a tangent of forward-mode AD?
bool any_has_tangent(const OptionalTensors& tensors);

// An undefined tensor is none.
std::optional<at::Tensor> optional(const at::Tensor& tensor);

} // namespace torchmargin
