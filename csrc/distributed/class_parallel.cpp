// class_parallel_cross_entropy and class_parallel_binary_cross_entropy: each rank holds some classes and some rows.
// Labels and rows are gathered; every rank finds partials of all rows among its classes; they go to the ranks that own
// the rows, which merge them to losses. What crosses ranks does not depend on C, and nothing of size B x C exists
// anywhere. docs/distributed.md has the formulas.
//
// The steps are private ops too: torchmargin.distributed.ClassParallel puts hooks of losses and DTensors between them.
#include "distributed/class_parallel.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "distributed/collectives.h"
#include "distributed/merge.h"
#include "ops/binary_cross_entropy.h"
#include "ops/class_weight.h"
#include "ops/cross_entropy.h"
#include "ops/find_op.h"
#include "ops/hard_negatives.h"
#include "ops/problem.h"

namespace torchmargin {
namespace {

constexpr std::string_view kOp = "class_parallel_cross_entropy";
constexpr std::string_view kBinaryOp = "class_parallel_binary_cross_entropy";

Group make_group(int64_t size, std::string_view name) {
  TORCH_CHECK(size > 0, "class_parallel: expected group_size to be positive, but got ", size);
  return {std::string(name), size};
}

at::Tensor gather_rows_op(
    const at::Tensor& rows,
    int64_t rows_per_rank,
    at::ScalarType dtype,
    double grad_scale,
    int64_t group_size,
    std::string_view group_name) {
  TORCH_CHECK(
      rows.dim() > 0 && rows.size(0) <= rows_per_rank, "_gather_rows: expected at most ", rows_per_rank,
      " rows, but got shape ", rows.sizes());
  return gather_rows(rows, rows_per_rank, dtype, grad_scale, make_group(group_size, group_name));
}

at::Tensor gather_labels_op(
    const at::Tensor& labels,
    std::optional<int64_t> max_rows,
    int64_t ignore_index,
    bool refused,
    int64_t group_size,
    std::string_view group_name) {
  return gather_labels(labels, max_rows, ignore_index, refused, make_group(group_size, group_name));
}

std::vector<at::Tensor>
exchange_partials_op(at::TensorList partials, int64_t differentiable, int64_t group_size, std::string_view group_name) {
  TORCH_CHECK(
      !partials.empty() && differentiable >= 0 && differentiable <= static_cast<int64_t>(partials.size()),
      "_exchange_partials: expected partials, the first of them differentiable, but got ", partials.size(), " and ",
      differentiable);
  return exchange_partials(partials.vec(), differentiable, make_group(group_size, group_name));
}

at::Tensor global_sum_op(const at::Tensor& value, int64_t group_size, std::string_view group_name) {
  return global_sum(value, make_group(group_size, group_name));
}

at::Tensor check_labels(const at::Tensor& labels, int64_t num_classes, int64_t ignore_index, int64_t group_size) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, int64_t, int64_t, int64_t)>("torchmargin::_checked_labels");
  return op.call(labels, num_classes, ignore_index, group_size);
}

// Of weights that have passed the problem's gate.
void check_blocks(
    std::string_view op,
    at::TensorList weights,
    at::IntArrayRef starts,
    int64_t num_classes,
    int64_t sub_centers) {
  TORCH_CHECK(num_classes > 0, op, ": expected num_classes to be positive, but got ", num_classes);
  TORCH_CHECK(!weights.empty(), op, ": expected at least one weight, which may hold no class, but got none");
  TORCH_CHECK(
      starts.size() == weights.size(), op, ": expected class_starts to hold the first class of each of ",
      weights.size(), " weights, but got ", starts);
  const auto classes = [&](size_t i) { return weights[i].size(0) / sub_centers; };
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t end = starts[i] + classes(i);
    TORCH_CHECK(
        starts[i] >= 0 && end <= num_classes, op, ": expected weights to hold classes in [0, ", num_classes,
        "), but got classes ", starts[i], " to ", end, " in weight ", i);
    for (size_t j = 0; j < i; ++j) {
      TORCH_CHECK(
          end <= starts[j] || starts[i] >= starts[j] + classes(j) || end == starts[i] || classes(j) == 0, op,
          ": expected each class once, but got weights ", j, " and ", i, " that start at classes ", starts[j], " and ",
          starts[i], " with ", classes(j), " and ", classes(i), " classes");
    }
  }
}

// Narrow rows before float32 weights travel as they are and are widened after.
bool widens(const at::Tensor& input, const at::Tensor& weight) {
  return (input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16) &&
      weight.scalar_type() == at::kFloat;
}

// This rank's rows in the dtype that its weights meet them in, for a gate.
at::Tensor widened(const at::Tensor& input, const at::Tensor& weight) {
  const at::NoGradGuard no_grad;
  return widens(input, weight) ? input.to(at::kFloat) : input;
}

// The lowest precision allowed for the products, where the caller says nothing.
std::optional<at::ScalarType>
lowest_dtype(const at::Tensor& input, const at::Tensor& weight, std::optional<at::ScalarType> compute_dtype) {
  return !compute_dtype.has_value() && widens(input, weight) ? std::optional<at::ScalarType>(input.scalar_type())
                                                             : compute_dtype;
}

// The gates: of this rank's arguments, before anything is sent.
CrossEntropyOptions check(TORCHMARGIN_CLASS_PARALLEL_PARAMETERS) {
  const CrossEntropyOptions options = make_cross_entropy_options(kOp, TORCHMARGIN_LOSS_ARGUMENTS);
  TORCH_CHECK(
      !biases.has_value() || biases->size() == weights.size(), kOp, ": expected a bias for each of ", weights.size(),
      " weights, but got ", biases->size());
  check_given(kOp, "input", input);
  for (size_t i = 0; i < weights.size(); ++i) {
    check_given(kOp, "weights", weights[i]);
    const LinearProblem problem = make_linear_problem(
        kOp, widened(input, weights[i]), weights[i], target,
        biases.has_value() ? std::optional<at::Tensor>((*biases)[i]) : std::nullopt, TORCHMARGIN_MARGINS_ARGUMENTS,
        normalize_input, normalize_weight, compute_dtype, sub_centers, hard_threshold, hard_coefficients, hardest);
    check_hardest_margin(kOp, problem, hardest_margin);
  }
  check_blocks(kOp, weights, class_starts, num_classes, sub_centers);
  check_class_weight(kOp, class_weight, input, num_classes, label_smoothing);
  return options;
}

CrossEntropyOptions check(TORCHMARGIN_CLASS_PARALLEL_BINARY_PARAMETERS) {
  check_given(kBinaryOp, "input", input);
  for (const at::Tensor& weight : weights) {
    check_given(kBinaryOp, "weights", weight);
    make_binary_problem(kBinaryOp, widened(input, weight), weight, target, TORCHMARGIN_BINARY_OPTION_ARGUMENTS);
  }
  check_blocks(kBinaryOp, weights, class_starts, num_classes, sub_centers);
  check_class_weight(kBinaryOp, class_weight, input, num_classes, /*label_smoothing=*/0.0);
  return make_cross_entropy_options(kBinaryOp, /*label_smoothing=*/0.0, ignore_index, reduction, class_weight);
}

// Labels and rows of all ranks.
struct GatheredRows {
  CrossEntropyOptions options;
  Group group;
  at::Tensor labels; // [R n]
  at::Tensor rows; // [R n, D]
  int64_t rows_per_rank;
};

// `check` judges this rank's arguments: what it throws all ranks throw, or that this one has refused.
template <typename Check>
GatheredRows gather(
    std::string_view op,
    const Group& group,
    const at::Tensor& input,
    at::TensorList weights,
    const at::Tensor& target,
    int64_t num_classes,
    int64_t ignore_index,
    TORCHMARGIN_ROWS_OF_RANKS_PARAMETERS,
    const Check& check) {
  TORCH_CHECK(!max_rows.has_value() || *max_rows > 0, op, ": expected max_rows to be positive, but got ", *max_rows);
  CrossEntropyOptions options{};
  try {
    options = check();
  } catch (...) { // the other ranks must not wait for this one
    const at::Tensor like = input.defined() ? input : at::empty({0});
    wait_tensor(gather_labels(like, max_rows, ignore_index, /*refused=*/true, group));
    throw;
  }
  const at::Tensor labels = check_labels(
      wait_tensor(gather_labels(target, max_rows, ignore_index, /*refused=*/false, group)), num_classes, ignore_index,
      group.size);
  const int64_t rows_per_rank = labels.size(0) / group.size;
  const at::Tensor rows = gather_rows(input, rows_per_rank, weights[0].scalar_type(), input_grad_scale, group);
  return {options, group, labels, rows, rows_per_rank};
}

// The loss of all ranks from the losses [B] float64 of this rank's rows. All ranks have the same weights of classes.
at::Tensor reduced(const at::Tensor& row_losses, const at::Tensor& target, const GatheredRows& all) {
  const auto& class_weight = all.options.class_weight;
  const auto weights = [&](const at::Tensor& labels) {
    return row_weights(*class_weight, labels, all.options.ignore_index);
  };
  const at::Tensor losses = class_weight.has_value() ? weights(target) * row_losses : row_losses;
  const at::ScalarType acc = acc_dtype(all.rows.scalar_type());
  if (all.options.reduction == Reduction::none) {
    return losses.to(acc);
  }
  at::Tensor value = losses.sum();
  if (all.options.reduction == Reduction::mean) {
    const at::Tensor counts = class_weight.has_value() ? weights(all.labels) : all.labels.ne(all.options.ignore_index);
    value = value / counts.sum();
  }
  return global_sum(value, all.group).to(acc);
}

// Numbers of this rank's rows, as those of all rows: float64 columns that travel as one. What is the same for all rows
// is the same on all ranks.
struct GatheredNumbers {
  Margins margins;
  std::optional<at::Tensor> hard_threshold;
  std::optional<at::Tensor> hard_coefficients;
};

GatheredNumbers gather_numbers(const GatheredNumbers& own, double grad_scale, const GatheredRows& all) {
  GatheredNumbers numbers = own;
  Margins& margins = numbers.margins;
  std::vector<at::Tensor> columns;
  std::vector<std::optional<at::Tensor>*> places;
  for (auto* of_row :
       {&margins.sample_m2, &margins.sample_m3, &margins.sample_margin_weight, &numbers.hard_threshold}) {
    if (of_row->has_value() && (*of_row)->dim() == 1) {
      columns.push_back((*of_row)->to(at::kDouble).unsqueeze(1));
      places.push_back(of_row);
    }
  }
  if (numbers.hard_coefficients.has_value() && numbers.hard_coefficients->dim() == 2) {
    columns.push_back(numbers.hard_coefficients->to(at::kDouble));
    places.push_back(&numbers.hard_coefficients);
  }
  if (!columns.empty()) {
    const at::Tensor gathered = gather_rows(at::cat(columns, 1), all.rows_per_rank, at::kDouble, grad_scale, all.group);
    int64_t first = 0;
    for (size_t i = 0; i < places.size(); ++i) {
      const int64_t width = columns[i].size(1);
      const at::Tensor of_rows = gathered.narrow(1, first, width);
      *places[i] = width == 1 ? of_rows.squeeze(1) : of_rows;
      first += width;
    }
  }
  for (auto* constant : {&margins.sample_margin_weight, &numbers.hard_threshold, &numbers.hard_coefficients}) {
    if (constant->has_value()) {
      *constant = (*constant)->detach();
    }
  }
  return numbers;
}

// The angle of each row to its class, which one of the ranks holds, [R n] float64.
at::Tensor
angle_to_own_class(at::TensorList weights, at::IntArrayRef class_starts, int64_t sub_centers, const GatheredRows& all) {
  static const auto angle_of = find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t)>(
      "torchmargin::_linear_target_angle");
  const at::NoGradGuard no_grad;
  at::Tensor angle = at::zeros_like(all.labels, at::kDouble);
  for (size_t i = 0; i < weights.size(); ++i) {
    angle += angle_of.call(all.rows, weights[i], all.labels - class_starts[i], sub_centers);
  }
  return all_reduce(angle, "sum", all.group);
}

at::Tensor class_parallel_cross_entropy(TORCHMARGIN_CLASS_PARALLEL_PARAMETERS) {
  static const auto partials_of =
      find_op<PartialsTuple(TORCHMARGIN_LINEAR_PARAMETERS, TORCHMARGIN_PARTIALS_PARAMETERS)>(
          "torchmargin::_linear_margin_partials");
  const GatheredRows all = gather(
      kOp, make_group(group_size, group_name), input, weights, target, num_classes, ignore_index,
      TORCHMARGIN_ROWS_OF_RANKS_ARGUMENTS, [&] { return check(TORCHMARGIN_CLASS_PARALLEL_ARGUMENTS); });
  GatheredNumbers of_rows{};
  of_rows.margins.parameters.m1 = m1;
  of_rows.margins.parameters.m2 = m2;
  of_rows.margins.parameters.m3 = m3;
  of_rows.margins.sample_m2 = defined(sample_m2);
  of_rows.margins.sample_m3 = defined(sample_m3);
  of_rows.margins.sample_margin_weight = defined(sample_margin_weight);
  of_rows.hard_threshold = defined(hard_threshold);
  of_rows.hard_coefficients = defined(hard_coefficients);
  GatheredNumbers numbers = gather_numbers(of_rows, input_grad_scale, all);
  const Margins& margins = numbers.margins;
  if (numbers.hard_coefficients.has_value() && !numbers.hard_threshold.has_value()) {
    const at::NoGradGuard no_grad;
    numbers.hard_threshold = plain_margin(margins, angle_to_own_class(weights, class_starts, sub_centers, all));
  }

  const bool smoothed = label_smoothing > 0;
  const auto lowest = lowest_dtype(input, weights[0], compute_dtype);
  std::vector<at::Tensor> other_lse;
  std::vector<at::Tensor> target_logit;
  std::vector<at::Tensor> logit_sum;
  std::vector<at::Tensor> hardest_logit;
  std::vector<at::Tensor> hardest_class;
  for (size_t i = 0; i < weights.size(); ++i) {
    auto [o, t, z, angle, largest, plain, hard_logit, hard_class] = partials_of.call(
        all.rows, weights[i], all.labels - class_starts[i],
        biases.has_value() ? std::optional<at::Tensor>((*biases)[i]) : std::nullopt, scale, m1, m2, m3,
        margins.sample_m2, margins.sample_m3, margins.sample_margin_weight, extension, margin_weight, margin_gradient,
        normalize_input, normalize_weight, lowest, sub_centers, numbers.hard_threshold, numbers.hard_coefficients,
        hardest, /*with_logit_sum=*/smoothed, /*with_plain_logit=*/false, static_cast<int64_t>(weights.size()));
    other_lse.push_back(o);
    target_logit.push_back(t);
    logit_sum.push_back(z);
    hardest_logit.push_back(hard_logit);
    hardest_class.push_back(at::where(hard_class.ge(0), hard_class + class_starts[i], hard_class));
  }
  const auto stacked = [](bool wanted, const std::vector<at::Tensor>& parts) {
    return wanted ? at::stack(parts) : at::Tensor();
  };
  const bool ranked = hardest > 0;
  const Partials here = merge(
      {at::stack(other_lse), at::stack(target_logit), stacked(smoothed, logit_sum), stacked(ranked, hardest_logit),
       stacked(ranked, hardest_class)});
  std::vector<at::Tensor> sent{here.other_lse, here.target_logit};
  if (smoothed) {
    sent.push_back(here.logit_sum);
  }
  const auto first_hardest = static_cast<std::ptrdiff_t>(sent.size());
  int64_t differentiable = static_cast<int64_t>(sent.size());
  if (ranked) {
    for (const at::Tensor& part : {here.hardest_logit, here.hardest_class.to(at::kDouble)}) {
      const std::vector<at::Tensor> columns = part.unbind(1);
      sent.insert(sent.end(), columns.begin(), columns.end());
    }
    differentiable += hardest;
  }
  const std::vector<at::Tensor> found = exchange_partials(sent, differentiable, all.group);
  Partials shards{found[0], found[1], smoothed ? found[2] : at::Tensor()};
  if (ranked) {
    const auto logits = found.begin() + first_hardest;
    shards.hardest_logit = at::stack(std::vector<at::Tensor>(logits, logits + hardest), 2);
    shards.hardest_class = at::stack(std::vector<at::Tensor>(logits + hardest, found.end()), 2).to(at::kLong);
  }
  const Partials merged = merge(shards);
  const int64_t own = input.size(0);
  const auto of_own = [own](const at::Tensor& rows) { return rows.defined() ? rows.narrow(0, 0, own) : rows; };
  OtherSums sums{of_own(merged.other_lse), of_own(merged.logit_sum)};
  if (ranked) {
    if (!sums.logit_sum.defined()) {
      sums.logit_sum = at::zeros({own}, found[0].options());
    }
    sums = with_hardest(sums, of_own(merged.hardest_logit), scale, hardest_margin);
  }
  const at::Tensor losses = cross_entropy(
      sums.other_lse, of_own(merged.target_logit), sums.logit_sum, target, num_classes, at::kDouble,
      {label_smoothing, ignore_index, Reduction::none, /*class_weight=*/std::nullopt});
  return reduced(losses, target, all);
}

at::Tensor class_parallel_binary_cross_entropy(TORCHMARGIN_CLASS_PARALLEL_BINARY_PARAMETERS) {
  static const auto partials_of =
      find_op<PartialsTuple(TORCHMARGIN_BINARY_PARAMETERS, int64_t)>("torchmargin::_linear_margin_binary_partials");
  const GatheredRows all = gather(
      kBinaryOp, make_group(group_size, group_name), input, weights, target, num_classes, ignore_index,
      TORCHMARGIN_ROWS_OF_RANKS_ARGUMENTS, [&] { return check(TORCHMARGIN_CLASS_PARALLEL_BINARY_ARGUMENTS); });
  std::optional<at::Tensor> shared_bias = defined(bias);
  if (shared_bias.has_value()) {
    shared_bias = shared_by_ranks(*shared_bias, all.group);
  }
  const auto lowest = lowest_dtype(input, weights[0], compute_dtype);
  std::vector<at::Tensor> other_sum;
  std::vector<at::Tensor> target_logit;
  for (size_t i = 0; i < weights.size(); ++i) {
    const PartialsTuple partials = partials_of.call(
        all.rows, weights[i], all.labels - class_starts[i], shared_bias, scale, margin, kind, power, positive_weight,
        negative_weight, sub_centers, lowest, ignore_index, reduction, require_target, /*class_weight=*/std::nullopt,
        static_cast<int64_t>(weights.size()));
    other_sum.push_back(std::get<0>(partials));
    target_logit.push_back(std::get<1>(partials));
  }
  const std::vector<at::Tensor> found =
      exchange_partials({at::stack(other_sum).sum(0), at::stack(target_logit).sum(0)}, /*differentiable=*/2, all.group);
  const auto of_own = [&](const at::Tensor& shards) { return shards.sum(0).narrow(0, 0, input.size(0)); };
  const at::Tensor losses = binary_losses(
      of_own(found[0]), of_own(found[1]), target, num_classes,
      {.positive_weight = positive_weight, .negative_weight = negative_weight, .ignore_index = ignore_index});
  return reduced(losses, target, all);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor>
merge_hardest_op(const at::Tensor& other_lse, const at::Tensor& hardest_logit, const at::Tensor& hardest_class) {
  const Hardest merged = merge_hardest({other_lse, hardest_logit, hardest_class});
  return {merged.other_lse, merged.logit, merged.classes};
}

at::Tensor shared_by_ranks_op(const at::Tensor& value, int64_t group_size, std::string_view group_name) {
  return shared_by_ranks(value, make_group(group_size, group_name));
}

at::Tensor checked_labels_meta(
    const at::Tensor& labels,
    int64_t /*num_classes*/,
    int64_t /*ignore_index*/,
    int64_t /*group_size*/) {
  return at::empty_like(labels);
}

TORCH_LIBRARY_FRAGMENT(torchmargin, library) {
  library.def("class_parallel_cross_entropy(" TORCHMARGIN_CLASS_PARALLEL_SCHEMA ") -> Tensor");
  library.def("class_parallel_binary_cross_entropy(" TORCHMARGIN_CLASS_PARALLEL_BINARY_SCHEMA ") -> Tensor");
  // Private: their steps. See distributed/collectives.h and merge.h.
  library.def(
      "_gather_rows(Tensor rows, int rows_per_rank, ScalarType dtype, float grad_scale, int group_size, str "
      "group_name) "
      "-> Tensor");
  library.def(
      "_gather_labels(Tensor labels, int? max_rows, int ignore_index, bool refused, int group_size, str group_name) -> "
      "Tensor");
  // Labels of all ranks, those of each rank in one piece: a copy of them, or the same error on every rank.
  library.def("_checked_labels(Tensor labels, int num_classes, int ignore_index, int group_size) -> Tensor");
  library.def("_merge_lse(Tensor other_lse) -> Tensor");
  library.def(
      "_merge_hardest(Tensor other_lse, Tensor hardest_logit, Tensor hardest_class) -> (Tensor, Tensor, Tensor)");
  library.def("_shared_by_ranks(Tensor value, int group_size, str group_name) -> Tensor");
  library.def("_exchange_partials(Tensor[] partials, int differentiable, int group_size, str group_name) -> Tensor[]");
  library.def("_global_sum(Tensor value, int group_size, str group_name) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchmargin, CompositeImplicitAutograd, library) {
  library.impl("class_parallel_cross_entropy", class_parallel_cross_entropy);
  library.impl("class_parallel_binary_cross_entropy", class_parallel_binary_cross_entropy);
  library.impl("_merge_hardest", merge_hardest_op);
  library.impl("_shared_by_ranks", shared_by_ranks_op);
  library.impl("_gather_rows", gather_rows_op);
  library.impl("_gather_labels", gather_labels_op);
  library.impl("_merge_lse", merge_lse);
  library.impl("_exchange_partials", exchange_partials_op);
  library.impl("_global_sum", global_sum_op);
}

TORCH_LIBRARY_IMPL(torchmargin, Meta, library) {
  library.impl("_checked_labels", checked_labels_meta);
}

} // namespace
} // namespace torchmargin
