// The loss op's arguments, checked: for the devices that have a kernel for it.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <string_view>

#include "ops/cross_entropy.h"
#include "ops/loss_op.h"

namespace torchmargin {

// [B] float64 or int64, contiguous.
template <typename T>
class LossRows {
 public:
  LossRows(std::string_view op, const char* argument, const at::Tensor& tensor, int64_t rows) {
    constexpr c10::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
    TORCH_CHECK(
        tensor.dim() == 1 && tensor.size(0) == rows && tensor.scalar_type() == dtype, op, ": expected ", argument,
        " to have shape [", rows, "] and dtype ", dtype, ", but got ", tensor.sizes(), " and ", tensor.scalar_type());
    tensor_ = tensor.contiguous();
    data_ = tensor_.const_data_ptr<T>();
  }
  T operator[](int64_t row) const {
    return data_[row];
  }
  const T* data() const {
    return data_;
  }

 private:
  at::Tensor tensor_;
  const T* data_;
};

inline int64_t count_loss_rows(std::string_view op, const at::Tensor& other_lse) {
  TORCH_CHECK(other_lse.dim() == 1, op, ": expected other_lse to have shape [B], but got ", other_lse.sizes());
  return other_lse.size(0);
}

inline Reduction check_reduction(std::string_view op, int64_t reduction) {
  TORCH_CHECK(reduction >= 0 && reduction <= 2, op, ": expected reduction to be 0, 1 or 2, but got ", reduction);
  return static_cast<Reduction>(reduction);
}

// What both ops read of every row, and what becomes of it.
struct LossInputs {
  Reduction kind;
  bool reduced;
  int64_t rows;
  LossRows<double> other, own;
  LossRows<int64_t> labels;

  LossInputs(
      std::string_view op,
      const at::Tensor& other_lse,
      const at::Tensor& target_logit,
      const at::Tensor& target,
      int64_t reduction)
      : kind(check_reduction(op, reduction)),
        reduced(kind != Reduction::none),
        rows(count_loss_rows(op, other_lse)),
        other(op, "other_lse", other_lse, rows),
        own(op, "target_logit", target_logit, rows),
        labels(op, "target", target, rows) {}

  void check_grad(std::string_view op, const at::Tensor& grad) const {
    TORCH_CHECK(
        grad.dim() == (reduced ? 0 : 1) && (reduced || grad.size(0) == rows), op,
        ": expected grad to have the shape of the loss, but got ", grad.sizes());
  }
};

// Room for the gradients of the three vectors.
inline LossGradientTuple empty_loss_gradients(const at::Tensor& other_lse) {
  const auto vector = [&] { return at::empty({other_lse.size(0)}, other_lse.options().requires_grad(false)); };
  return {vector(), vector(), vector()};
}

} // namespace torchmargin
