// The lanes' hardest classes of a row as one list, and their logits again in float64: the angle to a class that is very
// near has no digit left in a rounded cosine. Host and device compilers read it; a team (math/team.h) shares one row.
#pragma once

#include <limits>

#include "math/host_device.h"
#include "math/online_lse.h"
#include "sweep/kernels.h"
#include "sweep/target_rows.h"

namespace torchmargin {

template <typename T>
struct Ranked {
  T logit;
  int64_t class_index; // -1: none

  // The larger logit first, then the lower class.
  TORCHMARGIN_HOST_DEVICE bool before(const Ranked& other) const {
    return logit > other.logit || (logit == other.logit && class_index < other.class_index);
  }
};

// The logit of a class without bias, from a row's state against its nearest center.
TORCHMARGIN_HOST_DEVICE inline double logit_of_state(const TargetContext& context, const RowState& state) {
  const double alpha = context.normalize_input ? 1.0 : std::sqrt(state.x_squared);
  const double beta = context.normalize_weight ? 1.0 : std::sqrt(state.w_squared);
  return context.margin.scale * alpha * beta * angle_of(state).cosine;
}

// logit_of(class) finds a logit together with the team. NB: every member finds the list; one writes it.
template <typename T, typename Team, typename LogitOf>
TORCHMARGIN_HOST_DEVICE void
merge_hardest_lists(const MergeHardestArgs& args, int64_t i, const Team& team, LogitOf logit_of) {
  constexpr double kNothing = -std::numeric_limits<double>::infinity();
  const int64_t stride = args.rows * args.hardest; // of a lane
  const auto entry = [&](int64_t lane, int64_t place) {
    const int64_t at = lane * stride + i * args.hardest + place;
    return Ranked<T>{static_cast<const T*>(args.top_logit)[at], args.top_class[at]};
  };
  Ranked<T> last{std::numeric_limits<T>::infinity(), -1};
  bool any = false; // `last` is an entry
  for (int64_t place = 0; place < args.hardest; ++place) {
    Ranked<T> best{static_cast<T>(kNothing), -1};
    for (int64_t lane = 0; lane < args.lanes; ++lane) {
      for (int64_t k = 0; k < args.hardest; ++k) {
        const Ranked<T> other = entry(lane, k);
        if (other.class_index >= 0 && (!any || last.before(other)) && (best.class_index < 0 || other.before(best))) {
          best = other;
        }
      }
    }
    const bool found = best.class_index >= 0;
    const double logit = found ? logit_of(best.class_index) : kNothing;
    if (team.rank == 0) {
      args.hardest_logit[i * args.hardest + place] = logit;
      args.hardest_class[i * args.hardest + place] = best.class_index;
    }
    if (!found) {
      continue;
    }
    last = best;
    any = true;
  }
  if (team.rank != 0 || !any || args.lanes == 1) {
    return;
  }
  OnlineLse total{args.sums.shift[i], args.sums.sum[i]};
  for (int64_t lane = 0; lane < args.lanes; ++lane) {
    for (int64_t k = 0; k < args.hardest; ++k) {
      const Ranked<T> other = entry(lane, k);
      if (other.class_index >= 0 && last.before(other)) {
        total.combine({static_cast<double>(other.logit), 1.0});
      }
    }
  }
  args.sums.shift[i] = total.shift;
  args.sums.sum[i] = total.sum;
}

template <typename Scalar, typename T, typename Team>
TORCHMARGIN_HOST_DEVICE void merge_hardest_row(const MergeHardestArgs& args, int64_t i, const Team& team) {
  RowState of_row{};
  of_row.x_squared = args.state[i].x_squared;
  merge_hardest_lists<T>(args, i, team, [&](int64_t class_index) {
    return logit_of_state(args.context, nearest_center(args.context, class_index, [&](int64_t center) {
                            return measure_against<Scalar>(args.context, i, of_row, center, team);
                          }));
  });
}

} // namespace torchmargin
