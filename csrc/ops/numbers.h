// All of a problem that is no tensor as a list of numbers: what private ops are given, and what compiled autograd tells
// two calls apart by. One function names the fields, for writing and for reading.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "math/one_against_all.h"
#include "torchmargin/margin.h"

namespace torchmargin {

// How many values an enumeration has, for numbers that claim to be one.
template <typename Enum>
constexpr int kCount = 0;
template <>
inline constexpr int kCount<Extension> = static_cast<int>(Extension::continuous) + 1;
template <>
inline constexpr int kCount<MarginGradient> = static_cast<int>(MarginGradient::straight_through) + 1;
template <>
inline constexpr int kCount<BinaryKind> = static_cast<int>(BinaryKind::before) + 1;
template <>
inline constexpr int kCount<bool> = 2;
template <>
inline constexpr int kCount<c10::ScalarType> = static_cast<int>(c10::ScalarType::NumOptions);

constexpr double kNone = -1.0;

class NumberWriter {
 public:
  template <typename Field>
  void operator()(const Field& field) {
    numbers.push_back(static_cast<double>(field));
  }
  void operator()(const std::optional<c10::ScalarType>& dtype) {
    numbers.push_back(dtype.has_value() ? static_cast<double>(*dtype) : kNone);
  }

  std::vector<double> numbers;
};

class NumberReader {
 public:
  explicit NumberReader(c10::ArrayRef<double> numbers) : numbers_(numbers) {}

  void operator()(double& field) {
    field = next();
  }
  template <typename Field>
  void operator()(Field& field) {
    const double number = next();
    TORCH_CHECK(
        number >= 0 && number < kCount<Field> && number == std::floor(number),
        "torchmargin: a private op was given numbers that it cannot read: ", number, " at ", place_ - 1);
    field = static_cast<Field>(static_cast<int>(number));
  }
  void operator()(int64_t& field) {
    const double number = next();
    TORCH_CHECK(
        number == std::floor(number) && std::fabs(number) < 0x1p53,
        "torchmargin: a private op was given numbers that it cannot read: ", number, " at ", place_ - 1);
    field = static_cast<int64_t>(number);
  }
  void operator()(std::optional<c10::ScalarType>& dtype) {
    dtype = std::nullopt;
    if (place_ < numbers_.size() && numbers_[place_] == kNone) {
      ++place_;
    } else {
      (*this)(dtype.emplace());
    }
  }

  void finish() const {
    check(place_ == numbers_.size());
  }

 private:
  double next() {
    check(place_ < numbers_.size());
    return numbers_[place_++];
  }
  void check(bool fits) const {
    TORCH_CHECK(
        fits, "torchmargin: a private op was given a list of ", numbers_.size(), " numbers, which does not fit");
  }

  c10::ArrayRef<double> numbers_;
  size_t place_ = 0;
};

// NB: the names of all fields: a new one does not compile until it stands here.
template <typename Parameters, typename Visitor>
void visit_numbers_of_margin(Parameters& parameters, Visitor& visit) {
  auto& [scale, m1, m2, m3, extension, margin_weight, margin_gradient] = parameters;
  visit(scale);
  visit(m1);
  visit(m2);
  visit(m3);
  visit(extension);
  visit(margin_weight);
  visit(margin_gradient);
}

} // namespace torchmargin
