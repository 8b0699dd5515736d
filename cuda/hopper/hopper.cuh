// What a kernel for sm_90a says to the hardware: barriers in shared memory, bulk copies of tiles, matrix products of a
// warpgroup. PTX ISA, sections "mbarrier", "cp.async.bulk.tensor" and "wgmma".
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace torchmargin::hopper {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- barriers ------------------------------------------------------------------------------------------------------

__device__ inline void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// Initialised barriers are seen by the cluster and by copies.
__device__ inline void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Of the block with this rank in the cluster. NB: without .release.cluster, which waits for all memory: who arrives has
// written nothing.
__device__ inline void arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
__device__ inline void wait_for(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra READY;\n"
      "bra AGAIN;\n"
      "READY:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// ---- copies --------------------------------------------------------------------------------------------------------

// A box of a matrix from column x and row y on; what lies outside is 0. Its bytes are counted by the barrier.
__device__ inline void copy_box(uint32_t to, const CUtensorMap& map, int32_t x, int32_t y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(&map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}
// To the same place in every block of the cluster that the mask names, and counted there.
__device__ inline void
copy_box_to_all(uint32_t to, const CUtensorMap& map, int32_t x, int32_t y, uint32_t barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(x), "r"(y), "r"(barrier), "h"(blocks)
      : "memory");
}

// ---- products ------------------------------------------------------------------------------------------------------

// Rows of 128 bytes, eight of them a swizzled block of 1024, as copies with CU_TENSOR_MAP_SWIZZLE_128B leave them.
__device__ inline uint64_t matrix_descriptor(uint32_t address) {
  constexpr uint64_t kStrideOfEightRows = 1024 / 16;
  constexpr uint64_t kSwizzle128 = 1;
  return (static_cast<uint64_t>(address & 0x3FFFFu) >> 4) | (uint64_t(1) << 16) | (kStrideOfEightRows << 32) |
      (kSwizzle128 << 62);
}
__device__ inline void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// All but so many of the committed groups are done.
template <int kPending>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define TORCHMARGIN_ACC8(i)                                                                               \
  "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), "+f"(acc[i + 5]), \
      "+f"(acc[i + 6]), "+f"(acc[i + 7])

// clang-format off
// The product for operands of a type that PTX names so.
#define TORCHMARGIN_MULTIPLY(type)                                                                                    \
  asm volatile(                                                                                                       \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                                   \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {"                                               \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                        \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                              \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                              \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                              \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                              \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                              \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                  \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"                \
      "}, %128, %129, p, 1, 1, 0, 0;\n}\n"                                                                            \
      : TORCHMARGIN_ACC8(0), TORCHMARGIN_ACC8(8), TORCHMARGIN_ACC8(16), TORCHMARGIN_ACC8(24),                         \
        TORCHMARGIN_ACC8(32), TORCHMARGIN_ACC8(40), TORCHMARGIN_ACC8(48), TORCHMARGIN_ACC8(56),                       \
        TORCHMARGIN_ACC8(64), TORCHMARGIN_ACC8(72), TORCHMARGIN_ACC8(80), TORCHMARGIN_ACC8(88),                       \
        TORCHMARGIN_ACC8(96), TORCHMARGIN_ACC8(104), TORCHMARGIN_ACC8(112), TORCHMARGIN_ACC8(120)                     \
      : "l"(a), "l"(b), "r"(accumulate))
// clang-format on

// acc [64, 256] = or += a [64, 16] b [256, 16]^T, both from shared memory.
template <typename Operand>
__device__ inline void multiply_16(float (&acc)[128], uint64_t a, uint64_t b, int32_t accumulate) {
  if constexpr (std::is_same_v<Operand, c10::Half>) {
    TORCHMARGIN_MULTIPLY("f16");
  } else {
    static_assert(std::is_same_v<Operand, c10::BFloat16>);
    TORCHMARGIN_MULTIPLY("bf16");
  }
}
#undef TORCHMARGIN_MULTIPLY
#undef TORCHMARGIN_ACC8

template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

} // namespace torchmargin::hopper
