// What a device is like, as far as plans and sweeps must know it: data, so that a plan can be made for a device that
// is not here.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>

namespace torchmargin {

// What suits a device. A CPU's tile has so many elements; a GPU's follows from its processors and its cache.
struct TilePreference {
  int64_t rows;
  int64_t elements; // rows x classes
  int64_t classes;
  int64_t alignment; // of rows of the workspace, in elements: 16 bytes of the narrowest operand
  int64_t most_rows; // where classes are too few to fill a tile
  int64_t processors = 0; // that a product's output tiles should fill, wave after wave; 0: it does not matter
  int64_t cache_bytes = 0; // that a chunk's tile, operands and gradients should take
};

// On the CPU a tile of 256 x 512 float32 logits, its operands and its gradients stay in the last
// cache levels, and the products run at the speed of the whole one (docs/design.md).
constexpr TilePreference kCpuTile{
    .rows = 256,
    .elements = 256 * 512,
    .classes = 4096,
    .alignment = 1,
    .most_rows = 1024};

struct DeviceTraits {
  bool reads_any_rows; // of any dtype and strides, and rounds what it writes; else rows come in acc, contiguous
  bool narrow_products; // of 16-bit operands, accumulated and returned in float32
  bool lanes; // chunks are swept side by side, a thread each; else one after the other
  TilePreference tile;
  int64_t sum_sets = 1; // in which the sum of all weights is taken
  bool fused_tiles = false; // products of 16 bits and what is made of them in one kernel, see FusedTileArgs
};

constexpr DeviceTraits kCpuTraits{.reads_any_rows = false, .narrow_products = false, .lanes = true, .tile = kCpuTile};

// A GPU as its driver describes it.
struct GpuShape {
  int64_t processors; // streaming multiprocessors
  int64_t l2_bytes;
  bool fused_tiles; // it and this build have the kernel
};
// Where plans are made for a GPU and there is none.
constexpr GpuShape kSomeGpu{.processors = 132, .l2_bytes = int64_t{50} << 20, .fused_tiles = false};

// NB: four times the L2 cache. Larger chunks read more from memory, but launch less: on an H200 twice the cache needs
// the GPU for 1 % less, and the host for half as long again.
constexpr DeviceTraits gpu_traits(const GpuShape& gpu) {
  DeviceTraits traits{.reads_any_rows = true, .narrow_products = true, .lanes = false, .tile = {}};
  traits.tile = {4096, 0, int64_t{1} << 20, 8, 4096, gpu.processors, 4 * gpu.l2_bytes};
  traits.sum_sets = 16;
  traits.fused_tiles = gpu.fused_tiles;
  return traits;
}

// Meta tensors are planned as CPU tensors are. An index of -1: the current device.
DeviceTraits traits_of(c10::Device device);
// Who can look at GPUs says so.
void describe_gpus_by(GpuShape (*describe)(c10::DeviceIndex index));

} // namespace torchmargin
