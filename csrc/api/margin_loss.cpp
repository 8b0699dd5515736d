// A call of a loss module: its options, what the hooks give, the op. And initial weights, and how it prints.
#include "torchmargin/margin_loss.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/nn/init.h>

#include <limits>
#include <tuple>

#include "api/loss_options.h"
#include "ops/checks.h"
#include "ops/class_weight.h"
#include "ops/find_op.h"
#include "ops/margins.h"

namespace torchmargin::nn {
namespace {

constexpr int64_t kSteps = 64; // how many steps a recompute may look back

functional::LinearMarginCrossEntropyFuncOptions
call_options(const MarginLossOptions& options, const torch::Tensor& bias, const SampleMargins& margins) {
  functional::LinearMarginFuncOptions linear(options.form());
  if (bias.defined()) {
    linear.bias(bias);
  }
  linear.sample_m2(margins.m2).sample_m3(margins.m3).sample_margin_weight(margins.margin_weight);
  linear.sub_centers(options.sub_centers()).hardest(options.hardest()).hardest_margin(options.hardest_margin());
  functional::LinearMarginCrossEntropyFuncOptions all(linear);
  all.label_smoothing(options.label_smoothing());
  all.ignore_index(options.ignore_index());
  all.reduction(options.reduction());
  all.class_weight(options.class_weight());
  return all;
}

// 16-bit embeddings beside a float32 weight, by the rule that autocast has: the embeddings are widened, and their dtype
// is the lowest precision allowed for the products. Everything else is the op's business.
std::tuple<torch::Tensor, std::optional<torch::Dtype>> widened(
    const torch::Tensor& embeddings,
    const torch::Tensor& weight) {
  const bool narrow = embeddings.defined() && weight.defined() && weight.scalar_type() == at::kFloat &&
      (embeddings.scalar_type() == at::kHalf || embeddings.scalar_type() == at::kBFloat16);
  if (!narrow || at::autocast::is_autocast_enabled(embeddings.device().type())) {
    return {embeddings, std::nullopt};
  }
  return {embeddings.to(at::kFloat), embeddings.scalar_type()};
}

// What the hooks may be given. Anything else goes to the op without them, which says what is wrong with it.
bool is_batch(const torch::Tensor& embeddings, const torch::Tensor& labels, const torch::Tensor& weight) {
  return embeddings.defined() && labels.defined() && weight.defined() && embeddings.is_floating_point() &&
      embeddings.dim() == 2 && labels.scalar_type() == at::kLong && labels.dim() == 1 &&
      labels.size(0) == embeddings.size(0) && embeddings.device() == weight.device() &&
      labels.device() == weight.device();
}

// Numbers that a batch has again, bit for bit, when its forward is run again.
torch::Tensor key_of(const torch::Tensor& embeddings, const torch::Tensor& labels) {
  const int64_t rows = labels.size(0);
  const torch::Tensor x = at::nan_to_num(embeddings.detach(), 0.0, 0.0, 0.0);
  const torch::Tensor places = at::arange(1, rows + 1, labels.options().dtype(at::kDouble)) / rows;
  return at::stack(
      {(x.sum(at::IntArrayRef{1}, /*keepdim=*/false, at::kDouble) * places).sum(), x.abs().sum(at::kDouble),
       (labels * places).sum(), at::full({}, static_cast<double>(rows), places.options())});
}

torch::Tensor reduced(const torch::Tensor& penalty, const torch::Tensor& labels, const MarginLossOptions& options) {
  const torch::Tensor valid = labels != options.ignore_index();
  const torch::Tensor rows = at::where(valid, penalty, at::zeros({}, penalty.options()));
  if (const torch::Tensor& class_weight = options.class_weight(); class_weight.defined()) {
    const CrossEntropyOptions of_rows =
        make_cross_entropy_options("row_penalty", /*label_smoothing=*/0.0, options.ignore_index(), options.reduction());
    return weighted_loss(rows, class_weight, labels, options.ignore_index(), of_rows.reduction)
        .to(penalty.scalar_type());
  }
  if (options.reduction() == "none") {
    return rows;
  }
  return options.reduction() == "mean" ? rows.sum() / valid.sum() : rows.sum();
}

} // namespace

// The state during one call: moved by `advance`, or, where a backward pass runs the forward again, what it was then.
// When the call is over it is what a step leaves behind: nothing if it was no step, or if `done` was not reached.
class MarginLossBase::Step {
 public:
  Step(MarginLossBase& loss, const torch::Tensor& embeddings, const torch::Tensor& labels) : state_(loss.state()) {
    for (const torch::Tensor& tensor : state_) {
      before_.push_back(tensor.clone());
    }
    try {
      move(loss, embeddings, labels);
    } catch (...) {
      put_back();
      throw;
    }
  }
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;
  ~Step() {
    if (!done_ || again_) {
      try {
        put_back();
      } catch (...) { // the device has failed, as the call itself says
      }
    }
  }

  void done() {
    done_ = true;
  }

 private:
  void move(MarginLossBase& loss, const torch::Tensor& embeddings, const torch::Tensor& labels) {
    const at::NoGradGuard no_grad;
    loss.advance(embeddings, labels);
    if (state_.empty()) {
      return;
    }
    static const auto op =
        find_op<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&)>(
            "torchmargin::_recall_state");
    std::vector<torch::Tensor> values;
    for (const torch::Tensor& tensor : state_) {
      values.push_back(tensor.to(at::kDouble));
    }
    const torch::Tensor key = key_of(embeddings, labels);
    const int64_t columns = key.size(0) + 1 + static_cast<int64_t>(values.size());
    if (!loss.log_.defined() || loss.log_.device() != key.device() || loss.log_.size(1) != columns) {
      loss.log_ = at::full({kSteps, columns}, std::numeric_limits<double>::infinity(), key.options());
    }
    const auto [then, fresh] = op.call(loss.log_, key, at::stack(values));
    // As the op sees it, and without waiting for a device to say so.
    again_ = torch::autograd::get_current_graph_task_id() != -1;
    for (size_t i = 0; again_ && i < state_.size(); ++i) {
      state_[i].copy_(then[static_cast<int64_t>(i)]);
    }
  }

  void put_back() {
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < state_.size(); ++i) {
      state_[i].copy_(before_[i]);
    }
  }

  std::vector<torch::Tensor> state_, before_;
  bool again_ = false;
  bool done_ = false;
};

MarginLossBase::MarginLossBase(const MarginLossOptions& options) : own_options_(options) {
  check_options(options);
}

MarginLossBase::~MarginLossBase() = default;

void MarginLossBase::reset_parameters() {
  torch::nn::init::xavier_uniform_(weight);
  if (bias.defined()) {
    const auto binary = margin_loss_options().one_against_all();
    torch::nn::init::constant_(bias, binary.has_value() ? binary->first_bias : 0.0);
  }
}

torch::Tensor MarginLossBase::logits(const torch::Tensor& embeddings) const {
  const MarginLossOptions options = present_options();
  const MarginParameters& margin = options.form().margin;
  // The margin does not count here, but a bad one is bad.
  check_parameters("margin_logits", margin);
  MarginParameters plain;
  plain.scale = margin.scale;
  const auto [input, lowest] = widened(embeddings, weight);
  functional::LinearMarginFuncOptions linear = call_options(options, bias, {}).linear();
  linear.compute_dtype(lowest).hardest(0).hardest_margin(0.0);
  if (const auto binary = options.one_against_all(); binary.has_value()) {
    const torch::Tensor cosines =
        functional::margin_logits(input, weight, std::nullopt, linear.margin({}).bias(std::nullopt));
    const torch::Tensor curve =
        binary->power == 1.0 ? cosines : 2 * ((cosines + 1) / 2).clamp_min(0).pow(binary->power) - 1;
    return plain.scale * curve + bias.to(curve.scalar_type());
  }
  return functional::margin_logits(input, weight, std::nullopt, linear.margin(plain));
}

std::pair<torch::Tensor, MarginStatistics>
MarginLossBase::call(const torch::Tensor& embeddings, const torch::Tensor& labels, bool with_statistics) {
  MarginLossOptions options = present_options();
  options.class_weight(known_class_weight(options.class_weight()));
  const auto [input, lowest] = widened(embeddings, weight);
  const bool hooked = is_batch(input, labels, weight);
  std::optional<Step> step;
  if (hooked && module().is_training()) {
    step.emplace(*this, input, labels);
  }
  std::pair<torch::Tensor, MarginStatistics> result = call_op(options, input, labels, lowest, hooked, with_statistics);
  if (hooked) {
    if (const torch::Tensor penalty = row_penalty(input, labels); penalty.defined()) {
      result.first = result.first + reduced(penalty, labels, options);
    }
  }
  if (step.has_value()) {
    step->done();
  }
  return result;
}

std::pair<torch::Tensor, MarginStatistics> MarginLossBase::call_op(
    const MarginLossOptions& options,
    const torch::Tensor& input,
    const torch::Tensor& labels,
    std::optional<torch::Dtype> lowest,
    bool hooked,
    bool with_statistics) {
  if (options.one_against_all().has_value()) {
    const functional::LinearMarginBinaryCrossEntropyFuncOptions binary =
        binary_options(options).bias(bias).compute_dtype(lowest).require_target(true).class_weight(
            options.class_weight());
    if (with_statistics) {
      return functional::linear_margin_binary_cross_entropy_with_statistics(input, weight, labels, binary);
    }
    return {functional::linear_margin_binary_cross_entropy(input, weight, labels, binary), {}};
  }
  functional::LinearMarginCrossEntropyFuncOptions all =
      call_options(options, bias, hooked ? sample_margins(input, labels) : SampleMargins{});
  all.linear().compute_dtype(lowest);
  if (hooked) {
    const HardNegatives hard = negatives(input, labels);
    all.linear().hard_threshold(hard.threshold).hard_coefficients(hard.coefficients);
  }
  if (with_statistics) {
    return functional::linear_margin_cross_entropy_with_statistics(input, weight, labels, all);
  }
  return {functional::linear_margin_cross_entropy(input, weight, labels, all), {}};
}

torch::Tensor MarginLossBase::known_class_weight(const torch::Tensor& given) {
  // Looked at and moved when it is new, not in every call. NB: an inference tensor has no version.
  const int64_t version = given.defined() && !given.is_inference() ? given._version() : -1;
  if (!given.defined() || !class_weight_.given.is_same(given) || version < 0 || class_weight_.version != version ||
      class_weight_.here.device() != weight.device()) {
    check_class_weight_values(given);
    class_weight_ = {given, given.defined() ? given.to(weight.device()) : given, version};
  }
  return class_weight_.here;
}

HardNegatives MarginLossBase::negatives(const torch::Tensor& /*embeddings*/, const torch::Tensor& /*labels*/) {
  const std::optional<double> filter = margin_loss_options().interclass_filter();
  if (!filter.has_value()) {
    return {};
  }
  const auto wide = weight.options().dtype(at::kDouble).requires_grad(false);
  return {at::full({}, *filter, wide), at::zeros({3}, wide)};
}

torch::Tensor MarginLossBase::target_angle(const torch::Tensor& embeddings, const torch::Tensor& labels) const {
  return functional::linear_target_angle(embeddings, weight, labels, margin_loss_options().sub_centers());
}

MarginLossOptions MarginLossBase::margin_loss_options() const {
  return own_options_;
}

MarginLossOptions& MarginLossBase::own_options() {
  return own_options_;
}

torch::Dtype MarginLossBase::acc_dtype() const {
  return torchmargin::acc_dtype(weight.scalar_type());
}

void MarginLossBase::advance(const torch::Tensor& /*embeddings*/, const torch::Tensor& /*labels*/) {}

SampleMargins MarginLossBase::sample_margins(const torch::Tensor& /*embeddings*/, const torch::Tensor& /*labels*/) {
  return {};
}

torch::Tensor MarginLossBase::row_penalty(const torch::Tensor& /*embeddings*/, const torch::Tensor& /*labels*/) {
  return {};
}

const torch::nn::Module& MarginLossBase::module() const {
  return const_cast<MarginLossBase*>(this)->module(); // changes nothing
}

void MarginLossBase::print(std::ostream& stream) const {
  const MarginLossOptions options = present_options();
  const MarginParameters& margin = options.form().margin;
  stream << module().name() << "(in_features=" << options.in_features() << ", num_classes=" << options.num_classes()
         << ", scale=" << margin.scale << ", m1=" << margin.m1 << ", m2=" << margin.m2 << ", m3=" << margin.m3;
  for (const SavedNumber& number : saved_numbers()) {
    if (number.per_class != nullptr && number.per_class->defined()) {
      stream << ", " << number.name << "=one of each class";
    } else if (number.name != "scale" && number.name != "m1" && number.name != "m2" && number.name != "m3") {
      stream << ", " << number.name << "=" << *number.value;
    }
  }
  stream << ", extension='" << extension_name(margin.extension) << "', margin_gradient='"
         << margin_gradient_name(margin.margin_gradient) << "', label_smoothing=" << options.label_smoothing()
         << ", ignore_index=" << options.ignore_index() << ", reduction='" << options.reduction()
         << "', bias=" << (options.bias() ? "true" : "false")
         << (options.class_weight().defined() ? ", class_weight=one of each class)" : ")");
}

} // namespace torchmargin::nn
