/// @file
/// Everything a LibTorch program needs of torchmargin.
#pragma once

#include "torchmargin/class_parallel.h"
#include "torchmargin/export.h"
#include "torchmargin/functional.h"
#include "torchmargin/margin.h"
#include "torchmargin/margin_loss.h"
#include "torchmargin/modules.h"
#include "torchmargin/options.h"
#include "torchmargin/presets.h"
#include "torchmargin/settings.h"
#include "torchmargin/state_dict.h"
#include "torchmargin/version.h"
