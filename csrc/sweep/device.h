// The seam between the sweep and a device. The sweep cuts the problem into tiles, some rows against a chunk of classes,
// and goes over them; what happens to a tile is the device's: four steps, which a device may fuse as it likes. Their
// portable form is a product of ATen's and a kernel (tile_steps.h).
#pragma once

#include <ATen/core/Tensor.h>

#include "plan/device_traits.h"
#include "sweep/kernels.h"

namespace torchmargin {

struct Tile {
  at::Tensor row_operand; // [R, D]; undefined where the products are there already (kept by the forward)
  at::Tensor class_operand; // [n, D]
  at::Tensor products; // [R, n] acc: where the raw products are, or go
  ProductsTile logits; // the same products, and what makes logits of them
};

// What a backward pass weighs a tile's classes with; see SoftmaxChunkArgs.
struct Weighing {
  const double* other_lse;
  const double* upstream;
  bool times_class_factors;
  double scale;
};

// How a tile's part of the running sums is added; see AccumulateChunkArgs.
struct Scoring {
  RunningSums sums;
  bool bounded;
  bool first;
};

struct TileSteps {
  // The products, and their part of the rows' running sums.
  void (*score)(const SweepKernels&, const Tile&, const Scoring&);
  // The softmax weights of the classes, [R, n], as an operand of the next two. May be the products' memory.
  void (*weigh)(const SweepKernels&, const Tile&, const Weighing&, const at::Tensor& weights);
  // sums [S, R, D] = or += weights [R, n] class_operand [n, D], in S slices of n; with several always +=.
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
