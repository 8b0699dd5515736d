// The loss of one row and its slopes, from the log-sum-exp o of the other classes, the target's logit t and the mean
// logit: see ops/cross_entropy.cpp.
#pragma once

#include <cmath>
#include <limits>

#include "math/host_device.h"

namespace torchmargin {

// log(1 + exp(gap)) without a cancellation on either side; 0 without another class.
TORCHMARGIN_HOST_DEVICE inline double softplus(double gap) {
  if (gap == -std::numeric_limits<double>::infinity()) {
    return 0.0;
  }
  return (gap > 0.0 || std::isnan(gap) ? gap : 0.0) + std::log1p(std::exp(-std::fabs(gap)));
}

TORCHMARGIN_HOST_DEVICE inline double sigmoid(double x) {
  return 1.0 / (1.0 + std::exp(-x));
}

struct RowLossGradient {
  double other;
  double own;
  double mean;
};

// g: the row's upstream gradient; 0 is nothing, even if the row holds NaN.
TORCHMARGIN_HOST_DEVICE inline RowLossGradient row_loss_gradient(double g, double gap, double label_smoothing) {
  if (g == 0.0) {
    return {0.0, 0.0, 0.0};
  }
  const double p = sigmoid(gap);
  // eps - p, and for a p near 1 the same without its cancellation.
  const double slope = p < 0.5 ? label_smoothing - p : sigmoid(-gap) - (1.0 - label_smoothing);
  return {g * p, g * slope, g * -label_smoothing};
}

} // namespace torchmargin
