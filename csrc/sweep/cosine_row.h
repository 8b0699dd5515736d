// What the kernels on given cosines need of one row's target, and of one cosine: for every device.
#pragma once

#include "math/cosine.h"
#include "math/host_device.h"
#include "sweep/cosine_kernels.h"
#include "sweep/target_rows.h"

namespace torchmargin {

struct OwnMargin {
  int64_t target; // classes if it is absent
  bool present;
  double mu;
  CosineMarginValue value;
};

template <typename Scalar>
TORCHMARGIN_HOST_DEVICE OwnMargin own_margin(const CosineContext& context, int64_t row) {
  OwnMargin own{};
  own.target = context.target[row];
  own.present = own.target >= 0 && own.target < context.classes;
  if (!own.present) {
    own.target = context.classes;
    return own;
  }
  const MarginParameters& margin = context.margin;
  own.mu = margin.margin_weight * vector_element(context.sample_margin_weight, row, 1.0);
  own.value = apply_margin_to_cosine(
      margin, Reader<Scalar>(context.cosine)(row, own.target), margin.m2 + vector_element(context.sample_m2, row, 0.0),
      margin.m3 + vector_element(context.sample_m3, row, 0.0), own.mu);
  return own;
}

// psi of the k-th cosine, or the gradient of the k-th cosine.
template <typename Scalar>
TORCHMARGIN_HOST_DEVICE void transform_element(const TransformArgs& args, int64_t k) {
  const MarginParameters& margin = args.margin;
  const double cosine = static_cast<double>(static_cast<const Scalar*>(args.cosine)[k]);
  const CosineMarginValue value = apply_margin_to_cosine(margin, cosine, margin.m2, margin.m3, margin.margin_weight);
  const double result =
      args.grad == nullptr ? value.psi : static_cast<double>(static_cast<const Scalar*>(args.grad)[k]) * value.dcosine;
  static_cast<Scalar*>(args.out)[k] = static_cast<Scalar>(result);
}

} // namespace torchmargin
