// Tables of comma-separated values.
#pragma once

#include <cmath>
#include <fstream>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

using Table = std::vector<std::vector<std::string>>;

// The rows of a file, all of one length; empty lines are left out.
inline Table read_csv(const std::string& path) {
  std::ifstream file(path);
  if (!file) {
    throw std::runtime_error("cannot read '" + path + "'");
  }
  Table table;
  for (std::string line; std::getline(file, line);) {
    if (!line.empty() && line.back() == '\r') {
      line.pop_back();
    }
    if (line.empty()) {
      continue;
    }
    std::vector<std::string> row;
    std::istringstream stream(line);
    for (std::string cell; std::getline(stream, cell, ',');) {
      row.push_back(cell);
    }
    if (!table.empty() && row.size() != table.front().size()) {
      throw std::runtime_error(
          path + ": row " + std::to_string(table.size() + 1) + " has " + std::to_string(row.size()) +
          " columns, the first has " + std::to_string(table.front().size()));
    }
    table.push_back(row);
  }
  if (table.empty()) {
    throw std::runtime_error(path + " is empty");
  }
  return table;
}

// A finite number; NaN, infinity and what a float cannot hold are errors.
inline float to_number(const std::string& cell, const std::string& path) {
  size_t read = 0;
  double value = 0.0;
  try {
    value = std::stod(cell, &read);
  } catch (const std::exception&) {
  }
  if (read == 0 || read != cell.size()) {
    throw std::runtime_error(path + ": '" + cell + "' is not a number");
  }
  if (!(std::abs(value) <= static_cast<double>(std::numeric_limits<float>::max()))) {
    throw std::runtime_error(path + ": '" + cell + "' is not a finite number");
  }
  return static_cast<float>(value);
}
