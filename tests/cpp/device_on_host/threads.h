// CUDA threads as std::threads, for ThreadSanitizer: it knows no fibers that it did not make.
#pragma once

#include <barrier>
#include <functional>
#include <thread>
#include <vector>

namespace device_on_host {

class Barrier {
 public:
  explicit Barrier(unsigned count) : barrier_(count) {}

  void arrive_and_wait() {
    barrier_.arrive_and_wait();
  }

 private:
  std::barrier<> barrier_;
};

// Runs body(0) ... body(count - 1) side by side.
inline void run_all(unsigned count, const std::function<void(unsigned)>& body) {
  std::vector<std::thread> running;
  for (unsigned thread = 0; thread < count; ++thread) {
    running.emplace_back(body, thread);
  }
  for (std::thread& thread : running) {
    thread.join();
  }
}

} // namespace device_on_host
