#include "ops/double_backward.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

namespace torchmargin {
namespace {

// The same values in variables of their own: one tensor may be given twice, as input and as
// weight, and gradients must be told apart. With a history where a tensor has one, so that
// further derivatives find their way.
struct OwnVariables {
  Tensors tensors;
  bool have_history = false;

  // Those that `must_require_grad` names require grad even where the given ones do not (torch.func
  // keeps the history of a level that has ended elsewhere).
  OwnVariables(const OptionalTensors& given, const std::vector<bool>& must_require_grad) {
    for (size_t i = 0; i < given.size(); ++i) {
      at::Tensor variable;
      if (given[i].has_value() && given[i]->defined()) {
        // A view keeps the tangent of forward-mode AD, which detach() drops.
        variable = given[i]->view_as(*given[i]);
        have_history = have_history || variable.requires_grad();
        if (must_require_grad[i] && !variable.requires_grad()) {
          variable.requires_grad_();
        }
      }
      tensors.push_back(variable);
    }
  }
};

// Gradients of `variables` (only of those that `wanted` names; undefined for the others).
Tensors gradients_of(
    const Tensors& results,
    const Tensors& upstream,
    const Tensors& variables,
    const std::vector<bool>& wanted,
    bool create_graph) {
  Tensors outputs, grads, sources;
  for (size_t i = 0; i < results.size(); ++i) {
    if (upstream[i].defined() && results[i].defined() && results[i].requires_grad()) {
      outputs.push_back(results[i]);
      grads.push_back(upstream[i]);
    }
  }
  for (size_t i = 0; i < variables.size(); ++i) {
    if (wanted[i] && variables[i].defined() && variables[i].requires_grad()) {
      sources.push_back(variables[i]);
    }
  }
  Tensors all(variables.size());
  if (outputs.empty() || sources.empty()) {
    return all;
  }
  const Tensors found =
      torch::autograd::grad(outputs, sources, grads, /*retain_graph=*/true, create_graph, /*allow_unused=*/true);
  size_t next = 0;
  for (size_t i = 0; i < variables.size(); ++i) {
    if (wanted[i] && variables[i].defined() && variables[i].requires_grad()) {
      all[i] = found[next++];
    }
  }
  return all;
}

} // namespace

Tensors formula_gradients(
    const OptionalTensors& inputs,
    const OptionalTensors& upstream,
    const std::vector<bool>& wanted,
    const Formula& formula) {
  const at::AutoGradMode enable_grad(true);
  const Tensors variables = OwnVariables(inputs, wanted).tensors;
  const Tensors grads = OwnVariables(upstream, std::vector<bool>(upstream.size())).tensors;
  Tensors gradients = gradients_of(formula(variables), grads, variables, wanted, /*create_graph=*/true);
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (wanted[i] && inputs[i].has_value() && !gradients[i].defined()) {
      gradients[i] = at::zeros_like(*inputs[i]);
    }
  }
  return gradients;
}

Tensors second_derivatives(
    const OptionalTensors& inputs,
    const OptionalTensors& upstream,
    const Tensors& grads_of_gradients,
    const std::vector<bool>& wanted,
    const Formula& formula) {
  const bool grad_mode = c10::GradMode::is_enabled();
  const at::AutoGradMode enable_grad(true);
  std::vector<bool> differentiated;
  std::vector<bool> must_require_grad;
  for (size_t i = 0; i < inputs.size(); ++i) {
    differentiated.push_back(grads_of_gradients[i].defined());
    must_require_grad.push_back(differentiated[i] || wanted[i]);
  }
  const OwnVariables own(inputs, must_require_grad);
  const OwnVariables own_upstream(upstream, std::vector<bool>(wanted.begin() + inputs.size(), wanted.end()));
  const Tensors gradients =
      gradients_of(formula(own.tensors), own_upstream.tensors, own.tensors, differentiated, /*create_graph=*/true);
  Tensors variables = own.tensors;
  variables.insert(variables.end(), own_upstream.tensors.begin(), own_upstream.tensors.end());
  const bool create_graph = grad_mode && (own.have_history || own_upstream.have_history);
  return gradients_of(gradients, grads_of_gradients, variables, wanted, create_graph);
}

at::Tensor without_unused_rows(const at::Tensor& input, const OptionalTensors& upstream) {
  const bool matrix = input.dim() == 2;
  at::Tensor used = at::isfinite(input.detach());
  used = matrix ? used.all(1) : used;
  for (const auto& grad : upstream) {
    if (grad.has_value() && grad->defined()) {
      const at::Tensor present = grad->detach().ne(0);
      used = used.logical_or(present.dim() == 2 ? present.any(1) : present);
    }
  }
  return at::where(matrix ? used.unsqueeze(1) : used, input, at::zeros({}, input.options().requires_grad(false)));
}

std::optional<at::Tensor> without_unused_rows(
    const std::optional<at::Tensor>& sample,
    const OptionalTensors& upstream) {
  return sample.has_value() && sample->dim() == 1 ? std::optional(without_unused_rows(*sample, upstream)) : sample;
}

} // namespace torchmargin
