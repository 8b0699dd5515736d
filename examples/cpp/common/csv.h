// Tables of comma-separated values.
#pragma once

#include <fstream>
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

inline float to_number(const std::string& cell, const std::string& path) {
  size_t read = 0;
  float value = 0.0F;
  try {
    value = std::stof(cell, &read);
  } catch (const std::exception&) {
  }
  if (read == 0 || read != cell.size()) {
    throw std::runtime_error(path + ": '" + cell + "' is not a number");
  }
  return value;
}
