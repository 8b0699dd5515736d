// The seam between the sweep and a device. The sweep cuts the problem into tiles, some rows against a chunk of classes,
// and goes over them; what happens to a tile is the device's: four steps, which a device may fuse as it likes. Their
// portable form is a product of ATen's and a kernel (tile_steps.h).
#pragma once

#include <ATen/core/Tensor.h>

#include "plan/device_traits.h"
#include "sweep/kernels.h"

namespace torchmargin {

// Where a class has several centers (K > 1): see FoldCentersArgs.
struct CenterPlanes {
  int64_t centers = 1; // K
  at::Tensor products = {}; // [R, K, n] acc: where the raw products go; may hold Tile::products as its first plane
  at::Tensor factors = {}; // [K, n] acc, or undefined: 1
  at::Tensor winner = {}; // [R, n] uint8; undefined where nobody asks
};

struct Tile {
  at::Tensor row_operand; // [R, D]; undefined where the products are there already (kept by the forward)
  at::Tensor class_operand; // [n K, D]
  // [R, n] acc: where the raw products are, or go; with K > 1 the largest cosines. Undefined: the tile is one of
  // FusedTileArgs.
  at::Tensor products;
  ProductsTile logits; // the same products, and what makes logits of them
  CenterPlanes planes;
};

// What a row's hardest classes weigh; see WriteHardestArgs.
struct HardestWeights {
  int64_t count = 0;
  const int64_t* classes = nullptr; // [R, count]
  const double* values = nullptr;
};

// What a backward pass weighs a tile's classes with; see SoftmaxChunkArgs.
struct Weighing {
  const double* other_lse;
  const double* upstream;
  bool times_class_factors;
  double scale;
  const double* of_lse = nullptr;
  const double* of_sum = nullptr;
  bool sum_of_changes = false;
  const HardRow* hard = nullptr;
  bool slopes = true;
  HardestWeights hardest = {};
  BinaryForm binary = {}; // one against all: see WeighBinaryArgs, and nothing above counts but upstream and scale
  const void* binary_bias = nullptr;
  double binary_factor = 1.0;
};

// How a tile's part of the running sums is added; see AccumulateChunkArgs.
struct Scoring {
  RunningSums sums;
  bool bounded;
  bool first;
  const HardRow* hard = nullptr;
  double* logit_sum = nullptr;
  bool sum_of_changes = false;
  int64_t hardest = 0;
  void* top_logit = nullptr;
  int64_t* top_class = nullptr;
  BinaryForm binary = {}; // one against all: the sums are those of AddBinaryArgs, in their order there
  const void* binary_bias = nullptr;
  // Where a fused tile's sums go instead: see FusedTileArgs.
  double* set_sum = nullptr;
  double* set_maximum = nullptr;
  int64_t set_stride = 0;
};

struct TileSteps {
  // The products, and their part of the rows' running sums.
  void (*score)(const SweepKernels&, const Tile&, const Scoring&);
  // The weights of the classes, [R, n], or with K > 1 of their centers, [R, K, n], as an operand of the next two. May
  // be the products' memory.
  void (*weigh)(const SweepKernels&, const Tile&, const Weighing&, const at::Tensor& weights);
  // sums [S, R, D] = or += weights [R, n] class_operand [n, D], in S slices of n; with several always +=. With K > 1
  // weights [R, K, n], class_operand and sums of the next [n K, D].
  void (*add_to_input)(
      const at::Tensor& sums,
      const at::Tensor& weights,
      const at::Tensor& class_operand,
      bool accumulate);
  // sums [n, D] = or += weights^T row_operand, of as many columns as row_operand has.
  void (*add_to_weight)(
      const at::Tensor& sums,
      const at::Tensor& weights,
      const at::Tensor& row_operand,
      bool accumulate);
};

struct Device {
  DeviceTraits traits;
  SweepKernels kernels;
  TileSteps steps;
};

} // namespace torchmargin
