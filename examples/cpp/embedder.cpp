// A trained network in use: loads a network that Python packaged with AOTInductor (examples/python/export_embedder.py)
// and answers from the command line.
//
//   embedder verify   MODEL A B [--threshold 0.5]                       are A and B the same?
//   embedder identify MODEL PROBE... --gallery DIR_OR_CSV [--top 5]      which of the gallery are most like each probe?
//   embedder enroll   MODEL FILE... --output gallery.csv                 embeddings as a feature file
//
// A FILE is an image (PGM and PPM; PNG and JPEG where this was built with OpenCV), or a feature file: CSV rows of a
// name and the numbers of an embedding. MODEL may be "-" where all files are feature files.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "common/arguments.h"
#include "common/csv.h"
#include "common/gallery.h"
#include "common/image.h"

namespace {

namespace fs = std::filesystem;

struct Named {
  std::string name;
  torch::Tensor embedding; // [D], of unit length
};

// The packaged network: images [B, channels, height, width] in [-0.5, 0.5] to embeddings [B, D]. The package says its
// image size.
class Network {
 public:
  explicit Network(const std::string& path) {
    if (path == "-") {
      return;
    }
    if (!fs::exists(path)) {
      throw std::runtime_error("cannot read '" + path + "'");
    }
    loader_ = std::make_unique<torch::inductor::AOTIModelPackageLoader>(path);
    const auto metadata = loader_->get_metadata();
    const auto size = [&](const char* key) {
      const auto found = metadata.find(key);
      if (found == metadata.end()) {
        throw std::runtime_error(path + " does not say its image " + key + "; examples/python/export_embedder.py does");
      }
      return static_cast<int64_t>(std::stol(found->second));
    };
    channels_ = size("channels");
    height_ = size("height");
    width_ = size("width");
  }

  torch::Tensor embed(const std::string& path) const {
    if (loader_ == nullptr) {
      throw std::runtime_error("'" + path + "' is an image: give a model to embed it, not '-'");
    }
    torch::Tensor image = read_image(path).unsqueeze(0); // [1, channels, height, width] in [0, 1]
    if (image.size(1) != channels_) {
      image = channels_ == 1 ? image.mean(1, /*keepdim=*/true) : image.expand({1, channels_, -1, -1});
    }
    if (image.size(2) != height_ || image.size(3) != width_) {
      image = torch::nn::functional::interpolate(
          image,
          torch::nn::functional::InterpolateFuncOptions()
              .size(std::vector<int64_t>{height_, width_})
              .mode(torch::kBilinear)
              .align_corners(false)
              .antialias(true));
    }
    return loader_->run({(image - 0.5).contiguous()}).at(0).squeeze(0);
  }

 private:
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader_;
  int64_t channels_ = 0, height_ = 0, width_ = 0;
};

torch::Tensor to_unit(const torch::Tensor& embedding, const std::string& name) {
  if (embedding.numel() == 0) {
    throw std::runtime_error("the embedding of " + name + " has no numbers");
  }
  if (!embedding.to(torch::kFloat32).norm().isfinite().item<bool>()) {
    throw std::runtime_error("the embedding of " + name + " is not finite");
  }
  return torch::nn::functional::normalize(
      embedding.to(torch::kFloat32), torch::nn::functional::NormalizeFuncOptions().dim(0));
}

bool has_extension(const fs::path& path, const std::string& extension) {
  std::string own = path.extension().string();
  std::transform(own.begin(), own.end(), own.begin(), [](unsigned char c) { return std::tolower(c); });
  return own == extension;
}

// An image is one embedding, a feature file one a row, a folder all of its files.
std::vector<Named> read_embeddings(const Network& network, const std::string& path) {
  std::vector<Named> found;
  if (fs::is_directory(path)) {
    std::vector<std::string> files;
    for (const fs::directory_entry& entry : fs::directory_iterator(path)) {
      if (entry.is_regular_file()) {
        files.push_back(entry.path().string());
      }
    }
    std::sort(files.begin(), files.end());
    for (const std::string& file : files) {
      const std::vector<Named> of_file = read_embeddings(network, file);
      found.insert(found.end(), of_file.begin(), of_file.end());
    }
  } else if (has_extension(path, ".csv")) {
    for (const std::vector<std::string>& row : read_csv(path)) {
      torch::Tensor embedding = torch::empty({static_cast<int64_t>(row.size()) - 1});
      for (size_t k = 1; k < row.size(); ++k) {
        embedding[static_cast<int64_t>(k) - 1] = to_number(row[k], path);
      }
      found.push_back({row[0], to_unit(embedding, "'" + row[0] + "' in " + path)});
    }
  } else {
    found.push_back({fs::path(path).filename().string(), to_unit(network.embed(path), path)});
  }
  return found;
}

Named read_one(const Network& network, const std::string& path) {
  const std::vector<Named> found = read_embeddings(network, path);
  if (found.size() != 1) {
    throw std::runtime_error(
        "verify compares single embeddings, but " + path + " holds " + std::to_string(found.size()));
  }
  return found.front();
}

void check_same_size(const Named& a, const Named& b) {
  if (a.embedding.size(0) != b.embedding.size(0)) {
    throw std::runtime_error(
        a.name + " has " + std::to_string(a.embedding.size(0)) + " features, " + b.name + " " +
        std::to_string(b.embedding.size(0)));
  }
}

void verify(const Arguments& arguments) {
  if (arguments.words.size() != 4) {
    throw std::invalid_argument("verify wants MODEL A B");
  }
  const Network network(arguments.words[1]);
  const Named a = read_one(network, arguments.words[2]);
  const Named b = read_one(network, arguments.words[3]);
  check_same_size(a, b);
  const double cosine = a.embedding.dot(b.embedding).item<double>();
  std::printf("%s\tcosine %.4f\n", cosine >= arguments.number("threshold") ? "same" : "different", cosine);
}

void identify(const Arguments& arguments) {
  if (arguments.words.size() < 3 || arguments["gallery"].empty()) {
    throw std::invalid_argument("identify wants MODEL PROBE... --gallery FOLDER_OR_CSV");
  }
  const Network network(arguments.words[1]);
  const std::vector<Named> gallery = read_embeddings(network, arguments["gallery"]);
  if (gallery.empty()) {
    throw std::runtime_error("the gallery " + arguments["gallery"] + " is empty");
  }
  std::vector<torch::Tensor> rows;
  for (const Named& entry : gallery) {
    check_same_size(gallery.front(), entry);
    rows.push_back(entry.embedding);
  }
  const torch::Tensor matrix = torch::stack(rows); // [N, D]
  const double top = arguments.number("top");
  if (top < 1) {
    throw std::invalid_argument("--top wants at least 1");
  }
  const int64_t count = std::min(static_cast<int64_t>(top), matrix.size(0));
  for (size_t i = 2; i < arguments.words.size(); ++i) {
    const std::vector<Named> probes = read_embeddings(network, arguments.words[i]);
    std::vector<torch::Tensor> of_probes;
    for (const Named& probe : probes) {
      check_same_size(probe, gallery.front());
      of_probes.push_back(probe.embedding);
    }
    if (probes.empty()) {
      continue;
    }
    const auto [cosines, places] = search_gallery(torch::stack(of_probes), matrix, count);
    for (size_t p = 0; p < probes.size(); ++p) {
      for (int64_t rank = 0; rank < count; ++rank) {
        const auto row = static_cast<int64_t>(p);
        std::printf(
            "%s\t%ld\t%s\tcosine %.4f\n", probes[p].name.c_str(), rank + 1,
            gallery[static_cast<size_t>(places[row][rank].item<int64_t>())].name.c_str(),
            cosines[row][rank].item<double>());
      }
    }
  }
}

void enroll(const Arguments& arguments) {
  if (arguments.words.size() < 3) {
    throw std::invalid_argument("enroll wants MODEL FILE... --output gallery.csv");
  }
  const Network network(arguments.words[1]);
  std::ofstream file(arguments["output"]);
  int64_t count = 0;
  for (size_t i = 2; i < arguments.words.size(); ++i) {
    for (const Named& entry : read_embeddings(network, arguments.words[i])) {
      file << entry.name;
      for (int64_t k = 0; k < entry.embedding.size(0); ++k) {
        file << ',' << entry.embedding[k].item<float>();
      }
      file << '\n';
      ++count;
    }
  }
  file.close();
  if (!file) {
    throw std::runtime_error("cannot write '" + arguments["output"] + "'");
  }
  std::printf("%ld embeddings in %s\n", count, arguments["output"].c_str());
}

void run(const Arguments& arguments) {
  const torch::NoGradGuard no_grad;
  const std::string what = arguments.words.empty() ? "" : arguments.words[0];
  if (what == "verify") {
    verify(arguments);
  } else if (what == "identify") {
    identify(arguments);
  } else if (what == "enroll") {
    enroll(arguments);
  } else {
    throw std::invalid_argument("expected verify, identify or enroll");
  }
}

} // namespace

int main(int argc, char** argv) {
  try {
    run(Arguments(argc, argv, {{"threshold", "0.5"}, {"gallery", ""}, {"top", "5"}, {"output", "gallery.csv"}}));
  } catch (const c10::Error& error) {
    std::cerr << "embedder: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "embedder: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
