#include "api/loss_options.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <string_view>

#include "ops/class_weight.h"

namespace torchmargin::nn {
namespace {

constexpr double kPi = 3.14159265358979323846;

double check_radians(const char* name, double angle) {
  TORCH_CHECK(
      std::abs(angle) <= kPi, "expected ", name, " in radians, not degrees: at most pi in size, but got ", angle);
  return angle;
}

double check_cosines(const char* name, double difference) {
  TORCH_CHECK(
      std::abs(difference) <= kPi, "expected ", name,
      " to be a difference of cosines (angles here are in radians, not degrees): at most pi in size, but got ",
      difference);
  return difference;
}

void check_finite(const char* name, double value) {
  TORCH_CHECK(std::isfinite(value), "expected ", name, " to be finite, but got ", value);
}

void check_not_negative(const char* name, double value) {
  TORCH_CHECK(std::isfinite(value) && value >= 0, "expected ", name, " to be finite and not negative, but got ", value);
}

template <typename Options>
MarginLossOptions common(const Options& o, const LossForm& form) {
  MarginLossOptions options(o.in_features(), o.num_classes());
  options.form(form);
  options.label_smoothing(o.label_smoothing());
  options.ignore_index(o.ignore_index());
  options.reduction(o.reduction());
  options.class_weight(o.class_weight());
  options.sub_centers(o.sub_centers());
  options.interclass_filter(o.interclass_filter());
  return options;
}

// A loss that has a rule of its own for other classes.
template <typename Options>
void refuse_filter(const char* name, const Options& o) {
  TORCH_CHECK(
      !o.interclass_filter().has_value(), name,
      ": expected no interclass_filter, the loss has a rule of its own for other classes");
}

template <typename Options>
LossForm varied(LossForm form, const Options& o) {
  form.margin.scale = o.scale();
  form.margin.extension = o.extension();
  form.margin.margin_gradient = o.margin_gradient();
  return form;
}

LossForm scaled(LossForm form, double scale) {
  form.margin.scale = scale;
  return form;
}

template <typename Options>
void check_annealing(const Options& o) {
  check_not_negative("lambda_base", o.lambda_base());
  check_not_negative("lambda_gamma", o.lambda_gamma());
  check_not_negative("lambda_min", o.lambda_min());
}

template <typename Options>
std::vector<SavedNumber> annealed_numbers(Options& o) {
  return {
      {"scale", &o.scale()},
      {"margin", &o.margin()},
      {"lambda_base", &o.lambda_base()},
      {"lambda_gamma", &o.lambda_gamma()},
      {"lambda_min", &o.lambda_min()}};
}

// The margin of all classes where there is none of each. The values of class_margins are looked at apart.
template <typename Options>
double one_margin(const Options& o, double margin) {
  const torch::Tensor& margins = o.class_margins();
  if (!margins.defined()) {
    return margin;
  }
  TORCH_CHECK(
      margins.dim() == 1 && margins.size(0) == o.num_classes(), "expected class_margins to have shape [",
      o.num_classes(), "], but got ", margins.sizes());
  TORCH_CHECK(
      margins.is_floating_point(), "expected class_margins to hold floating-point numbers, but got ",
      margins.scalar_type());
  TORCH_CHECK(
      !margins.requires_grad(), "expected class_margins not to require grad, there is no gradient to it; detach it");
  return 0.0;
}

} // namespace

void check_options(const MarginLossOptions& options) {
  TORCH_CHECK(
      options.in_features() >= 1 && options.num_classes() >= 1,
      "expected in_features and num_classes to be positive, but got ", options.in_features(), " and ",
      options.num_classes());
  if (const auto filter = options.interclass_filter(); filter.has_value()) {
    check_finite("interclass_filter", *filter);
    TORCH_CHECK(
        options.form().normalize_input && options.form().normalize_weight,
        "expected normalize_input and normalize_weight with interclass_filter, which is a cosine");
  }
  check_class_weight_values(options.class_weight());
  // NB: not on the Meta device: without Python many of ATen's ops have no kernel there.
  const at::Tensor nothing = at::empty({0, 1}, at::kFloat);
  const at::Tensor labels = at::empty({0}, nothing.options().dtype(at::kLong));
  const at::Tensor one_class = nothing.new_zeros({std::max<int64_t>(options.sub_centers(), 1), 1});
  const bool binary = options.one_against_all().has_value();
  if (options.class_weight().defined()) {
    const std::string_view op = binary ? "linear_margin_binary_cross_entropy" : "linear_margin_cross_entropy";
    check_class_weight(
        op, options.class_weight(), /*input=*/options.class_weight(), options.num_classes(), options.label_smoothing());
  }
  if (binary) {
    TORCH_CHECK(
        options.label_smoothing() == 0,
        "expected no label_smoothing, it is a mean over the logits of a softmax, but got ", options.label_smoothing());
    functional::linear_margin_binary_cross_entropy(nothing, one_class, labels, binary_options(options));
    return;
  }
  functional::LinearMarginCrossEntropyFuncOptions all(options.form());
  all.linear().sub_centers(options.sub_centers()).hardest(options.hardest()).hardest_margin(options.hardest_margin());
  all.label_smoothing(options.label_smoothing());
  all.ignore_index(options.ignore_index());
  all.reduction(options.reduction());
  functional::linear_margin_cross_entropy(nothing, one_class, labels, all);
}

functional::LinearMarginBinaryCrossEntropyFuncOptions binary_options(const MarginLossOptions& options) {
  const OneAgainstAll& form = *options.one_against_all();
  return functional::LinearMarginBinaryCrossEntropyFuncOptions()
      .scale(options.form().margin.scale)
      .margin(form.margin)
      .kind(form.kind)
      .power(form.power)
      .positive_weight(form.positive_weight)
      .negative_weight(form.negative_weight)
      .sub_centers(options.sub_centers())
      .ignore_index(options.ignore_index())
      .reduction(options.reduction());
}

void check_class_margins(const torch::Tensor& margins) {
  const torch::Tensor size = margins.detach().to(at::kDouble).abs();
  const torch::Tensor good = size <= kPi; // false of NaN
  TORCH_CHECK(
      good.all().item<bool>(),
      "expected class_margins to be finite and at most pi in size (radians, not degrees), but got ",
      margins.masked_select(good.logical_not())[0].item<double>());
}

void check_class_weight_values(const torch::Tensor& class_weight) {
  if (!class_weight.defined() || class_weight.numel() == 0) {
    return;
  }
  const torch::Tensor values = class_weight.detach().to(at::kDouble);
  const torch::Tensor good = values.ge(0).logical_and(values.isfinite()); // false of NaN
  TORCH_CHECK(
      good.all().item<bool>(), "expected class_weight to be finite and not negative, but got ",
      values.masked_select(good.logical_not())[0].item<double>());
}

MarginLossOptions margin_options(const SoftmaxLossOptions& o) {
  return common(o, scaled(presets::softmax(), o.scale())).bias(o.bias());
}

std::vector<SavedNumber> numbers_of(SoftmaxLossOptions& o) {
  return {{"scale", &o.scale()}};
}

MarginLossOptions margin_options(const ModifiedSoftmaxLossOptions& o) {
  return common(o, scaled(presets::modified_softmax(), o.scale()));
}

std::vector<SavedNumber> numbers_of(ModifiedSoftmaxLossOptions& o) {
  return {{"scale", &o.scale()}};
}

MarginLossOptions margin_options(const NormalizedSoftmaxLossOptions& o) {
  return common(o, presets::normalized_softmax(o.scale()));
}

std::vector<SavedNumber> numbers_of(NormalizedSoftmaxLossOptions& o) {
  return {{"scale", &o.scale()}};
}

MarginLossOptions margin_options(const SphereFaceLossOptions& o) {
  check_annealing(o);
  LossForm form = varied(presets::sphereface(o.margin()), o);
  form.normalize_input = o.normalize_input();
  return common(o, form);
}

std::vector<SavedNumber> numbers_of(SphereFaceLossOptions& o) {
  return annealed_numbers(o);
}

MarginLossOptions margin_options(const LargeMarginSoftmaxLossOptions& o) {
  check_annealing(o);
  return common(o, varied(presets::large_margin_softmax(o.margin()), o));
}

std::vector<SavedNumber> numbers_of(LargeMarginSoftmaxLossOptions& o) {
  return annealed_numbers(o);
}

MarginLossOptions margin_options(const CosFaceLossOptions& o) {
  const double margin = one_margin(o, check_cosines("margin", o.margin()));
  return common(o, varied(presets::cosface(o.scale(), margin), o));
}

std::vector<SavedNumber> numbers_of(CosFaceLossOptions& o) {
  return {{"scale", &o.scale()}, {"margin", &o.margin(), &o.class_margins()}};
}

MarginLossOptions margin_options(const ArcFaceLossOptions& o) {
  const double margin = one_margin(o, check_radians("margin", o.margin()));
  return common(o, varied(presets::arcface(o.scale(), margin), o));
}

std::vector<SavedNumber> numbers_of(ArcFaceLossOptions& o) {
  return {{"scale", &o.scale()}, {"margin", &o.margin(), &o.class_margins()}};
}

MarginLossOptions margin_options(const CombinedMarginLossOptions& o) {
  return common(o, varied(presets::combined(o.scale(), o.m1(), check_radians("m2", o.m2()), o.m3()), o));
}

std::vector<SavedNumber> numbers_of(CombinedMarginLossOptions& o) {
  return {{"scale", &o.scale()}, {"m1", &o.m1()}, {"m2", &o.m2()}, {"m3", &o.m3()}};
}

MarginLossOptions margin_options(const AdaFaceLossOptions& o) {
  check_radians("margin", o.margin());
  check_finite("h", o.h());
  TORCH_CHECK(o.momentum() >= 0 && o.momentum() <= 1, "expected momentum in [0, 1], but got ", o.momentum());
  return common(o, published::form<published::AdaFace>(o.scale()));
}

std::vector<SavedNumber> numbers_of(AdaFaceLossOptions& o) {
  return {{"scale", &o.scale()}, {"margin", &o.margin()}, {"h", &o.h()}, {"momentum", &o.momentum()}};
}

MarginLossOptions margin_options(const MagFaceLossOptions& o) {
  TORCH_CHECK(
      0 < o.a_min() && o.a_min() < o.a_max(), "expected 0 < a_min < a_max, but got ", o.a_min(), " and ", o.a_max());
  check_finite("a_max", o.a_max());
  check_radians("m_min", o.m_min());
  check_radians("m_max", o.m_max());
  check_finite("regularizer", o.regularizer());
  return common(o, published::form<published::MagFace>(o.scale()));
}

std::vector<SavedNumber> numbers_of(MagFaceLossOptions& o) {
  return {{"scale", &o.scale()}, {"a_min", &o.a_min()}, {"a_max", &o.a_max()},
          {"m_min", &o.m_min()}, {"m_max", &o.m_max()}, {"regularizer", &o.regularizer()}};
}

MarginLossOptions margin_options(const ElasticFaceLossOptions& o) {
  TORCH_CHECK(o.kind() == "arc" || o.kind() == "cos", "expected kind to be 'arc' or 'cos', but got '", o.kind(), "'");
  TORCH_CHECK(o.deviation() >= 0, "expected deviation not to be negative, but got ", o.deviation());
  check_finite("deviation", o.deviation());
  LossForm form = published::form<published::ElasticFace>(o.scale());
  (o.kind() == "arc" ? form.margin.m2 : form.margin.m3) = check_radians("margin", o.margin());
  return common(o, form);
}

std::vector<SavedNumber> numbers_of(ElasticFaceLossOptions& o) {
  return {{"scale", &o.scale()}, {"margin", &o.margin()}, {"deviation", &o.deviation()}};
}

MarginLossOptions margin_options(const SubCenterArcFaceLossOptions& o) {
  const double margin = one_margin(o, check_radians("margin", o.margin()));
  return common(o, varied(presets::arcface(o.scale(), margin), o));
}

std::vector<SavedNumber> numbers_of(SubCenterArcFaceLossOptions& o) {
  return {{"scale", &o.scale()}, {"margin", &o.margin(), &o.class_margins()}};
}

MarginLossOptions margin_options(const CurricularFaceLossOptions& o) {
  refuse_filter("CurricularFaceLoss", o);
  TORCH_CHECK(o.momentum() >= 0 && o.momentum() <= 1, "expected momentum in [0, 1], but got ", o.momentum());
  LossForm form = published::form<published::CurricularFace>(o.scale());
  form.margin.m2 = check_radians("margin", o.margin());
  return common(o, form);
}

std::vector<SavedNumber> numbers_of(CurricularFaceLossOptions& o) {
  return {{"scale", &o.scale()}, {"margin", &o.margin()}, {"momentum", &o.momentum()}};
}

MarginLossOptions margin_options(const MVSoftmaxLossOptions& o) {
  refuse_filter("MVSoftmaxLoss", o);
  TORCH_CHECK(o.kind() == "am" || o.kind() == "arc", "expected kind to be 'am' or 'arc', but got '", o.kind(), "'");
  check_not_negative("t", o.t());
  LossForm form = published::form<published::MVSoftmax>(o.scale());
  (o.kind() == "arc" ? form.margin.m2 : form.margin.m3) = check_radians("margin", o.margin());
  return common(o, form);
}

std::vector<SavedNumber> numbers_of(MVSoftmaxLossOptions& o) {
  return {{"scale", &o.scale()}, {"margin", &o.margin()}, {"t", &o.t()}};
}

MarginLossOptions margin_options(const InterTopKArcFaceLossOptions& o) {
  refuse_filter("InterTopKArcFaceLoss", o);
  check_radians("hardest_margin", o.hardest_margin());
  LossForm form = published::form<published::InterTopKArcFace>(o.scale());
  form.margin.m2 = check_radians("margin", o.margin());
  return common(o, form).hardest(o.hardest()).hardest_margin(o.hardest() == 0 ? 0.0 : o.hardest_margin());
}

std::vector<SavedNumber> numbers_of(InterTopKArcFaceLossOptions& o) {
  return {{"scale", &o.scale()}, {"margin", &o.margin()}, {"hardest_margin", &o.hardest_margin()}};
}

MarginLossOptions margin_options(const SphereFace2LossOptions& o) {
  refuse_filter("SphereFace2Loss", o);
  check_not_negative("margin", o.margin());
  if (o.kind() == "a") {
    check_radians("margin", o.margin());
  }
  TORCH_CHECK(
      o.positive_weight() >= 0 && o.positive_weight() <= 1, "expected positive_weight in [0, 1], but got ",
      o.positive_weight());
  const OneAgainstAll form{
      .kind = o.kind(),
      .margin = o.margin(),
      .power = o.t(),
      .positive_weight = o.positive_weight(),
      .negative_weight = 1.0 - o.positive_weight()};
  return common(o, published::form<published::SphereFace2>(o.scale())).bias(true).one_against_all(form);
}

std::vector<SavedNumber> numbers_of(SphereFace2LossOptions& o) {
  return {{"scale", &o.scale()}, {"margin", &o.margin()}, {"t", &o.t()}, {"positive_weight", &o.positive_weight()}};
}

MarginLossOptions margin_options(const UniFaceLossOptions& o) {
  refuse_filter("UniFaceLoss", o);
  check_not_negative("margin", o.margin());
  const OneAgainstAll form{
      .kind = "m", .margin = o.margin(), .first_bias = -std::log(10.0 * static_cast<double>(o.num_classes()))};
  return common(o, published::form<published::UniFace>(o.scale())).bias(true).one_against_all(form);
}

std::vector<SavedNumber> numbers_of(UniFaceLossOptions& o) {
  return {{"scale", &o.scale()}, {"margin", &o.margin()}};
}

} // namespace torchmargin::nn
