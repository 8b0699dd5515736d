// Autograd of the private linear ops, as hand-written Nodes (docs/design.md says why
// not autograd::Function). The node of the forward calls the registered backward op;
// the node of that one says that second derivatives are not implemented.
#include <ATen/Functions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include "ops/problem.h"

namespace torchmargin {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

constexpr size_t kDifferentiableInputs = 5; // input, weight, bias, sample_m2, sample_m3
constexpr size_t kDifferentiableOutputs = 3; // other_lse, target_logit, logit_sum

// NB: torch holds nodes by std::shared_ptr in 2.11 and by c10::intrusive_ptr later.
template <typename NodeType>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, NodeType>) {
    return c10::make_intrusive<NodeType>();
  } else {
    // deleteNode is found by its argument's type: later versions of torch have none.
    return std::shared_ptr<NodeType>(new NodeType(), [](NodeType* node) { deleteNode(node); });
  }
}

// Forward AD has no formula here: a tangent must not be dropped silently.
template <typename... Tensors>
void check_no_tangents(const char* op, const Tensors&... tensors) {
  const auto has_tangent = [](const std::optional<at::Tensor>& tensor) {
    return tensor.has_value() && tensor->defined() && tensor->_fw_grad(/*level=*/0).defined();
  };
  TORCH_CHECK_NOT_IMPLEMENTED(
      !(has_tangent(tensors) || ...), op, ": forward-mode AD is not implemented; use backward()");
}

std::array<std::optional<at::Tensor>, kDifferentiableInputs> differentiable_inputs(const LinearProblem& p) {
  return {p.input, p.weight, p.bias, p.sample_m2, p.sample_m3};
}

bool any_requires_grad(const LinearProblem& p) {
  bool any = false;
  for (const auto& tensor : differentiable_inputs(p)) {
    any = any || (tensor.has_value() && tensor->requires_grad());
  }
  return any && c10::GradMode::is_enabled();
}

void collect_edges(torch::autograd::edge_list& edges, const std::optional<at::Tensor>& tensor) {
  edges.push_back(
      tensor.has_value() && tensor->defined() ? torch::autograd::impl::gradient_edge(*tensor)
                                              : torch::autograd::Edge());
}

struct LinearMarginBackward : public Node {
  std::string name() const override {
    return "LinearMarginBackward";
  }

  // Everything that is no tensor; the tensors are saved variables below.
  LinearProblem problem;
  SavedVariable input, weight, target, bias, sample_m2, sample_m3, sample_margin_weight;
  SavedVariable other_lse, kept, inverse_norms, weight_sum;
  bool released = false;

  void save(const LinearProblem& p, const ForwardResult& result) {
    const auto saved = [](const std::optional<at::Tensor>& tensor) {
      return tensor.has_value() ? SavedVariable(*tensor, /*is_output=*/false) : SavedVariable();
    };
    problem = p;
    problem.input = problem.weight = problem.target = at::Tensor();
    problem.bias = problem.sample_m2 = problem.sample_m3 = problem.sample_margin_weight = std::nullopt;
    input = saved(p.input);
    weight = saved(p.weight);
    target = saved(p.target);
    bias = saved(p.bias);
    sample_m2 = saved(p.sample_m2);
    sample_m3 = saved(p.sample_m3);
    sample_margin_weight = saved(p.sample_margin_weight);
    other_lse = SavedVariable(result.other_lse, /*is_output=*/true);
    kept = saved(result.kept);
    inverse_norms = saved(result.inverse_norms);
    weight_sum = saved(result.weight_sum);
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    const auto optional = [](const at::Tensor& tensor) {
      return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
    };
    variable_list results(kDifferentiableInputs);
    BackwardRequest request;
    request.grad_other_lse = optional(grads[0]);
    request.grad_target_logit = optional(grads[1]);
    request.grad_logit_sum = optional(grads[2]);
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) {
      return results;
    }
    LinearProblem p = problem;
    p.input = input.unpack();
    p.weight = weight.unpack();
    p.target = target.unpack();
    p.bias = optional(bias.unpack());
    p.sample_m2 = optional(sample_m2.unpack());
    p.sample_m3 = optional(sample_m3.unpack());
    p.sample_margin_weight = optional(sample_margin_weight.unpack());
    request.other_lse = other_lse.unpack(getptr());
    request.kept = kept.unpack();
    request.inverse_norms = inverse_norms.unpack();
    request.weight_sum = weight_sum.unpack();
    for (size_t i = 0; i < kDifferentiableInputs; ++i) {
      request.wanted[i] = task_should_compute_output(i);
    }
    const Gradients gradients = call_linear_backward(p, request);
    for (size_t i = 0; i < kDifferentiableInputs; ++i) {
      if (request.wanted[i]) {
        results[i] = gradients[i];
      }
    }
    return results;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    each_saved([](SavedVariable& variable, bool) { variable.reset_data(); });
    released = true;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    const_cast<LinearMarginBackward*>(this)->each_saved(
        [&](SavedVariable& variable, bool is_output) { args.collect(variable, is_output); });
    args.collect(problem.margin.scale);
    args.collect(problem.margin.m1);
    args.collect(problem.margin.m2);
    args.collect(problem.margin.m3);
    args.collect(static_cast<int64_t>(problem.margin.extension));
    args.collect(problem.margin.margin_weight);
    args.collect(static_cast<int64_t>(problem.margin.margin_gradient));
    args.collect(problem.normalize_input);
    args.collect(problem.normalize_weight);
    args.collect(static_cast<int64_t>(problem.compute_dtype.value_or(at::ScalarType::Undefined)));
  }

  variable_list apply_with_saved(const variable_list& grads, torch::dynamo::autograd::SwapSavedVariables& saved)
      override {
    each_saved([&](SavedVariable& variable, bool) { saved.before(variable); });
    variable_list results = apply(variable_list(grads));
    each_saved([&](SavedVariable& variable, bool) { saved.after(variable); });
    return results;
  }

 private:
  template <typename Function>
  void each_saved(Function function) {
    for (SavedVariable* variable : {&input, &weight, &target, &bias, &sample_m2, &sample_m3, &sample_margin_weight}) {
      function(*variable, /*is_output=*/false);
    }
    function(other_lse, /*is_output=*/true);
    for (SavedVariable* variable : {&kept, &inverse_norms, &weight_sum}) {
      function(*variable, /*is_output=*/false);
    }
  }
};

struct LinearMarginSecondDerivative : public Node {
  std::string name() const override {
    return "LinearMarginSecondDerivative";
  }
  variable_list apply(variable_list&&) override {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "_linear_margin_backward: second derivatives are not implemented");
  }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {}
  variable_list apply_with_saved(const variable_list& grads, torch::dynamo::autograd::SwapSavedVariables&) override {
    return apply(variable_list(grads));
  }
};

ForwardTuple linear_margin_forward_autograd(
    TORCHMARGIN_LINEAR_PARAMETERS,
    std::optional<int64_t> ignore_index,
    bool with_logit_sum,
    int64_t kept_classes) {
  const LinearProblem problem = make_linear_problem("_linear_margin_forward", TORCHMARGIN_LINEAR_ARGUMENTS);
  check_no_tangents(
      "_linear_margin_forward", input, weight, problem.bias, problem.sample_m2, problem.sample_m3,
      problem.sample_margin_weight);
  const bool requires_grad = any_requires_grad(problem);
  ForwardResult result;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    result = call_linear_forward(problem, {ignore_index, with_logit_sum, kept_classes});
  }
  if (requires_grad) {
    auto node = make_node<LinearMarginBackward>();
    torch::autograd::edge_list edges;
    for (const auto& tensor : differentiable_inputs(problem)) {
      collect_edges(edges, tensor);
    }
    node->set_next_edges(std::move(edges));
    torch::autograd::set_history(
        std::vector<at::Tensor>{result.other_lse, result.target_logit, result.logit_sum}, node);
    // NB: saved after set_history, which tells an output's saved variable its place.
    node->save(problem, result);
  }
  return to_tuple(result);
}

BackwardTuple linear_margin_backward_autograd(TORCHMARGIN_LINEAR_BACKWARD_PARAMETERS) {
  const LinearProblem problem = make_linear_problem("_linear_margin_backward", TORCHMARGIN_LINEAR_ARGUMENTS);
  check_no_tangents(
      "_linear_margin_backward", input, weight, problem.bias, problem.sample_m2, problem.sample_m3, grad_other_lse,
      grad_target_logit, grad_logit_sum, other_lse);
  const std::array<std::optional<at::Tensor>, 4> upstream{grad_other_lse, grad_target_logit, grad_logit_sum, other_lse};
  bool requires_grad = any_requires_grad(problem);
  for (const auto& tensor : upstream) {
    requires_grad = requires_grad || (c10::GradMode::is_enabled() && tensor.has_value() && tensor->requires_grad());
  }
  Gradients gradients;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    gradients = call_linear_backward(
        problem,
        {grad_other_lse, grad_target_logit, grad_logit_sum, other_lse, kept, inverse_norms, weight_sum, wanted});
  }
  if (requires_grad) {
    auto node = make_node<LinearMarginSecondDerivative>();
    torch::autograd::edge_list edges;
    for (const auto& tensor : differentiable_inputs(problem)) {
      collect_edges(edges, tensor);
    }
    for (const auto& tensor : upstream) {
      collect_edges(edges, tensor);
    }
    node->set_next_edges(std::move(edges));
    torch::autograd::set_history(std::vector<at::Tensor>(gradients.begin(), gradients.end()), node);
  }
  return to_tuple(gradients);
}

TORCH_LIBRARY_IMPL(torchmargin, Autograd, library) {
  library.impl("_linear_margin_forward", linear_margin_forward_autograd);
  library.impl("_linear_margin_backward", linear_margin_backward_autograd);
}

} // namespace
} // namespace torchmargin
