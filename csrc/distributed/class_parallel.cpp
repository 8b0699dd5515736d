// class_parallel_cross_entropy: each rank holds some classes and some rows. Labels and rows are gathered; every rank
// finds partials of all rows among its classes; they go to the ranks that own the rows, which merge them to losses.
// What crosses ranks does not depend on C, and nothing of size B x C exists anywhere. docs/distributed.md has the
// formulas.
//
// The steps are private ops too: torchmargin.distributed.ClassParallel puts hooks of losses and DTensors between them.
#include "distributed/class_parallel.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "distributed/collectives.h"
#include "distributed/merge.h"
#include "ops/cross_entropy.h"
#include "ops/find_op.h"
#include "ops/problem.h"

namespace torchmargin {
namespace {

constexpr std::string_view kOp = "class_parallel_cross_entropy";

Group make_group(int64_t size, std::string_view name) {
  TORCH_CHECK(size > 0, kOp, ": expected group_size to be positive, but got ", size);
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

void check_blocks(at::TensorList weights, at::IntArrayRef starts, int64_t num_classes, size_t biases) {
  TORCH_CHECK(num_classes > 0, kOp, ": expected num_classes to be positive, but got ", num_classes);
  TORCH_CHECK(!weights.empty(), kOp, ": expected at least one weight, which may hold no class, but got none");
  TORCH_CHECK(
      starts.size() == weights.size(), kOp, ": expected class_starts to hold the first class of each of ",
      weights.size(), " weights, but got ", starts);
  TORCH_CHECK(
      biases == 0 || biases == weights.size(), kOp, ": expected a bias for each of ", weights.size(),
      " weights, but got ", biases);
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t end = starts[i] + (weights[i].dim() > 0 ? weights[i].size(0) : 0);
    TORCH_CHECK(
        starts[i] >= 0 && end <= num_classes, kOp, ": expected weights to hold classes in [0, ", num_classes,
        "), but got classes ", starts[i], " to ", end, " in weight ", i);
    for (size_t j = 0; j < i; ++j) {
      TORCH_CHECK(
          end <= starts[j] || starts[i] >= starts[j] + weights[j].size(0) || end == starts[i] ||
              weights[j].size(0) == 0,
          kOp, ": expected each class once, but got weights ", j, " and ", i, " that start at classes ", starts[j],
          " and ", starts[i], " with ", weights[j].size(0), " and ", end - starts[i], " classes");
    }
  }
}

// Narrow rows before float32 weights travel as they are and are widened after.
bool widens(const at::Tensor& input, const at::Tensor& weight) {
  return (input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16) &&
      weight.scalar_type() == at::kFloat;
}

// The gate: of this rank's arguments, before anything is sent.
CrossEntropyOptions check(TORCHMARGIN_CLASS_PARALLEL_PARAMETERS) {
  const CrossEntropyOptions options = make_cross_entropy_options(kOp, label_smoothing, ignore_index, reduction);
  check_blocks(weights, class_starts, num_classes, biases.has_value() ? biases->size() : 0);
  check_given(kOp, "input", input);
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < weights.size(); ++i) {
    check_given(kOp, "weights", weights[i]);
    make_linear_problem(
        kOp, widens(input, weights[i]) ? input.to(at::kFloat) : input, weights[i], target,
        biases.has_value() ? std::optional<at::Tensor>((*biases)[i]) : std::nullopt, TORCHMARGIN_MARGINS_ARGUMENTS,
        normalize_input, normalize_weight, compute_dtype, /*sub_centers=*/1, /*hard_threshold=*/std::nullopt,
        /*hard_coefficients=*/std::nullopt);
  }
  return options;
}

// Margins of this rank's rows, as those of all rows: float64 columns that travel as one.
struct GatheredMargins {
  std::optional<at::Tensor> sample_m2;
  std::optional<at::Tensor> sample_m3;
  std::optional<at::Tensor> sample_margin_weight;
};

GatheredMargins gather_margins(
    const std::optional<at::Tensor>& sample_m2,
    const std::optional<at::Tensor>& sample_m3,
    const std::optional<at::Tensor>& sample_margin_weight,
    int64_t rows_per_rank,
    double grad_scale,
    const Group& group) {
  GatheredMargins margins{defined(sample_m2), defined(sample_m3), defined(sample_margin_weight)};
  std::vector<at::Tensor> columns;
  std::vector<std::optional<at::Tensor>*> places;
  for (auto* margin : {&margins.sample_m2, &margins.sample_m3, &margins.sample_margin_weight}) {
    if (margin->has_value() && (*margin)->dim() == 1) { // a 0-dim one is the same on all ranks
      columns.push_back((*margin)->to(at::kDouble));
      places.push_back(margin);
    }
  }
  if (!columns.empty()) {
    const at::Tensor all = gather_rows(at::stack(columns, 1), rows_per_rank, at::kDouble, grad_scale, group);
    for (size_t i = 0; i < places.size(); ++i) {
      *places[i] = all.select(1, static_cast<int64_t>(i));
    }
  }
  if (margins.sample_margin_weight.has_value()) {
    margins.sample_margin_weight = margins.sample_margin_weight->detach();
  }
  return margins;
}

at::Tensor class_parallel_cross_entropy(TORCHMARGIN_CLASS_PARALLEL_PARAMETERS) {
  static const auto partials_of =
      find_op<PartialsTuple(TORCHMARGIN_LINEAR_PARAMETERS, TORCHMARGIN_PARTIALS_PARAMETERS)>(
          "torchmargin::_linear_margin_partials");
  const Group group = make_group(group_size, group_name);
  TORCH_CHECK(!max_rows.has_value() || *max_rows > 0, kOp, ": expected max_rows to be positive, but got ", *max_rows);
  CrossEntropyOptions options{};
  try {
    options = check(TORCHMARGIN_CLASS_PARALLEL_ARGUMENTS);
  } catch (...) { // the other ranks must not wait for this one
    const at::Tensor like = input.defined() ? input : at::empty({0});
    wait_tensor(gather_labels(like, max_rows, ignore_index, /*refused=*/true, group));
    throw;
  }
  const at::Tensor labels = check_labels(
      wait_tensor(gather_labels(target, max_rows, ignore_index, /*refused=*/false, group)), num_classes, ignore_index,
      group_size);
  const int64_t rows_per_rank = labels.size(0) / group_size;
  const at::Tensor rows = gather_rows(input, rows_per_rank, weights[0].scalar_type(), input_grad_scale, group);
  const GatheredMargins margins =
      gather_margins(sample_m2, sample_m3, sample_margin_weight, rows_per_rank, input_grad_scale, group);

  const bool smoothed = label_smoothing > 0;
  const auto lowest = !compute_dtype.has_value() && widens(input, weights[0])
      ? std::optional<at::ScalarType>(input.scalar_type())
      : compute_dtype;
  std::vector<at::Tensor> other_lse;
  std::vector<at::Tensor> target_logit;
  std::vector<at::Tensor> logit_sum;
  for (size_t i = 0; i < weights.size(); ++i) {
    auto [o, t, z, angle, largest, plain, hardest_logit, hardest_class] = partials_of.call(
        rows, weights[i], labels - class_starts[i],
        biases.has_value() ? std::optional<at::Tensor>((*biases)[i]) : std::nullopt, scale, m1, m2, m3,
        margins.sample_m2, margins.sample_m3, margins.sample_margin_weight, extension, margin_weight, margin_gradient,
        normalize_input, normalize_weight, lowest, /*sub_centers=*/1, /*hard_threshold=*/std::nullopt,
        /*hard_coefficients=*/std::nullopt, /*hardest=*/0, /*with_logit_sum=*/smoothed, /*with_plain_logit=*/false,
        static_cast<int64_t>(weights.size()));
    other_lse.push_back(o);
    target_logit.push_back(t);
    logit_sum.push_back(z);
  }
  const Partials here =
      merge({at::stack(other_lse), at::stack(target_logit), smoothed ? at::stack(logit_sum) : at::Tensor()});
  std::vector<at::Tensor> sent{here.other_lse, here.target_logit};
  if (smoothed) {
    sent.push_back(here.logit_sum);
  }
  const std::vector<at::Tensor> found = exchange_partials(sent, static_cast<int64_t>(sent.size()), group);
  const int64_t own = input.size(0);
  const auto of_own = [own](const at::Tensor& rows) { return rows.narrow(0, 0, own); };
  const Partials merged = merge({found[0], found[1], smoothed ? found[2] : at::Tensor()});
  const at::Tensor losses = cross_entropy(
      of_own(merged.other_lse), of_own(merged.target_logit), smoothed ? of_own(merged.logit_sum) : at::Tensor(), target,
      num_classes, at::kDouble, {label_smoothing, ignore_index, Reduction::none});
  const at::ScalarType acc = acc_dtype(rows.scalar_type());
  if (options.reduction == Reduction::none) {
    return losses.to(acc);
  }
  at::Tensor value = losses.sum();
  if (options.reduction == Reduction::mean) {
    value = value / labels.ne(ignore_index).sum();
  }
  return global_sum(value, group).to(acc);
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
  // Private: its steps. See distributed/collectives.h.
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
  library.def("_exchange_partials(Tensor[] partials, int differentiable, int group_size, str group_name) -> Tensor[]");
  library.def("_global_sum(Tensor value, int group_size, str group_name) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchmargin, CompositeImplicitAutograd, library) {
  library.impl("class_parallel_cross_entropy", class_parallel_cross_entropy);
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
