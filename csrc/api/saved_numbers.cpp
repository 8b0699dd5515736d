// What a loss module saves beside its weight: the options' numbers, in float64 buffers. The options are the truth; the
// buffers are written from them before anything is saved, and the options set from what is loaded.
#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/serialize/archive.h>

#include <algorithm>

#include "api/loss_options.h"
#include "torchmargin/margin_loss.h"

namespace torchmargin::nn {
namespace {

// Sets a number of the options from a saved tensor.
void assign(const SavedNumber& number, const torch::Tensor& saved, int64_t classes) {
  const bool per_class = number.per_class != nullptr && saved.dim() == 1;
  TORCH_CHECK(
      per_class ? saved.size(0) == classes : saved.dim() == 0, "expected '", number.name, "' to have shape []",
      number.per_class != nullptr ? c10::str(" or [", classes, "]") : std::string(), ", but got ", saved.sizes());
  if (per_class) {
    *number.per_class = saved.detach().to(at::kDouble, /*non_blocking=*/false, /*copy=*/true);
    return;
  }
  *number.value = saved.item<double>();
  if (number.per_class != nullptr) {
    *number.per_class = torch::Tensor();
  }
}

torch::Tensor tensor_of(const SavedNumber& number, const torch::Device& device) {
  if (number.per_class != nullptr && number.per_class->defined()) {
    return number.per_class->detach().to(device, at::kDouble, /*non_blocking=*/false, /*copy=*/true);
  }
  return at::full({}, *number.value, at::TensorOptions(device).dtype(at::kDouble));
}

// Numbers are changed, and put back unless `keep` is called.
class Change {
 public:
  explicit Change(std::vector<SavedNumber> numbers) : numbers_(std::move(numbers)) {
    for (const SavedNumber& number : numbers_) {
      before_.emplace_back(*number.value, number.per_class == nullptr ? torch::Tensor() : *number.per_class);
    }
  }
  Change(const Change&) = delete;
  Change& operator=(const Change&) = delete;
  ~Change() {
    for (size_t i = 0; !kept_ && i < numbers_.size(); ++i) {
      *numbers_[i].value = before_[i].first;
      if (numbers_[i].per_class != nullptr) {
        *numbers_[i].per_class = before_[i].second;
      }
    }
  }

  void set(const std::map<std::string, torch::Tensor>& saved, int64_t classes) {
    for (const SavedNumber& number : numbers_) {
      if (const auto found = saved.find(number.name); found != saved.end()) {
        assign(number, found->second, classes);
      }
    }
  }
  void keep() {
    kept_ = true;
  }

 private:
  std::vector<SavedNumber> numbers_;
  std::vector<std::pair<double, torch::Tensor>> before_;
  bool kept_ = false;
};

} // namespace

void MarginLossBase::make_tensors() {
  const MarginLossOptions o = margin_loss_options();
  weight = module().register_parameter("weight", torch::empty({o.num_classes() * o.sub_centers(), o.in_features()}));
  torch::Tensor bias_of_options;
  if (o.bias()) {
    bias_of_options = o.one_against_all().has_value() ? torch::empty({}) : torch::empty({o.num_classes()});
  }
  bias = module().register_parameter("bias", bias_of_options, o.bias());
  for (const SavedNumber& number : numbers()) {
    const torch::Tensor buffer = module().register_buffer(number.name, tensor_of(number, at::kCPU));
    if (number.per_class != nullptr && number.per_class->defined()) {
      *number.per_class = buffer.clone(); // the loss's own, also after cloning
    }
  }
  log_ = torch::Tensor();
  reset_parameters();
}

std::vector<SavedNumber> MarginLossBase::numbers() {
  MarginParameters& margin = own_options_.form().margin;
  return {{"scale", &margin.scale}, {"m1", &margin.m1}, {"m2", &margin.m2}, {"m3", &margin.m3}};
}

std::vector<SavedNumber> MarginLossBase::saved_numbers() const {
  return const_cast<MarginLossBase*>(this)->numbers(); // changes nothing
}

bool MarginLossBase::is_number(const std::string& name) const {
  const std::vector<SavedNumber> numbers = saved_numbers();
  return std::any_of(numbers.begin(), numbers.end(), [&](const SavedNumber& number) { return number.name == name; });
}

std::vector<torch::Tensor> MarginLossBase::state() const {
  std::vector<torch::Tensor> tensors;
  for (const auto& buffer : module().named_buffers(/*recurse=*/false)) {
    if (buffer.value().dim() == 0 && !is_number(buffer.key())) {
      tensors.push_back(buffer.value());
    }
  }
  return tensors;
}

int64_t MarginLossBase::class_count() const {
  return margin_loss_options().num_classes();
}

MarginLossOptions MarginLossBase::present_options() const {
  MarginLossOptions o = margin_loss_options();
  TORCH_CHECK(
      !weight.defined() || weight.dim() != 2 ||
          (o.in_features() == weight.size(1) && o.num_classes() * o.sub_centers() == weight.size(0) &&
           o.bias() == bias.defined()),
      "expected in_features, num_classes and bias to stay as they were at the construction, since they belong to the "
      "weight: ",
      weight.size(1), ", ", weight.size(0) / std::max<int64_t>(o.sub_centers(), 1), " and ", bias.defined(),
      ", but got ", o.in_features(), ", ", o.num_classes(), " and ", o.bias(), " with sub_centers = ", o.sub_centers());
  return o;
}

void MarginLossBase::write_numbers() const {
  check_options(present_options());
  const at::NoGradGuard no_grad;
  auto buffers = module().named_buffers(/*recurse=*/false);
  for (const SavedNumber& number : saved_numbers()) {
    torch::Tensor& buffer = buffers[number.name];
    const torch::Tensor value = tensor_of(number, weight.device());
    if (buffer.sizes() == value.sizes() && buffer.device() == value.device()) {
      buffer.copy_(value);
    } else {
      buffer.set_data(value); // its shape changes with class_margins
    }
  }
}

void MarginLossBase::check_numbers(const std::map<std::string, torch::Tensor>& numbers) {
  Change change(this->numbers());
  change.set(numbers, class_count());
  check_options(present_options());
}

void MarginLossBase::read_numbers(const std::map<std::string, torch::Tensor>& numbers) {
  Change change(this->numbers());
  change.set(numbers, class_count());
  write_numbers();
  change.keep();
}

void MarginLossBase::load_tensors(torch::serialize::InputArchive& archive) {
  // All is read and checked before anything is changed. The archive's own error names what is missing.
  const auto read = [&](const std::string& name, const torch::Tensor& own, bool is_buffer) {
    torch::Tensor tensor;
    archive.read(name, tensor, is_buffer);
    TORCH_CHECK(
        tensor.sizes() == own.sizes() && (is_buffer || tensor.scalar_type() == own.scalar_type()), "expected '", name,
        "' to have shape ", own.sizes(), " and dtype ", own.scalar_type(), ", but in the archive it has ",
        tensor.sizes(), " and ", tensor.scalar_type());
    return tensor;
  };
  const auto parameters = module().named_parameters(/*recurse=*/false);
  for (const auto& parameter : parameters) {
    read(parameter.key(), parameter.value(), /*is_buffer=*/false);
  }
  std::map<std::string, torch::Tensor> numbers;
  Tensors buffers;
  for (const auto& buffer : module().named_buffers(/*recurse=*/false)) {
    if (!is_number(buffer.key())) {
      buffers.emplace_back(buffer.value(), read(buffer.key(), buffer.value(), /*is_buffer=*/true));
    } else if (torch::Tensor tensor; archive.try_read(buffer.key(), tensor, /*is_buffer=*/true)) {
      numbers.emplace(buffer.key(), tensor);
    }
  }
  check_numbers(numbers);
  for (const auto& child : module().named_children()) {
    if (child.value()->is_serializable()) {
      torch::serialize::InputArchive of_child;
      archive.read(child.key(), of_child);
      child.value()->load(of_child);
    }
  }
  const at::NoGradGuard no_grad;
  for (const auto& parameter : parameters) {
    torch::Tensor own = parameter.value();
    archive.read(parameter.key(), own); // takes the archive's device, as all modules do
  }
  for (auto& [own, saved] : buffers) {
    if (own.device() != weight.device()) {
      own.set_data(own.to(weight.device()));
    }
    own.copy_(saved);
  }
  read_numbers(numbers);
}

MarginLossBase::Tensors MarginLossBase::buffers_before_cast() const {
  Tensors tensors;
  for (const auto& buffer : module().named_buffers(/*recurse=*/false)) {
    tensors.emplace_back(buffer.value(), buffer.value().detach());
  }
  return tensors;
}

void MarginLossBase::restore_dtypes(const Tensors& buffers) {
  for (const auto& [buffer, before] : buffers) {
    if (buffer.scalar_type() != before.scalar_type()) {
      torch::Tensor(buffer).set_data(before.to(buffer.device()));
    }
  }
}

} // namespace torchmargin::nn
