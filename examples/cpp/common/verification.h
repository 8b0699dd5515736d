// How well cosines tell pairs of one class from pairs of two: area under the ROC curve, equal error rate, and the true
// acceptance rate at a given false acceptance rate.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>

struct Verification {
  double auc; // ties count half
  double eer; // where false rejections are as frequent as false acceptances, interpolated
  double tar; // at `far`
  double far;
  double threshold; // the cosine that accepts at `far`
  int64_t same, different; // pairs
};

// All pairs of rows of embeddings [N, D] with labels [N]; brought to unit length here.
inline Verification verify_pairs(const torch::Tensor& embeddings, const torch::Tensor& labels, double far = 0.01) {
  TORCH_CHECK(
      embeddings.dim() == 2 && labels.dim() == 1 && embeddings.size(0) == labels.size(0),
      "verification wants embeddings [N, D] and labels [N], but got ", embeddings.sizes(), " and ", labels.sizes());
  const torch::Tensor wide = embeddings.cpu().to(torch::kFloat64);
  const torch::Tensor broken = wide.isfinite().all(1).logical_not().nonzero();
  TORCH_CHECK(
      broken.size(0) == 0, "verification wants finite embeddings, but ", broken.size(0), " of ", wide.size(0),
      " rows hold NaN or infinity; the first is row ", broken[0].item<int64_t>());
  const torch::Tensor unit = torch::nn::functional::normalize(wide);
  const int64_t count = unit.size(0);
  const torch::Tensor pairs = torch::triu_indices(count, count, 1);
  const torch::Tensor cosine = unit.matmul(unit.t()).index({pairs[0], pairs[1]});
  const torch::Tensor own = labels.cpu();
  const torch::Tensor is_same = own.index({pairs[0]}) == own.index({pairs[1]});
  const torch::Tensor same = std::get<0>(cosine.index({is_same}).sort());
  const torch::Tensor different = std::get<0>(cosine.index({~is_same}).sort());
  Verification v{};
  v.far = far;
  v.same = same.size(0);
  v.different = different.size(0);
  TORCH_CHECK(v.same > 0 && v.different > 0, "verification needs pairs of one class and of two");

  // Mann-Whitney: how many different pairs lie below each same pair.
  const torch::Tensor below = torch::searchsorted(different, same, /*out_int32=*/false, /*right=*/false);
  const torch::Tensor not_above = torch::searchsorted(different, same, /*out_int32=*/false, /*right=*/true);
  v.auc = ((below + not_above).to(torch::kFloat64).sum() / (2.0 * static_cast<double>(v.same * v.different)))
              .item<double>();

  // Accepting from every cosine upwards that occurs, the largest first.
  const torch::Tensor thresholds = std::get<0>(cosine.sort(/*dim=*/0, /*descending=*/true)).contiguous();
  const auto accepted = [&](const torch::Tensor& sorted) {
    return 1.0 - torch::searchsorted(sorted, thresholds).to(torch::kFloat64) / static_cast<double>(sorted.size(0));
  };
  const torch::Tensor true_rate = accepted(same).contiguous();
  const torch::Tensor false_rate = accepted(different).contiguous();
  const double* const t = true_rate.data_ptr<double>();
  const double* const f = false_rate.data_ptr<double>();
  double before_gap = -1.0; // false acceptance minus false rejection before the first threshold
  double before_rate = 0.0;
  v.eer = 0.5;
  bool crossed = false;
  for (int64_t i = 0; i < thresholds.size(0); ++i) {
    const double gap = f[i] - (1.0 - t[i]);
    if (!crossed && gap >= 0.0) {
      const double share = gap > before_gap ? -before_gap / (gap - before_gap) : 0.0;
      v.eer = before_rate + share * (f[i] - before_rate);
      crossed = true;
    }
    before_gap = gap;
    before_rate = f[i];
    if (f[i] <= far) {
      v.tar = t[i];
      v.threshold = thresholds[i].item<double>();
    }
  }
  return v;
}
