// search_gallery INPUTS K: examples/cpp/common/gallery.h on probes and a gallery that Python wrote; the places, one
// probe a line, after the seconds of each of three searches. benchmarks/gallery.py times it.
#include <torch/torch.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "common/gallery.h"

int main(int, char** argv) {
  std::ifstream file(argv[1], std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const auto inputs = torch::pickle_load(bytes).toGenericDict();
  const torch::Tensor probes = inputs.at("probes").toTensor();
  const torch::Tensor gallery = inputs.at("gallery").toTensor();
  torch::Tensor places;
  for (int round = 0; round < 3; ++round) {
    const auto began = std::chrono::steady_clock::now();
    places = std::get<1>(search_gallery(probes, gallery, std::stol(argv[2])));
    std::printf("%.6f ", std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
  }
  for (int64_t row = 0; row < places.size(0); ++row) {
    std::printf("\n");
    for (int64_t rank = 0; rank < places.size(1); ++rank) {
      std::printf("%ld ", places[row][rank].item<int64_t>());
    }
  }
  std::printf("\n");
  return 0;
}
