/// @file
/// The base of the loss modules: class weights [C, D] and the call of the fused op; never the logits [B, C]. The
/// published losses are in modules.h.
///
/// A loss of your own: derive from MarginLossImpl<YourLossImpl>, call reset() in the constructor, give the margin as
/// options or override a hook; TORCH_MODULE(YourLoss). The hooks, in the order of a call:
///
///   advance         moves state, once a training forward, without gradients. State in 0-dim buffers (registered in
///                   reset()) is what it was when a backward pass runs the forward again, as activation checkpointing
///                   does.
///   sample_margins  margins that differ from row to row
///   negatives       what happens to the logits of other classes
///   row_penalty     what is added to each row's loss
///
/// target_angle() is there for them.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/types.h>

#include <map>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "torchmargin/export.h"
#include "torchmargin/functional.h"
#include "torchmargin/options.h"

namespace torchmargin::nn {

using functional::MarginStatistics;

/// Margins that differ from row to row, [B] each; margin_weight may be 0-dim. See LinearMarginFuncOptions.
struct TORCHMARGIN_API SampleMargins {
  std::optional<torch::Tensor> m2;
  std::optional<torch::Tensor> m3;
  std::optional<torch::Tensor> margin_weight;
};

/// What happens to other classes whose cosine is above a threshold: see LinearMarginFuncOptions.
struct TORCHMARGIN_API HardNegatives {
  std::optional<torch::Tensor> threshold; ///< [B] or 0-dim; none: the row's own
  std::optional<torch::Tensor> coefficients; ///< [3] or [B, 3]; none: nothing happens
};

/// A number of the options that is saved with the weight, in a float64 buffer of this name.
struct TORCHMARGIN_API SavedNumber {
  std::string name;
  double* value; ///< in the options
  torch::Tensor* per_class = nullptr; ///< in the options, [C]: where it is defined, it stands for the value
};

/// What a loss is beside being a module. Not for use by itself: see MarginLossImpl.
class TORCHMARGIN_API MarginLossBase {
 public:
  explicit MarginLossBase(const MarginLossOptions& options);
  MarginLossBase(const MarginLossBase&) = default;
  MarginLossBase& operator=(const MarginLossBase&) = default;
  virtual ~MarginLossBase();

  /// Xavier-uniform weights, as ArcFace's and SphereFace's code has them; the bias 0.
  void reset_parameters();

  /// The logits [B, C] without a margin, for inference: their argmax is the predicted class.
  torch::Tensor logits(const torch::Tensor& embeddings) const;

  /// The options in the form that all losses share, asked for at each call; c10::Error if they are bad. Override it
  /// where a loss of your own has an options struct of its own.
  virtual MarginLossOptions margin_loss_options() const;

  /// What the constructor of the base was given. Live: a change takes effect at the next call.
  MarginLossOptions& own_options();

  /// Writes the options' numbers into their buffers. Saving and cloning do it; c10::Error if the options are bad.
  void write_numbers() const;
  /// Sets the options from numbers that were saved, those that are there. c10::Error if they are bad, as from the
  /// constructor; nothing is changed then.
  void read_numbers(const std::map<std::string, torch::Tensor>& numbers);
  /// The same error, and nothing is changed in any case.
  void check_numbers(const std::map<std::string, torch::Tensor>& numbers);
  std::vector<SavedNumber> saved_numbers() const;

  torch::Tensor weight; ///< [C K, D]
  torch::Tensor bias; ///< [C], 0-dim (one against all), or undefined

 protected:
  /// The dtype of losses: float64 for float64 weights, else float32.
  torch::Dtype acc_dtype() const;

  virtual void advance(const torch::Tensor& embeddings, const torch::Tensor& labels);
  virtual SampleMargins sample_margins(const torch::Tensor& embeddings, const torch::Tensor& labels);
  /// The interclass_filter of the options, if there is one.
  virtual HardNegatives negatives(const torch::Tensor& embeddings, const torch::Tensor& labels);
  /// The angle of each row to its class, [B] radians, without a gradient.
  torch::Tensor target_angle(const torch::Tensor& embeddings, const torch::Tensor& labels) const;
  /// [B], or undefined. Ignored rows are left out, the others reduced as the loss is.
  virtual torch::Tensor row_penalty(const torch::Tensor& embeddings, const torch::Tensor& labels);

  /// The numbers that are saved: scale, m1, m2 and m3 of own_options().
  virtual std::vector<SavedNumber> numbers();

  virtual torch::nn::Module& module() = 0;
  const torch::nn::Module& module() const;

  // The bodies of MarginLossImpl.
  void make_tensors();
  std::pair<torch::Tensor, MarginStatistics>
  call(const torch::Tensor& embeddings, const torch::Tensor& labels, bool with_statistics);
  void print(std::ostream& stream) const;
  void load_tensors(torch::serialize::InputArchive& archive);
  using Tensors = std::vector<std::pair<torch::Tensor, torch::Tensor>>;
  Tensors buffers_before_cast() const;
  static void restore_dtypes(const Tensors& buffers);

 private:
  class Step;

  // A class_weight of the options, looked at and on the weight's device.
  struct KnownClassWeight {
    torch::Tensor given;
    torch::Tensor here;
    int64_t version = -1;
  };

  MarginLossOptions present_options() const;
  torch::Tensor known_class_weight(const torch::Tensor& given);
  std::pair<torch::Tensor, MarginStatistics> call_op(
      const MarginLossOptions& options,
      const torch::Tensor& embeddings,
      const torch::Tensor& labels,
      std::optional<torch::Dtype> lowest,
      bool hooked,
      bool with_statistics);
  std::vector<torch::Tensor> state() const;
  bool is_number(const std::string& name) const;
  int64_t class_count() const;

  MarginLossOptions own_options_;
  KnownClassWeight class_weight_;
  torch::Tensor log_; // of steps, for recomputes: see _recall_state
};

/// loss->forward(embeddings [B, D], labels [B] int64) is the loss, a scalar (or [B] with reduction "none") in float64
/// for float64 weights and float32 otherwise. float16 and bfloat16 embeddings may stand beside float32 weights. Bad
/// options and inputs throw c10::Error, a label outside [0, C) that is not ignore_index c10::IndexError.
///
/// Options are live: a change takes effect at the next call, is saved with the weight, and comes back with it. Casts
/// (`to`) leave buffers in their dtypes.
template <typename Derived>
class TORCHMARGIN_API MarginLossImpl : public torch::nn::Cloneable<Derived>, public MarginLossBase {
 public:
  using MarginLossBase::MarginLossBase;

  void reset() override {
    make_tensors();
  }

  torch::Tensor forward(const torch::Tensor& embeddings, const torch::Tensor& labels) {
    return call(embeddings, labels, /*with_statistics=*/false).first;
  }

  /// The same, and how training goes, from the same sweep over the classes.
  std::pair<torch::Tensor, MarginStatistics> forward_with_statistics(
      const torch::Tensor& embeddings,
      const torch::Tensor& labels) {
    return call(embeddings, labels, /*with_statistics=*/true);
  }

  void pretty_print(std::ostream& stream) const override {
    print(stream);
  }

  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override {
    write_numbers();
    return torch::nn::Cloneable<Derived>::clone(device);
  }

  void save(torch::serialize::OutputArchive& archive) const override {
    write_numbers();
    torch::nn::Module::save(archive);
  }

  /// An archive without the numbers leaves the options as they are.
  void load(torch::serialize::InputArchive& archive) override {
    load_tensors(archive);
  }

  using torch::nn::Module::to;
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override {
    const Tensors buffers = buffers_before_cast();
    torch::nn::Module::to(device, dtype, non_blocking);
    restore_dtypes(buffers);
  }
  void to(torch::Dtype dtype, bool non_blocking = false) override {
    const Tensors buffers = buffers_before_cast();
    torch::nn::Module::to(dtype, non_blocking);
    restore_dtypes(buffers);
  }

 protected:
  torch::nn::Module& module() override {
    return *this;
  }
};

} // namespace torchmargin::nn
