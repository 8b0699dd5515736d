// What a device is like, as far as plans and sweeps must know it: data, so that a plan can be made for a device that
// is not here.
#pragma once

#include <c10/core/DeviceType.h>

#include <cstdint>

namespace torchmargin {

// What suits a device.
struct TilePreference {
  int64_t rows;
  int64_t elements; // rows x classes
  int64_t weight_elements; // classes x features
  int64_t classes;
  int64_t alignment; // of rows of the workspace, in elements: 16 bytes of the narrowest operand
  int64_t output_tiles; // of kOutputTile^2 that a product should have, 0: it does not matter
  int64_t most_rows; // where classes are too few to fill a tile
};
constexpr int64_t kOutputTile = 128;

// On the CPU a tile of 256 x 512 float32 logits, its operands and its gradients stay in the last
// cache levels, and the products run at the speed of the whole one (docs/design.md).
constexpr TilePreference kCpuTile{256, 256 * 512, int64_t{1} << 40, 4096, 1, 0, 1024};
// On a GPU 24 MiB of float32 logits stay in the L2 cache between product and fused pass, and so do
// 16 MiB of weight gradients.
constexpr TilePreference kGpuTile{4096, 6 << 20, 4 << 20, 1 << 16, 8, 128, 4096};

struct DeviceTraits {
  bool reads_any_rows; // of any dtype and strides, and rounds what it writes; else rows come in acc, contiguous
  bool narrow_products; // of 16-bit operands, accumulated and returned in float32
  bool lanes; // chunks are swept side by side, a thread each; else one after the other
  TilePreference tile;
};

constexpr DeviceTraits kCpuTraits{.reads_any_rows = false, .narrow_products = false, .lanes = true, .tile = kCpuTile};
constexpr DeviceTraits kGpuTraits{.reads_any_rows = true, .narrow_products = true, .lanes = false, .tile = kGpuTile};

// Meta tensors are planned as CPU tensors are.
constexpr const DeviceTraits& traits_of(c10::DeviceType device) {
  return device == c10::DeviceType::CUDA ? kGpuTraits : kCpuTraits;
}

} // namespace torchmargin
