// The end of the forward pass, one row at a time in float64: the lanes' running sums become its results. For one thread
// on a CPU and for a team of threads on a GPU.
#pragma once

#include <limits>

#include "math/host_device.h"
#include "math/online_lse.h"
#include "sweep/kernels.h"
#include "sweep/target_rows.h"

namespace torchmargin {

// The results of a row. others_sum: of A_i . B_j over the other classes.
template <typename T>
TORCHMARGIN_HOST_DEVICE void finish_combined_row(const CombineRowsArgs& args, int64_t i, double others_sum) {
  const TargetContext& context = args.context;
  double logit_sum = 0.0;
  if (args.weight_sum != nullptr || args.more_logit_sum != nullptr) {
    const TargetRow row = evaluate_target(context, i, args.state[i]);
    const double other_bias = args.bias_sum != nullptr ? *args.bias_sum - own_bias(context, row) : 0.0;
    logit_sum = context.margin.scale * others_sum + other_bias + args.target_logit[i];
  }
  for (int64_t partial = i; args.more_logit_sum != nullptr && partial < args.lanes * args.rows; partial += args.rows) {
    logit_sum += args.more_logit_sum[partial];
  }
  OnlineLse total;
  double maximum = -std::numeric_limits<double>::infinity();
  for (int64_t partial = i; partial < args.lanes * args.rows; partial += args.rows) {
    total.combine({args.sums.shift[partial], args.sums.sum[partial]});
    maximum = args.sums.maximum[partial] > maximum ? args.sums.maximum[partial] : maximum;
  }
  const double other_lse = total.project();
  args.other_lse[i] = other_lse;
  args.logit_sum[i] = logit_sum;
  // The maximum passed NaN over; the sum did not.
  static_cast<T*>(args.max_other_logit)[i] = static_cast<T>(std::isnan(other_lse) ? other_lse : maximum);
}

template <typename Scalar, typename T, typename Team>
TORCHMARGIN_HOST_DEVICE void combine_row(const CombineRowsArgs& args, int64_t i, const Team& team) {
  const TargetContext& context = args.context;
  double others_sum = 0.0;
  if (args.weight_sum != nullptr) {
    const Reader<Scalar> x(context.input);
    const Reader<Scalar> w(context.weight);
    const TargetRow row = evaluate_target(context, i, args.state[i]);
    for (int64_t k = team.rank; k < context.features; k += team.size) {
      const double others = args.weight_sum[k] - (row.present ? row.b * w(row.target, k) : 0.0);
      others_sum += row.a * x(i, k) * others;
    }
    others_sum = team.sum(others_sum);
  }
  if (team.rank == 0) {
    finish_combined_row<T>(args, i, others_sum);
  }
}

} // namespace torchmargin
