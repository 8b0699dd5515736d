// One step of ArcFace, compiled as the C++ that torch's headers want.
#include <torch/torch.h>
#include <torchmargin/torchmargin.h>

#include <iostream>

#if defined(EXPECT_CXX17) && __cplusplus != 201703L
#error "the target should leave the project's C++17"
#endif

int main() {
  torchmargin::nn::ArcFaceLoss loss(torchmargin::nn::ArcFaceLossOptions(8, 30).scale(16).margin(0.5));
  const auto input = torch::randn({4, 8}, torch::requires_grad());
  const auto value = loss->forward(input, torch::arange(4));
  value.backward();
  std::cout << TORCHMARGIN_VERSION << " " << torch::isfinite(input.grad()).all().item<bool>() << "\n";
  return 0;
}
