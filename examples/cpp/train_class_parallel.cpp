// The ranks of examples/cpp/class_parallel_digits.cpp as processes of this program, one for each rank:
//
//   for rank in 0 1; do train_class_parallel --rank $rank --ranks 2 --store /tmp/store & done; wait
//
// It makes a gloo process group where this LibTorch came with gloo's headers (one that was built from source; the
// wheels and archives of PyTorch have none), and says so otherwise.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>

#include "class_parallel_digits.h"
#include "common/arguments.h"

#if __has_include(<gloo/rendezvous/store.h>)
#ifndef USE_C10D_GLOO
#define USE_C10D_GLOO
#endif
#include <torch/csrc/distributed/c10d/FileStore.hpp>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

namespace {

double run(const Arguments& arguments) {
  const int rank = static_cast<int>(arguments.number("rank"));
  const int ranks = static_cast<int>(arguments.number("ranks"));
  const auto store = c10::make_intrusive<c10d::FileStore>(arguments["store"], ranks);
  const auto options = c10d::ProcessGroupGloo::Options::create();
  options->devices.push_back(c10d::ProcessGroupGloo::createDefaultDevice());
  const auto group = c10::make_intrusive<c10d::ProcessGroup>(store, rank, ranks);
  group->setBackend(
      c10::DeviceType::CPU, c10d::ProcessGroup::BackendType::GLOO,
      c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, ranks, options));
  group->setDefaultBackend(c10d::ProcessGroup::BackendType::GLOO);
  group->setGroupName("digits");
  c10d::register_process_group("digits", group);
  const double accuracy = train_class_parallel_digits(
      arguments["data"].c_str(), "digits", arguments["loss"].c_str(), static_cast<int>(arguments.number("epochs")));
  c10d::unregister_process_group("digits");
  return accuracy;
}

} // namespace
#else
namespace {

double run(const Arguments& /*arguments*/) {
  std::cerr << "train_class_parallel: not run, this LibTorch came without gloo's headers, which a C++ program needs to "
               "make a process group\n";
  std::exit(77);
}

} // namespace
#endif

int main(int argc, char** argv) {
  try {
    const Arguments arguments(
        argc, argv,
        {{"data", "examples/data/digits.csv"},
         {"epochs", "10"},
         {"loss", "arcface"},
         {"rank", "0"},
         {"ranks", "1"},
         {"store", "store"}});
    const double accuracy = run(arguments);
    std::printf("accuracy %.4f\n", accuracy);
    return accuracy < 0 ? 1 : 0;
  } catch (const std::exception& error) {
    std::cerr << "train_class_parallel: " << error.what() << "\n";
    return 1;
  }
}
