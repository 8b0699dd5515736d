// Weights of classes, with the meaning of torch.nn.functional.cross_entropy's `weight`: a row counts as much as its
// class. Arithmetic on [B] vectors of ATen's ops, behind the losses of the rows.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string_view>

#include "ops/cross_entropy.h"

namespace torchmargin {

// The gate: [C] floating-point numbers on the device of `input` that require no grad, and no label smoothing beside
// them. Undefined or absent: fine.
void check_class_weight(
    std::string_view op,
    const std::optional<at::Tensor>& class_weight,
    const at::Tensor& input,
    const c10::SymInt& classes,
    double label_smoothing);

// The weight of each row's class, [B] float64, 0 where the row is ignored. Other targets must be classes.
at::Tensor row_weights(const at::Tensor& class_weight, const at::Tensor& target, int64_t ignore_index);

// Of the losses [B] float64 of rows, 0 where they are ignored: weighted, and reduced ("mean": by the sum of weights).
at::Tensor weighted_loss(
    const at::Tensor& losses,
    const at::Tensor& class_weight,
    const at::Tensor& target,
    int64_t ignore_index,
    Reduction reduction);

} // namespace torchmargin
