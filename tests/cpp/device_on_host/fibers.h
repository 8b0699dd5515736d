// CUDA threads as fibers of one thread, which switch at barriers: a thousand of them cost what their work costs. From
// barrier to barrier they run in another order, so that a value that goes from one to another without a barrier goes
// wrong; the orders are the same in every run.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
extern "C" void __asan_handle_no_return();
#endif

namespace device_on_host {

class Barrier {
 public:
  explicit Barrier(unsigned count) : count_(count) {}

  void arrive_and_wait();
  unsigned generation() const {
    return generation_;
  }

 private:
  unsigned count_;
  unsigned arrived_ = 0;
  unsigned generation_ = 0;
};

// Where a fiber or the thread itself goes on, as AddressSanitizer has to know it.
struct Place {
  ucontext_t context{};
  const void* stack = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
};

inline void go(Place& from, const Place& to, bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.size);
#endif
  (void)for_good;
  swapcontext(&from.context, &to.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

struct Fiber {
  Place place;
  const Barrier* waits_for = nullptr;
  unsigned generation = 0; // of that barrier when the fiber came to it
  bool ended = false;

  bool can_run() const {
    return !ended && (waits_for == nullptr || waits_for->generation() != generation);
  }
};

struct Scheduler {
  const std::function<void(unsigned)>& body;
  std::vector<Fiber> fibers;
  Place home{};
  unsigned current = 0;
};
inline thread_local Scheduler* scheduler = nullptr;

inline void Barrier::arrive_and_wait() {
  if (++arrived_ == count_) {
    arrived_ = 0;
    ++generation_;
    return;
  }
  Fiber& fiber = scheduler->fibers[scheduler->current];
  fiber.waits_for = this;
  fiber.generation = generation_;
  go(fiber.place, scheduler->home);
}

inline void begin_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler->home.stack, &scheduler->home.size);
#endif
  scheduler->body(scheduler->current);
  Fiber& fiber = scheduler->fibers[scheduler->current];
  fiber.ended = true;
#if defined(__SANITIZE_ADDRESS__)
  __asan_handle_no_return(); // the stack is the next launch's
#endif
  go(fiber.place, scheduler->home, /*for_good=*/true);
}

// Runs body(0) ... body(count - 1) side by side.
inline void run_all(unsigned count, const std::function<void(unsigned)>& body) {
#if defined(__SANITIZE_ADDRESS__)
  constexpr size_t kStack = 512 << 10;
#else
  constexpr size_t kStack = 64 << 10;
#endif
  thread_local std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() < count) {
    stacks.emplace_back(new char[kStack]);
  }
  Scheduler here{.body = body, .fibers = std::vector<Fiber>(count)};
  scheduler = &here;
  for (unsigned i = 0; i < count; ++i) {
    Place& place = here.fibers[i].place;
    place.stack = stacks[i].get();
    place.size = kStack;
    getcontext(&place.context);
    place.context.uc_stack.ss_sp = stacks[i].get();
    place.context.uc_stack.ss_size = kStack;
    makecontext(&place.context, begin_fiber, 0);
    place.context.uc_stack.ss_size = 0; // else AddressSanitizer clears its notes of all of it at every switch
  }
  static std::minstd_rand orders;
  for (unsigned left = count; left > 0;) {
    bool any = false;
    const bool upwards = orders() % 2 == 0;
    const unsigned first = orders() % count;
    for (unsigned i = 0; i < count; ++i) {
      here.current = (first + (upwards ? i : count - i)) % count;
      Fiber& fiber = here.fibers[here.current];
      if (fiber.can_run()) {
        any = true;
        go(here.home, fiber.place);
        left -= fiber.ended ? 1 : 0;
      }
    }
    if (!any) {
      std::fprintf(stderr, "device_on_host: a barrier that not every thread comes to\n");
      std::abort();
    }
  }
  scheduler = nullptr;
}

} // namespace device_on_host
