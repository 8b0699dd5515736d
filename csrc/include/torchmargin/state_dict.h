/// @file
/// Weights to and from Python, for any module, as files that hold a plain dict of tensors.
///
///   torchmargin::load_state_dict(*loss, "loss.pt"); // Python: torch.save(dict(loss.state_dict()), "loss.pt")
///   torchmargin::save_state_dict(*loss, "loss.pt"); // Python: loss.load_state_dict(torch.load("loss.pt"))
///
/// Between C++ programs torch::save and torch::load serve as well.
#pragma once

#include <torch/nn/module.h>

#include <string>

#include "torchmargin/export.h"

namespace torchmargin {

/// Copies every tensor of the file into the parameter or buffer of that name, and sets the options of the losses in the
/// module from the numbers that were saved with them; a file without those leaves the options as they are. c10::Error
/// if another name is missing in either, if shapes differ, if the options would be bad, or if the file cannot be read;
/// nothing is changed then.
TORCHMARGIN_API void load_state_dict(torch::nn::Module& module, const std::string& path);
TORCHMARGIN_API void save_state_dict(const torch::nn::Module& module, const std::string& path);

} // namespace torchmargin
