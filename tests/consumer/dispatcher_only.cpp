// Loads the library by linking it and calls an op by its name.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>

#include <iostream>

int main() {
  const auto op = c10::Dispatcher::singleton().findSchema({"torchmargin::margin_transform", ""});
  if (!op.has_value()) {
    std::cerr << "torchmargin's ops are not registered\n";
    return 1;
  }
  torch::jit::Stack stack{
      torch::zeros({1}, torch::kFloat64), 1.0, 0.5, 0.0, std::string("none"), 1.0, std::string("exact")};
  op->callBoxed(stack);
  std::cout << stack[0].toTensor().item<double>() << "\n"; // cos(pi / 2 + 0.5)
  return 0;
}
