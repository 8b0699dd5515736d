// Real 8 x 8 digits from examples/data/digits.csv.
#pragma once

#include <torch/torch.h>

#include <stdexcept>
#include <string>

#include "csv.h"

struct Digits {
  torch::Tensor images; // [N, 1, 8, 8] in [-0.5, 0.5]
  torch::Tensor labels; // [N]

  Digits take(const torch::Tensor& mask) const {
    return {images.index({mask}), labels.index({mask})};
  }
};

inline Digits read_digits(const std::string& path) {
  const Table table = read_csv(path);
  const int64_t count = static_cast<int64_t>(table.size()) - 1; // without the header
  if (count < 1 || table.front().size() != 65) {
    throw std::runtime_error(path + ": expected a header and rows of 64 pixels and a label");
  }
  Digits digits{torch::empty({count, 1, 8, 8}), torch::empty({count}, torch::kLong)};
  float* const pixels = digits.images.data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t k = 0; k < 64; ++k) {
      pixels[i * 64 + k] = to_number(table[i + 1][k], path) / 16.0F - 0.5F;
    }
    const std::string& digit = table[i + 1][64];
    if (digit.size() != 1 || digit[0] < '0' || digit[0] > '9') {
      throw std::runtime_error(path + ": '" + digit + "' is not a digit");
    }
    digits.labels[i] = digit[0] - '0';
  }
  return digits;
}
