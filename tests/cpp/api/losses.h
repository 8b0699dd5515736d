// What the tests of the loss modules share: a batch, every loss, errors by their text.
#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torchmargin/torchmargin.h>

#include <string>

namespace nn = torchmargin::nn;
namespace F = torchmargin::nn::functional;
namespace presets = torchmargin::presets;

struct Batch {
  torch::Tensor embeddings = torch::randn({9, 6}).requires_grad_();
  torch::Tensor labels = torch::randint(0, 21, {9});
};

template <typename Call>
std::string error_of(Call call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

#define EXPECT_ERROR(text, ...) \
  EXPECT_NE(error_of([&] { __VA_ARGS__; }).find(text), std::string::npos) << error_of([&] { __VA_ARGS__; })

// Calls `f` with a new loss of every kind.
template <typename Function>
void with_every_loss(Function f) {
  f(nn::SoftmaxLoss(6, 21));
  f(nn::ModifiedSoftmaxLoss(6, 21));
  f(nn::NormalizedSoftmaxLoss(6, 21));
  f(nn::SphereFaceLoss(6, 21));
  f(nn::LargeMarginSoftmaxLoss(6, 21));
  f(nn::CosFaceLoss(6, 21));
  f(nn::ArcFaceLoss(6, 21));
  f(nn::CombinedMarginLoss(6, 21));
  f(nn::AdaFaceLoss(6, 21));
  f(nn::MagFaceLoss(nn::MagFaceLossOptions(6, 21).a_min(1).a_max(5)));
  f(nn::ElasticFaceLoss(nn::ElasticFaceLossOptions(6, 21).deviation(0)));
  f(nn::SubCenterArcFaceLoss(6, 21));
  f(nn::CurricularFaceLoss(6, 21));
  f(nn::MVSoftmaxLoss(6, 21));
  f(nn::InterTopKArcFaceLoss(6, 21));
  f(nn::SphereFace2Loss(6, 21));
  f(nn::UniFaceLoss(6, 21));
}

// Every number of the options, a tenth smaller.
template <typename Loss>
void shrink_numbers(Loss& loss) {
  for (const nn::SavedNumber& number : loss->saved_numbers()) {
    *number.value *= 0.9;
  }
}

template <typename Loss>
std::string printed(const Loss& loss) {
  std::stringstream text;
  text << *loss;
  return text.str();
}

// A parent with a loss in it, as training code has them.
template <typename Loss>
struct ModelImpl : torch::nn::Cloneable<ModelImpl<Loss>> {
  explicit ModelImpl(const Loss& loss) : head(loss), linear(6, 6) {
    reset();
  }
  void reset() override {
    linear = this->register_module("linear", torch::nn::Linear(6, 6));
    head = this->register_module("head", Loss(head->options));
  }

  Loss head;
  torch::nn::Linear linear;
};
