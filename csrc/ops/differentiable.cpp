#include "ops/differentiable.h"

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

// The gradients of `inputs` (those that `wanted` names) for the gradients `upstream` of the
// formula's results, with a graph: for forward-mode AD of a backward pass.
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

// What a backward op's node returns: from the gradients of each of its results (one for each
// of `inputs`) those of `inputs` and `upstream`, in this order.
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

} // namespace

OptionalTensors CallArguments::all() const {
  OptionalTensors tensors;
  tensors.reserve(inputs.size() + others.size());
  tensors.insert(tensors.end(), inputs.begin(), inputs.end());
  tensors.insert(tensors.end(), others.begin(), others.end());
  return tensors;
}

Tensors differentiable_backward(
    const char* node,
    CallArguments call,
    const OptionalTensors& upstream,
    const std::vector<bool>& wanted,
    const std::function<Tensors()>& below,
    MakeFormula make_formula) {
  OptionalTensors inputs = call.inputs;
  inputs.insert(inputs.end(), upstream.begin(), upstream.end());
  if (any_has_tangent(inputs)) {
    Tensors saved;
    for (const auto& tensor : call.all()) {
      saved.push_back(tensor.value_or(at::Tensor()));
    }
    Tensors gradients = formula_gradients(call.inputs, upstream, wanted, make_formula(saved, upstream));
    for (at::Tensor& gradient : gradients) {
      gradient = gradient.defined() ? gradient : at::empty({0}, call.inputs[0]->options().requires_grad(false));
    }
    return gradients;
  }
  Tensors gradients;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    gradients = below();
  }
  if (any_requires_grad(inputs)) {
    OptionalTensors saved = call.all();
    saved.insert(saved.end(), upstream.begin(), upstream.end());
    const auto run = [input_count = call.inputs.size(), count = call.inputs.size() + call.others.size(), make_formula](
                         const Tensors& grads, const Tensors& tensors, const std::vector<bool>& needed) {
      const OptionalTensors given_inputs(tensors.begin(), tensors.begin() + input_count);
      OptionalTensors given_upstream;
      for (size_t i = count; i < tensors.size(); ++i) {
        given_upstream.push_back(optional(tensors[i]));
      }
      return second_derivatives(
          given_inputs, given_upstream, grads, needed,
          make_formula(Tensors(tensors.begin(), tensors.begin() + count), given_upstream));
    };
    const size_t outputs = gradients.size();
    attach_node(
        gradients, outputs, inputs, {node, std::move(saved), /*saved_results=*/{}, std::move(call.numbers), run});
  }
  return gradients;
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

void take_out_unused_rows(Margins& margins, const OptionalTensors& upstream) {
  for (auto* sample : {&margins.sample_m2, &margins.sample_m3, &margins.sample_margin_weight}) {
    if (sample->has_value() && (*sample)->dim() == 1) {
      *sample = without_unused_rows(**sample, upstream);
    }
  }
}

} // namespace torchmargin
