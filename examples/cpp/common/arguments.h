// Command lines: positional words and --name value options.
#pragma once

#include <cmath>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Arguments {
  std::vector<std::string> words;
  std::map<std::string, std::string> options;

  // `defaults` are the options there are; another one is an error.
  Arguments(int argc, char** argv, std::map<std::string, std::string> defaults) : options(std::move(defaults)) {
    for (int i = 1; i < argc; ++i) {
      const std::string word = argv[i];
      if (word.rfind("--", 0) != 0) {
        words.push_back(word);
        continue;
      }
      const std::string name = word.substr(2);
      if (options.count(name) == 0) {
        throw std::invalid_argument("there is no option " + word);
      }
      if (i + 1 == argc) {
        throw std::invalid_argument(word + " wants a value");
      }
      options[name] = argv[++i];
    }
  }

  const std::string& operator[](const std::string& name) const {
    return options.at(name);
  }
  double number(const std::string& name) const {
    size_t read = 0;
    double value = 0.0;
    try {
      value = std::stod(options.at(name), &read);
    } catch (const std::exception&) {
    }
    if (read == 0 || read != options.at(name).size() || !std::isfinite(value)) {
      throw std::invalid_argument("--" + name + " wants a number, but got '" + options.at(name) + "'");
    }
    return value;
  }
};
