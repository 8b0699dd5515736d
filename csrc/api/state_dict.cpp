#include "torchmargin/state_dict.h"

#include <ATen/core/Dict.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/csrc/jit/serialization/pickler.h>

#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "torchmargin/margin_loss.h"

namespace torchmargin {
namespace {

using Tensors = std::map<std::string, at::Tensor>;

// A loss in the module, and what stands before its names: its numbers are saved too, see margin_loss.h.
struct Loss {
  std::string prefix;
  nn::MarginLossBase* loss;

  // Of tensors by their full names those that are its numbers, by their own.
  Tensors numbers_in(const Tensors& tensors) const {
    Tensors numbers;
    for (const nn::SavedNumber& number : loss->saved_numbers()) {
      if (const auto found = tensors.find(prefix + number.name); found != tensors.end()) {
        numbers.emplace(number.name, found->second);
      }
    }
    return numbers;
  }
};

// NB: not by modules(), which asks for a module in a shared_ptr.
std::vector<Loss> losses_of(const torch::nn::Module& module) {
  std::vector<Loss> losses;
  if (const auto* loss = dynamic_cast<const nn::MarginLossBase*>(&module)) {
    losses.push_back({"", const_cast<nn::MarginLossBase*>(loss)});
  }
  for (const auto& item : module.named_modules("", /*include_self=*/false)) {
    if (auto* loss = dynamic_cast<nn::MarginLossBase*>(item.value().get())) {
      losses.push_back({item.key() + ".", loss});
    }
  }
  return losses;
}

// Parameters and buffers by name, as Python's state_dict has them.
Tensors tensors_of(const torch::nn::Module& module) {
  Tensors tensors;
  for (const auto& item : module.named_parameters()) {
    tensors.emplace(item.key(), item.value());
  }
  for (const auto& item : module.named_buffers()) {
    tensors.emplace(item.key(), item.value());
  }
  return tensors;
}

Tensors read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file.good(), "load_state_dict: cannot read '", path, "'");
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  c10::IValue value;
  try {
    value = torch::jit::pickle_load(bytes);
  } catch (const c10::Error&) {
    // LibTorch cannot read the OrderedDict that a state_dict is in Python.
  }
  TORCH_CHECK(
      value.isGenericDict(), "load_state_dict: expected '", path,
      "' to hold a plain dict of tensors; in Python write it ", "with torch.save(dict(module.state_dict()), path)");
  Tensors tensors;
  for (const auto& item : value.toGenericDict()) {
    TORCH_CHECK(
        item.key().isString() && item.value().isTensor(), "load_state_dict: expected '", path,
        "' to hold names and tensors only");
    tensors.emplace(item.key().toStringRef(), item.value().toTensor());
  }
  return tensors;
}

} // namespace

void load_state_dict(torch::nn::Module& module, const std::string& path) {
  const Tensors given = read(path);
  const std::vector<Loss> losses = losses_of(module);
  Tensors own = tensors_of(module);
  Tensors unknown = given;
  for (const Loss& item : losses) {
    item.loss->check_numbers(item.numbers_in(given));
    for (const nn::SavedNumber& number : item.loss->saved_numbers()) {
      own.erase(item.prefix + number.name); // need not be in the file
      unknown.erase(item.prefix + number.name);
    }
  }
  for (const auto& [name, tensor] : own) {
    const auto found = given.find(name);
    TORCH_CHECK(found != given.end(), "load_state_dict: '", path, "' has no '", name, "'");
    TORCH_CHECK(
        found->second.sizes() == tensor.sizes(), "load_state_dict: expected '", name, "' to have shape ",
        tensor.sizes(), ", but in '", path, "' it has ", found->second.sizes());
    unknown.erase(name);
  }
  TORCH_CHECK(
      unknown.empty(), "load_state_dict: the module has no '", unknown.begin()->first, "', which '", path, "' holds");
  const at::NoGradGuard no_grad;
  for (const auto& [name, tensor] : own) {
    at::Tensor(tensor).copy_(given.at(name));
  }
  for (const Loss& item : losses) {
    item.loss->read_numbers(item.numbers_in(given));
  }
}

// NB: not torch::pickle_save, which marks every dict with a type, and those marks torch.load refuses by default.
void save_state_dict(const torch::nn::Module& module, const std::string& path) {
  for (const Loss& item : losses_of(module)) {
    item.loss->write_numbers();
  }
  c10::Dict<std::string, at::Tensor> dict;
  for (const auto& [name, tensor] : tensors_of(module)) {
    dict.insert(name, tensor.detach());
  }
  std::string data;
  torch::jit::Pickler pickler(
      [&](const char* bytes, size_t size) { data.append(bytes, size); }, /*tensor_table=*/nullptr,
      /*type_renamer=*/nullptr, /*memoized_class_types=*/nullptr, /*get_tensor_id=*/nullptr, /*tag_aggregates=*/false);
  pickler.protocol();
  pickler.pushIValue(dict);
  pickler.stop();

  std::ofstream file(path, std::ios::binary);
  TORCH_CHECK(file.good(), "save_state_dict: cannot write '", path, "'");
  caffe2::serialize::PyTorchStreamWriter archive([&](const void* bytes, size_t size) {
    file.write(static_cast<const char*>(bytes), static_cast<std::streamsize>(size));
    return file.good() ? size : 0;
  });
  archive.writeRecord("data.pkl", data.data(), data.size());
  int64_t index = 0;
  for (const at::Tensor& tensor : pickler.tensorData()) {
    const torch::jit::WriteableTensorData record = torch::jit::getWriteableTensorData(tensor);
    archive.writeRecord("data/" + std::to_string(index++), record.data(), record.sizeInBytes());
  }
  archive.writeEndOfFile();
  file.close();
  TORCH_CHECK(file.good(), "save_state_dict: cannot write '", path, "'");
}

} // namespace torchmargin
