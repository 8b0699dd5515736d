// A stand-in for a GPU in tests: kernels compile as C++ and every CUDA thread is a fiber (a std::thread under
// ThreadSanitizer), a block at a time. Barriers, shuffles and shared memory behave as on the device (shared memory
// starts as garbage, each array in an allocation of its own size), so that results and the sanitizers see a missing
// barrier or an overrun. It knows nothing of tensor cores, streams or timing.
#pragma once

#include <math.h> // the global names that device code uses

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include "threads.h"
#else
#include "fibers.h"
#endif

#define __global__
#define __device__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;

namespace device_on_host {

constexpr unsigned kWarp = 32;

// What the threads of the running block share.
struct Block {
  explicit Block(unsigned threads) : barrier(threads) {
    for (unsigned warp = 0; warp < threads / kWarp; ++warp) {
      warps.push_back(std::make_unique<Barrier>(kWarp));
    }
    slots.resize(threads);
  }

  void* shared(size_t index, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (index == arrays.size()) {
      arrays.push_back(std::make_unique<std::byte[]>(bytes));
      std::memset(arrays[index].get(), 0xA5, bytes);
    }
    return arrays[index].get();
  }

  Barrier barrier;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<double> slots; // for shuffles, one a thread
  std::mutex mutex;
  std::vector<std::unique_ptr<std::byte[]>> arrays;
};

inline thread_local Block* block = nullptr;
inline thread_local size_t next_array = 0;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "device_on_host: %s\n", what);
  std::abort();
}

} // namespace device_on_host

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace device_on_host {

// What a thread has of its own is its own again behind the barrier, also where all threads are one.
inline void wait_at(Barrier& barrier) {
  const dim3 own_index = threadIdx;
  const size_t own_array = next_array;
  barrier.arrive_and_wait();
  threadIdx = own_index;
  next_array = own_array;
}

} // namespace device_on_host

inline void __syncthreads() {
  device_on_host::wait_at(device_on_host::block->barrier);
}

inline double __shfl_xor_sync(unsigned mask, double value, int offset) {
  namespace host = device_on_host;
  if (mask != 0xffffffffu) {
    host::fail("a shuffle with lanes left out");
  }
  const unsigned thread = threadIdx.x;
  host::Barrier& warp = *host::block->warps[thread / host::kWarp];
  host::block->slots[thread] = value;
  host::wait_at(warp);
  const double other = host::block->slots[thread ^ static_cast<unsigned>(offset)];
  host::wait_at(warp);
  return other;
}

inline float __shfl_xor_sync(unsigned mask, float value, int offset) {
  return static_cast<float>(__shfl_xor_sync(mask, static_cast<double>(value), offset));
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  namespace host = device_on_host;
  if (mask != 0xffffffffu) {
    host::fail("a ballot with lanes left out");
  }
  const unsigned thread = threadIdx.x;
  host::Barrier& warp = *host::block->warps[thread / host::kWarp];
  host::block->slots[thread] = predicate ? 1.0 : 0.0;
  host::wait_at(warp);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < host::kWarp; ++lane) {
    votes |= (host::block->slots[thread / host::kWarp * host::kWarp + lane] != 0.0 ? 1U : 0U) << lane;
  }
  host::wait_at(warp);
  return votes;
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}

namespace device_on_host {

// Runs `body` in every thread of every block.
inline void launch(dim3 grid, dim3 threads, const std::function<void()>& body) {
  if (threads.x % kWarp != 0 || threads.x > 1024 || grid.x == 0 || grid.y == 0 || grid.y > 65535) {
    fail("a launch that a GPU refuses");
  }
  std::vector<std::unique_ptr<Block>> blocks;
  for (unsigned i = 0; i < grid.x * grid.y; ++i) {
    blocks.push_back(std::make_unique<Block>(threads.x));
  }
  Barrier together(threads.x); // one block at a time
  run_all(threads.x, [&](unsigned thread) {
    for (unsigned i = 0; i < blocks.size(); ++i) {
      threadIdx = dim3(thread, 0, 0);
      blockDim = threads;
      gridDim = grid;
      blockIdx = dim3(i % grid.x, i / grid.x, 0);
      block = blocks[i].get();
      next_array = 0;
      body();
      together.arrive_and_wait();
    }
  });
}

} // namespace device_on_host

#define TORCHMARGIN_SHARED(type, name, size) \
  type* const name =                         \
      static_cast<type*>(::device_on_host::block->shared(::device_on_host::next_array++, sizeof(type) * (size)))
#define TORCHMARGIN_UNROLL
#define TORCHMARGIN_BLOCKS_AT_ONCE(blocks)
#define TORCHMARGIN_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), ::device_on_host::launch((grid), (block), [&] { (kernel)(__VA_ARGS__); }))
