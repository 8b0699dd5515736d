// Images as tensors [channels, height, width] in [0, 1]: PGM and PPM, plain (P2, P3) and raw (P5, P6), of 8 or 16 bits;
// whatever OpenCV reads where the program is built with it.
#pragma once

#include <torch/torch.h>

#include <cctype>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(EMBEDDER_WITH_OPENCV)
#include <opencv2/imgcodecs.hpp>
#endif

// The next number of a PNM file; # begins a comment that ends with its line.
inline int64_t next_pnm_number(const std::string& bytes, size_t& at, const std::string& path) {
  while (at < bytes.size() && (std::isspace(static_cast<unsigned char>(bytes[at])) != 0 || bytes[at] == '#')) {
    at = bytes[at] == '#' ? std::min(bytes.find('\n', at), bytes.size()) : at + 1;
  }
  int64_t value = 0;
  const size_t begin = at;
  for (; at < bytes.size() && std::isdigit(static_cast<unsigned char>(bytes[at])) != 0 && at - begin < 10; ++at) {
    value = 10 * value + (bytes[at] - '0');
  }
  if (at == begin) {
    throw std::runtime_error(path + " is cut short or no PGM or PPM image");
  }
  return value;
}

inline torch::Tensor read_pnm(const std::string& bytes, const std::string& path) {
  const char kind = bytes[1];
  const int64_t channels = kind == '3' || kind == '6' ? 3 : 1;
  const bool raw = kind == '5' || kind == '6';
  size_t at = 2;
  const int64_t width = next_pnm_number(bytes, at, path);
  const int64_t height = next_pnm_number(bytes, at, path);
  const int64_t largest = next_pnm_number(bytes, at, path);
  constexpr int64_t kMostPixels = int64_t{1} << 28;
  if (width < 1 || height < 1 || width > kMostPixels / height || largest < 1 || largest > 65535) {
    throw std::runtime_error(path + " has an impossible header");
  }
  const int64_t count = width * height * channels;
  const int64_t sample_bytes = largest > 255 ? 2 : 1;
  if (raw) {
    ++at; // one white space after the header
    if (static_cast<int64_t>(bytes.size()) - static_cast<int64_t>(at) < count * sample_bytes) {
      throw std::runtime_error(path + " is cut short");
    }
  }
  torch::Tensor image = torch::empty({height, width, channels});
  float* const pixels = image.data_ptr<float>();
  const auto byte = [&](size_t place) { return static_cast<int64_t>(static_cast<unsigned char>(bytes[place])); };
  for (int64_t k = 0; k < count; ++k) {
    int64_t value = 0;
    if (!raw) {
      value = next_pnm_number(bytes, at, path);
    } else if (sample_bytes == 1) {
      value = byte(at + static_cast<size_t>(k));
    } else {
      value = 256 * byte(at + 2 * static_cast<size_t>(k)) + byte(at + 2 * static_cast<size_t>(k) + 1);
    }
    pixels[k] = static_cast<float>(value) / static_cast<float>(largest);
  }
  return image.permute({2, 0, 1}).contiguous();
}

inline torch::Tensor read_image(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot read '" + path + "'");
  }
  const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (bytes.size() > 2 && bytes[0] == 'P' && std::string("2356").find(bytes[1]) != std::string::npos) {
    return read_pnm(bytes, path);
  }
#if defined(EMBEDDER_WITH_OPENCV)
  const cv::Mat mat = cv::imread(path, cv::IMREAD_COLOR);
  if (!mat.empty()) { // 8-bit, blue green red
    const torch::Tensor pixels = torch::from_blob(mat.data, {mat.rows, mat.cols, 3}, torch::kUInt8);
    return pixels.flip({2}).permute({2, 0, 1}).to(torch::kFloat32).div(255.0).contiguous();
  }
  throw std::runtime_error(path + " is no image that OpenCV reads");
#else
  throw std::runtime_error(path + " is neither PGM nor PPM; for PNG and JPEG build with OpenCV");
#endif
}
