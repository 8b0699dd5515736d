#include "ops/autograd_node.h"

#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

namespace torchmargin {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

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

struct CallNode : public Node {
  std::string name() const override {
    return call.name;
  }

  NodeCall call;
  std::vector<SavedVariable> variables;
  std::vector<bool> is_output; // of this node, for each variable
  bool released = false;

  // NB: after set_history, which tells a result's saved variable its place.
  void save(const Tensors& results, size_t outputs) {
    const size_t count = call.saved.size() + call.saved_results.size();
    variables.reserve(count);
    is_output.reserve(count);
    for (const auto& tensor : call.saved) {
      variables.push_back(tensor.has_value() ? SavedVariable(*tensor, /*is_output=*/false) : SavedVariable());
      is_output.push_back(false);
    }
    for (const size_t place : call.saved_results) {
      is_output.push_back(place < outputs);
      variables.emplace_back(results[place], is_output.back());
    }
    call.saved.clear();
  }

  variable_list apply(variable_list&& grads) override {
    Tensors saved;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
      for (size_t i = 0; i < variables.size(); ++i) {
        saved.push_back(is_output[i] ? variables[i].unpack(getptr()) : variables[i].unpack());
      }
    }
    variable_list results(num_outputs());
    bool any = false;
    for (const at::Tensor& grad : grads) {
      any = any || grad.defined();
    }
    if (!any) {
      return results;
    }
    std::vector<bool> wanted;
    for (size_t i = 0; i < results.size(); ++i) {
      wanted.push_back(task_should_compute_output(i));
    }
    const Tensors gradients = call.run(grads, saved, wanted);
    for (size_t i = 0; i < results.size(); ++i) {
      if (wanted[i]) {
        results[i] = gradients[i];
      }
    }
    return results;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& variable : variables) {
      variable.reset_data();
    }
    released = true;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (size_t i = 0; i < variables.size(); ++i) {
      args.collect(variables[i], is_output[i]);
    }
    args.collect(call.name);
    for (const double number : call.numbers) {
      args.collect(number);
    }
  }

  variable_list apply_with_saved(const variable_list& grads, torch::dynamo::autograd::SwapSavedVariables& saved)
      override {
    for (SavedVariable& variable : variables) {
      saved.before(variable);
    }
    variable_list results = apply(variable_list(grads));
    for (SavedVariable& variable : variables) {
      saved.after(variable);
    }
    return results;
  }
};

} // namespace

void attach_node(const Tensors& results, size_t outputs, const OptionalTensors& inputs, NodeCall call) {
  auto node = make_node<CallNode>();
  node->call = std::move(call);
  torch::autograd::edge_list edges;
  for (const auto& tensor : inputs) {
    edges.push_back(
        tensor.has_value() && tensor->defined() ? torch::autograd::impl::gradient_edge(*tensor)
                                                : torch::autograd::Edge());
  }
  node->set_next_edges(std::move(edges));
  torch::autograd::set_history(Tensors(results.begin(), results.begin() + outputs), node);
  node->save(results, outputs);
}

bool any_requires_grad(const OptionalTensors& tensors) {
  bool any = false;
  for (const auto& tensor : tensors) {
    any = any || (tensor.has_value() && tensor->defined() && tensor->requires_grad());
  }
  return any && c10::GradMode::is_enabled();
}

bool any_has_tangent(const OptionalTensors& tensors) {
  for (const auto& tensor : tensors) {
    if (tensor.has_value() && tensor->defined() && tensor->_fw_grad(/*level=*/0).defined()) {
      return true;
    }
  }
  return false;
}

std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

} // namespace torchmargin
