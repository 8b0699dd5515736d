#include "sweep/gradient_sweep.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <tuple>

#include "ops/target_place.h"
#include "sweep/tile_steps.h"

namespace torchmargin {

GradientSweep::GradientSweep(
    const ClassLoop& loop,
    const GradientRecord& record,
    const UpstreamVectors& upstream,
    const std::array<bool, 5>& wanted)
    : loop_(loop),
      problem_(loop.problem()),
      sizes_(loop.sizes()),
      record_(record),
      upstream_(upstream),
      wanted_(wanted),
      want_input_(wanted[0]),
      want_weight_(wanted[1]),
      want_bias_(wanted[2] && problem_.bias.has_value()) {
  if (wants_products()) {
    allocate();
  }
}

void GradientSweep::allocate() {
  lanes_.resize(loop_.plan().lanes);
  for (Lane& lane : lanes_) {
    lane.weights = loop_.tile_buffer(loop_.operands().dtype);
    lane.weight_buffer = loop_.weight_buffer();
    if (want_input_) {
      lane.input_products = loop_.empty({loop_.plan().input_splits, sizes_.rows, sizes_.features});
      lane.has_input_products = loop_.plan().input_splits > 1;
      if (lane.has_input_products) {
        lane.input_products.zero_();
      }
    }
    if (want_weight_) {
      // NB: not grad_weight itself: a product that writes fresh memory waits for its pages.
      lane.weight_products = columns_of(
          loop_.empty({loop_.plan().class_chunk * loop_.centers(), sizes_.padded(sizes_.features)}),
          {0, sizes_.features});
    }
  }
  if (want_weight_ && loop_.kernels().finish_own_classes != nullptr) {
    own_products_ = loop_.empty({sizes_.rows, sizes_.features});
  }
  if (want_weight_) {
    grad_weight_ = loop_.empty(problem_.weight.sizes(), problem_.weight.scalar_type());
  }
  if (want_bias_) {
    bias_products_ = loop_.empty({sizes_.classes}).zero_();
  }
  if (want_weight_ || want_bias_) {
    const auto sorted = [](const at::Tensor& places) {
      return at::sort(places, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    };
    if (loop_.centers() == 1) {
      std::tie(sorted_target_, sorted_row_) = sorted(loop_.target());
    } else {
      std::tie(sorted_class_, sorted_row_of_class_) = sorted(loop_.target());
      const auto [present, place] = target_place(loop_.target(), sizes_.classes);
      const at::Tensor center = record_.row_state.select(1, 4).to(at::kLong);
      const at::Tensor absent = at::full({}, -1, loop_.target().options());
      std::tie(sorted_target_, sorted_row_) = sorted(at::where(present, place * loop_.centers() + center, absent));
    }
  }
}

// R and the sum of g_Z: what label smoothing adds to every class.
void GradientSweep::sum_input(InputNorms& norms) {
  if (upstream_.bias_sum.defined()) {
    logit_sum_total_ = upstream_.bias_sum.sum();
  }
  if (upstream_.smoothed()) {
    input_sum_ = loop_.double_zeros({sizes_.features});
    norms.add_rows(pointer<double>(upstream_.sum), pointer<double>(input_sum_));
  }
}

void GradientSweep::run(int64_t kept_classes, InputNorms& norms, const Weigh& weigh) {
  sum_input(norms);
  weight_products_scale_ = loop_.operands().softmax_scale == 1.0
      ? upstream_.operand_scale
      : upstream_.operand_scale * loop_.operands().softmax_scale;
  if (want_weight_) {
    weighted_input_.emplace(
        loop_, record_.row_state, pointer<double>(upstream_.weight_factor), pointer<double>(upstream_.operand_scale));
  }
  if (want_bias_) {
    bias_factor_ = (upstream_.others * upstream_.operand_scale).to(loop_.operands().dtype);
  }
  loop_.for_each_chunk(kept_classes, [&](int64_t lane, Range classes) { sweep_chunk(lane, classes, weigh); });
  if (want_weight_ || want_bias_) {
    finish_own_classes();
  }
  for (Lane& lane : lanes_) {
    if (want_input_ && !lane.has_input_products) {
      lane.input_products.zero_();
    }
  }
}

void GradientSweep::sweep_chunk(int64_t place, Range classes, const Weigh& weigh) {
  Lane& lane = lanes_[place];
  const at::Tensor weight = loop_.reload_weight(classes, lane.weight_buffer, record_.inverse_norms);
  at::Tensor products; // [class_count K, D] for the chunk's grad_weight
  if (want_weight_) {
    products = rows_of(lane.weight_products, {0, loop_.weight_rows(classes).count});
    if (sizes_.rows == 0) {
      products.zero_();
    }
  }
  loop_.for_each_tile([&](Range rows) {
    const bool several = loop_.centers() > 1;
    const at::Tensor of_classes = loop_.tile_in(lane.weights, rows, classes);
    const at::Tensor weights = several ? loop_.planes_in(lane.weights, rows, classes) : of_classes;
    // The bias alone needs Q itself, without slopes and factors.
    const bool apart = !problem_.plain();
    if (want_bias_) {
      weigh({place, rows, classes, weight, of_classes, /*times_class_factors=*/false, /*of_bias=*/apart});
      multiply_bias(rows, classes, of_classes);
    }
    if (want_bias_ && !apart) {
      multiply_by_class_factors(loop_, weights, classes, record_.inverse_norms);
    } else if (want_input_ || want_weight_) {
      weigh({place, rows, classes, weight, weights, /*times_class_factors=*/true, /*of_bias=*/false});
    }
    if (want_input_) {
      loop_.steps().add_to_input(
          lane.input_products.narrow(1, rows.begin, rows.count), weights, weight, lane.has_input_products);
    }
    if (want_weight_) {
      loop_.steps().add_to_weight(products, weights, weighted_input_->tile(rows), /*accumulate=*/rows.begin > 0);
    }
  });
  lane.has_input_products = true;
  if (want_weight_ || want_bias_) {
    finish_chunk(classes, weight, products);
  }
}

void GradientSweep::multiply_bias(Range rows, Range classes, const at::Tensor& weights) const {
  const at::Tensor products = rows_of(bias_products_, classes);
  const at::Tensor factor = rows_of(bias_factor_, rows);
  if (weights.scalar_type() != loop_.acc()) {
    multiply(products.unsqueeze(1), weights.t(), factor.unsqueeze(1), /*accumulate=*/true);
  } else {
    products.addmv_(weights.t(), factor);
  }
}

// Of classes that are rows of the weight, or of classes themselves; nothing is wanted yet.
FinishClassesArgs GradientSweep::class_arguments(Range classes) const {
  FinishClassesArgs args{};
  args.context = loop_.context();
  args.state = row_state(record_.row_state);
  args.upstream = upstream_.pointers();
  args.first_class = classes.begin;
  args.class_count = classes.count;
  args.products_lack_norms = loop_.operands().unit_vectors && problem_.normalize_weight;
  args.products_scale = weight_products_scale_.data_ptr<double>();
  args.input_sum = pointer<double>(input_sum_);
  args.logit_sum_total = pointer<double>(logit_sum_total_);
  args.sorted_target = pointer<int64_t>(sorted_target_);
  args.sorted_row = pointer<int64_t>(sorted_row_);
  args.rows = sizes_.rows;
  return args;
}

// Of the bias alone, where a class has several rows of the weight.
FinishClassesArgs GradientSweep::bias_arguments(Range classes) const {
  FinishClassesArgs args = class_arguments(classes);
  args.upstream.sum = pointer<double>(upstream_.bias_sum);
  args.weight = raw_matrix(problem_.weight);
  args.bias_products = rows_of(bias_products_, classes).data_ptr();
  args.input_sum = nullptr;
  args.sorted_target = pointer<int64_t>(sorted_class_);
  args.sorted_row = pointer<int64_t>(sorted_row_of_class_);
  return args;
}

// The products of some rows of the weight, or of none, and where their gradients go.
FinishClassesArgs GradientSweep::weight_arguments(
    Range classes,
    const at::Tensor& products,
    const at::Tensor& weight,
    const at::Tensor& to) const {
  FinishClassesArgs args = class_arguments(classes);
  args.products = pointer(products);
  args.products_row_stride = products.defined() ? products.stride(0) : 0;
  args.grad_weight = pointer(to);
  args.weight = raw_matrix(weight);
  args.inverse_norms = problem_.normalize_weight ? rows_of(record_.inverse_norms, classes).data_ptr() : nullptr;
  args.bias_products = want_bias_ && loop_.centers() == 1 ? rows_of(bias_products_, classes).data_ptr() : nullptr;
  args.own_products = pointer(own_products_);
  return args;
}

void GradientSweep::finish_chunk(Range classes_of_chunk, const at::Tensor& weight, const at::Tensor& products) const {
  const SweepKernels& kernels = loop_.kernels();
  if (want_bias_ && loop_.centers() > 1) {
    kernels.finish_classes(bias_arguments(classes_of_chunk), loop_.acc());
  }
  const Range classes = loop_.weight_rows(classes_of_chunk);
  const bool any_rows = loop_.traits().reads_any_rows;
  const bool in_place = sizes_.widen_gradients && !any_rows;
  const at::Tensor to = !want_weight_ || in_place ? products : rows_of(grad_weight_, classes);
  kernels.finish_classes(
      weight_arguments(classes, products, any_rows ? rows_of(problem_.weight, classes) : weight, to), loop_.acc());
  if (want_weight_ && in_place) {
    rows_of(grad_weight_, classes).copy_(products);
  }
}

// Where the device leaves out the classes that have rows: those of all chunks.
void GradientSweep::finish_own_classes() const {
  const SweepKernels& kernels = loop_.kernels();
  if (kernels.finish_own_classes == nullptr) {
    return;
  }
  const Range all{0, sizes_.classes};
  if (want_bias_ && loop_.centers() > 1) {
    kernels.finish_own_classes(bias_arguments(all), loop_.acc());
  }
  kernels.finish_own_classes(
      weight_arguments(loop_.weight_rows(all), own_products_, problem_.weight, grad_weight_), loop_.acc());
}

// V of all rows, times the scale that is left in it: the sum of slices (into fresh memory, for this becomes the
// gradient) or of lanes, in order.
at::Tensor GradientSweep::sum_input_products() const {
  if (loop_.plan().input_splits > 1) {
    return lanes_[0].input_products.sum(0);
  }
  const at::Tensor total = lanes_[0].input_products.select(0, 0);
  for (size_t lane = 1; lane < lanes_.size(); ++lane) {
    total.add_(lanes_[lane].input_products.select(0, 0));
  }
  return total;
}

Gradients GradientSweep::finish() {
  const auto sample_gradient = [&](size_t index, const std::optional<at::Tensor>& sample) {
    return wanted_[index] && sample.has_value() ? loop_.double_zeros({sizes_.rows}) : at::Tensor();
  };
  const Margins& margins = problem_.margins;
  const at::Tensor grad_m2 = sample_gradient(3, margins.sample_m2);
  const at::Tensor grad_m3 = sample_gradient(4, margins.sample_m3);
  const at::Tensor input_products = want_input_ ? sum_input_products() : at::Tensor();
  const at::Tensor input_products_scale = loop_.double_zeros({1}).fill_(loop_.operands().softmax_scale);
  if (loop_.weight_scale().defined()) {
    input_products_scale.mul_(loop_.weight_scale());
  }
  loop_.kernels().finish_rows(
      {.context = loop_.context(),
       .state = row_state(record_.row_state),
       .upstream = upstream_.pointers(),
       .rows = sizes_.rows,
       .weight_sum = upstream_.smoothed() ? pointer<double>(record_.weight_sum) : nullptr,
       .products = pointer(input_products),
       .products_scale = input_products_scale.data_ptr<double>(),
       .grad_m2 = pointer<double>(grad_m2),
       .grad_m3 = pointer<double>(grad_m3)},
      loop_.acc());
  const auto returned = [&](const at::Tensor& gradient, const std::optional<at::Tensor>& of) {
    return gradient.defined() ? gradient.to(of->scalar_type()) : at::empty({0}, problem_.input.options());
  };
  return {
      returned(input_products, problem_.input), returned(grad_weight_, problem_.weight),
      returned(bias_products_, problem_.bias), returned(grad_m2, margins.sample_m2),
      returned(grad_m3, margins.sample_m3)};
}

void multiply_by_class_factors(
    const ClassLoop& loop,
    const at::Tensor& tile,
    Range classes,
    const at::Tensor& inverse_norms) {
  const at::Tensor factors = loop.class_factors(classes, inverse_norms);
  if (factors.defined()) {
    tile.mul_(factors);
  }
}

} // namespace torchmargin
