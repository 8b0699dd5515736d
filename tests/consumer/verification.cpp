// verification INPUTS: the figures of examples/cpp/common/verification.h for embeddings and labels that Python wrote.
#include <torch/torch.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <vector>

#include "common/verification.h"

int main(int, char** argv) {
  std::ifstream file(argv[1], std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const auto inputs = torch::pickle_load(bytes).toGenericDict();
  const Verification v = verify_pairs(inputs.at("embeddings").toTensor(), inputs.at("labels").toTensor(), 0.05);
  std::printf("%.12f %.12f %.12f %ld %ld\n", v.auc, v.eer, v.tar, v.same, v.different);
  return 0;
}
