// A tile of rows against classes in one pass on Hopper (sm_90a): the product, and from the registers that hold it the
// sums of its exponentials or its softmax weights. The logits are never written. Operands of 16 bits.
//
// A block makes tiles of 128 rows x 256 classes, one after the other. Its first warpgroup copies slices of 64 features
// to a ring of stages in shared memory; the other two multiply 64 rows each. Two blocks with neighbouring rows are a
// cluster and share the classes: each copies half of them to both. While a tile is finished, the slices of the next
// one come in. Which block makes which tile follows from the sizes and the number of processors alone, and so do the
// sums' bits.
#include "hopper/fused_tile.h"

#include <atomic>
#include <cmath>

#include "hopper/hopper.cuh"
#include "kernels/interior.cuh"
#include "kernels/tile.cuh"

namespace torchmargin::hopper {
namespace {

using namespace device;

constexpr int kTileRows = 128;
constexpr int kTileClasses = 256;
constexpr int kSliceFeatures = 64; // 128 bytes: what a swizzled row holds
constexpr int kStages = 4;
constexpr int kWarpgroup = 128; // threads
constexpr int kRowsBytes = kTileRows * kSliceFeatures * 2;
constexpr int kClassesBytes = kTileClasses * kSliceFeatures * 2;
constexpr int kStageBytes = kRowsBytes + kClassesBytes;
constexpr int kFusedThreads = 3 * kWarpgroup;
constexpr int kConsumerWarps = 2 * kWarpgroup / kWarp;

struct FusedShared {
  // Copies want 1024 bytes of alignment.
  alignas(1024) unsigned char stages[kStages][kStageBytes];
  alignas(8) uint64_t full[kStages];
  alignas(8) uint64_t empty[kStages];
  float factors[2][2][kTileClasses]; // of each multiplying warpgroup: of this tile, and of one before or after it
};
constexpr int kSharedBytes = sizeof(FusedShared) + 1024; // NB: dynamic shared memory is aligned to less

// The tiles of a launch: kCluster tiles of rows, one for each block of a cluster, against a tile of classes. Those with
// the same classes follow each other.
struct Tiles {
  int32_t row_groups;
  int32_t count;
};

struct Place {
  int32_t row;
  int32_t class_index;
};

template <int kCluster>
__device__ Place place_of(const Tiles& tiles, int32_t index, uint32_t rank) {
  return {
      (index % tiles.row_groups * kCluster + static_cast<int32_t>(rank)) * kTileRows,
      index / tiles.row_groups * kTileClasses};
}

template <int kCluster>
__device__ void copy_slices(
    FusedShared& shared,
    const CUtensorMap& rows,
    const CUtensorMap& classes,
    const Tiles& tiles,
    int32_t slices,
    uint32_t rank) {
  int stage = 0;
  uint32_t parity = 0;
  for (int32_t index = blockIdx.x / kCluster; index < tiles.count; index += gridDim.x / kCluster) {
    const Place place = place_of<kCluster>(tiles, index, rank);
    for (int32_t slice = 0; slice < slices; ++slice) {
      wait_for(shared_address(&shared.empty[stage]), parity ^ 1);
      const uint32_t full = shared_address(&shared.full[stage]);
      const uint32_t to = shared_address(shared.stages[stage]);
      const int32_t feature = slice * kSliceFeatures;
      expect_bytes(full, kStageBytes);
      copy_box(to, rows, feature, place.row, full);
      if constexpr (kCluster == 1) {
        copy_box(to + kRowsBytes, classes, feature, place.class_index, full);
        copy_box(to + kRowsBytes + kClassesBytes / 2, classes, feature, place.class_index + kTileClasses / 2, full);
      } else {
        copy_box_to_all(
            to + kRowsBytes + rank * (kClassesBytes / 2), classes, feature,
            place.class_index + static_cast<int32_t>(rank) * (kTileClasses / 2), full, uint16_t(3));
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
      parity ^= stage == 0;
    }
  }
}

// A warpgroup's threads alone.
__device__ inline void warpgroup_sync(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// acc = the products of 64 rows and 256 classes. Thread t of the warpgroup has, of rows t / 32 * 16 + t % 32 / 4 + 8 h,
// the columns 8 j + 2 (t % 4) + e in acc[4 j + 2 h + e].
template <typename Operand, int kCluster>
__device__ __forceinline__ void
make_products(FusedShared& shared, float (&acc)[128], int group, int32_t slices, int& stage, uint32_t& parity) {
  const auto release = [&](int of) {
    if (threadIdx.x % kWarp == 0) {
      for (int rank = 0; rank < kCluster; ++rank) {
        arrive_at(shared_address(&shared.empty[of]), rank);
      }
    }
  };
  int last = 0;
  for (int32_t slice = 0; slice < slices; ++slice) {
    wait_for(shared_address(&shared.full[stage]), parity);
    const uint32_t from = shared_address(shared.stages[stage]);
    const uint64_t a = matrix_descriptor(from + group * (kRowsBytes / 2));
    const uint64_t b = matrix_descriptor(from + kRowsBytes);
    begin_products();
#pragma unroll
    for (int k = 0; k < kSliceFeatures / 16; ++k) { // 32 bytes each
      multiply_16<Operand>(acc, a + 2 * k, b + 2 * k, slice > 0 || k > 0);
    }
    commit_products();
    if (slice > 0) {
      wait_for_products<1>();
      release(last);
    }
    last = stage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
    parity ^= stage == 0;
  }
  wait_for_products<0>();
  release(last);
}

// What memory holds of one of the two rows of a thread: read before the products, looked at after them.
struct LoadedRow {
  int64_t target;
  double lse; // of weights; of sums the sum so far
  double upstream; // of weights; of sums the largest so far
  float factor;
  bool any; // there is such a row
};

// A set for each cluster.
template <int kCluster>
__device__ inline int64_t place_of_sum(const FusedTileArgs& args, int64_t row) {
  return static_cast<int64_t>(blockIdx.x / kCluster) * args.set_stride + row;
}

template <bool kWeigh, int kCluster>
__device__ __forceinline__ LoadedRow load_row(const FusedTileArgs& args, int64_t row) {
  LoadedRow of{-1, 0.0, 0.0, 1.0F, row < args.tile.row_count};
  if (of.any) {
    of.target = args.tile.target[row];
    of.factor = args.tile.row_factors != nullptr ? static_cast<const float*>(args.tile.row_factors)[row] : 1.0F;
    if (kWeigh) {
      of.lse = args.other_lse[row];
      of.upstream = args.upstream[row];
    } else if (threadIdx.x % 4 == 0) {
      of.lse = args.sum[place_of_sum<kCluster>(args, row)];
      of.upstream = args.maximum[place_of_sum<kCluster>(args, row)];
    }
  }
  return of;
}

__device__ inline int32_t own_column(const FusedTileArgs& args, const LoadedRow& row, int32_t first_class) {
  const int64_t own = row.target - args.tile.first_class - first_class;
  return own >= 0 && own < kTileClasses ? static_cast<int32_t>(own) : -1;
}

// What a thread has of a row, where it does not count: in its own class's column and past the last one.
__device__ __forceinline__ void mask_columns(float (&acc)[128], int h, int32_t own, int left, bool all, float masked) {
#pragma unroll
  for (int j = 0; j < 32; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = 8 * j + 2 * static_cast<int>(threadIdx.x % 4) + e;
      float& z = acc[4 * j + 2 * h + e];
      z = column == own || column >= left || all ? masked : z;
    }
  }
}

// The sums of 2^(exponent) of a thread's half of a row, of its four lanes together. At most 16 terms are summed in
// float32.
template <bool kFactors, int kCluster>
__device__ __forceinline__ void add_row(
    const FusedTileArgs& args,
    float (&acc)[128],
    int h,
    int64_t row,
    const LoadedRow& loaded,
    const float* factors,
    int32_t first_class,
    int left) {
  const int quad = static_cast<int>(threadIdx.x % 4);
  const int32_t own = own_column(args, loaded, first_class);
  const float row_scale = static_cast<float>(args.tile.scale) * loaded.factor;
  if constexpr (kFactors) {
#pragma unroll
    for (int j = 0; j < 32; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& z = acc[4 * j + 2 * h + e];
        z = scaled_product(z, factors[8 * j + 2 * quad + e], row_scale);
      }
    }
  }
  if (left < kTileClasses || own >= 0) { // rare
    mask_columns(acc, h, own, left, /*all=*/false, -INFINITY);
  }
  const float scale = kFactors ? static_cast<float>(kLog2E) : static_cast<float>(args.tile.scale * kLog2E);
  float largest = -INFINITY;
  double sum = 0.0;
#pragma unroll
  for (int group = 0; group < 4; ++group) {
    float partial = 0.0F;
#pragma unroll
    for (int j = 8 * group; j < 8 * group + 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float z = acc[4 * j + 2 * h + e];
        largest = fmaxf(largest, z); // NaN is passed over
        partial += exp2_of(z * scale);
      }
    }
    sum += static_cast<double>(partial);
  }
#pragma unroll
  for (int offset = 1; offset < 4; offset *= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  }
  if (quad == 0 && loaded.any) {
    args.sum[place_of_sum<kCluster>(args, row)] = loaded.lse + sum;
    const double logit = kFactors ? largest : scaled_product(largest, 1.0F, row_scale);
    args.maximum[place_of_sum<kCluster>(args, row)] = logit > loaded.upstream ? logit : loaded.upstream;
  }
}

// The words of four lanes, transposed: lane q has afterwards word q of each lane.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
  const bool odd = (threadIdx.x & 1) != 0;
  const bool upper = (threadIdx.x & 2) != 0;
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? words[k] : words[k + 1], 1);
    words[k] = odd ? got : words[k];
    words[k + 1] = odd ? words[k + 1] : got;
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? words[k] : words[k + 2], 2);
    words[k] = upper ? got : words[k];
    words[k + 2] = upper ? words[k + 2] : got;
  }
}

template <typename Operand, bool kFactors>
__device__ __forceinline__ void weigh_row(
    const FusedTileArgs& args,
    double log2_out_scale,
    float (&acc)[128],
    int h,
    int64_t row,
    const LoadedRow& loaded,
    const float* factors,
    int32_t first_class,
    int left) {
  const int quad = static_cast<int>(threadIdx.x % 4);
  const int32_t own = own_column(args, loaded, first_class);
  // As InteriorRow has them.
  const float scale = static_cast<float>(args.tile.scale * kLog2E * static_cast<double>(loaded.factor));
  const double lse = loaded.lse * kLog2E - log2_out_scale;
  const float high = static_cast<float>(lse);
  const double rest = lse - static_cast<double>(high);
  const float low = isfinite(rest) ? static_cast<float>(rest) : 0.0F;
  const bool used = loaded.upstream != 0.0;
  const float least = static_cast<float>(kFlush * kLog2E + log2_out_scale);
#pragma unroll
  for (int j = 0; j < 32; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float& z = acc[4 * j + 2 * h + e];
      const float factor = kFactors ? factors[8 * j + 2 * quad + e] : 1.0F;
      const float exponent = fmaf(z, kFactors ? scale * factor : scale, -high) - low;
      // NaN stays. What float16 rounds to 0 is 0 long before.
      const bool too_small = !std::is_same_v<Operand, c10::Half> && exponent < least;
      z = too_small ? 0.0F : exp2_of(exponent);
      z *= kFactors && args.times_class_factors ? factor : 1.0F;
    }
  }
  if (left < kTileClasses || own >= 0 || !used) { // rare
    mask_columns(acc, h, own, left, /*all=*/!used, 0.0F);
  }
  Operand* const out = static_cast<Operand*>(args.out) + row * args.out_row_stride + first_class + 8 * quad;
#pragma unroll
  for (int j = 0; j < 32; j += 4) {
    uint32_t words[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      words[k] = packed<Operand>(acc[4 * (j + k) + 2 * h], acc[4 * (j + k) + 2 * h + 1]);
    }
    transpose_quad(words);
    if (loaded.any && 8 * (j + quad) < left) { // NB: the rest of 16 bytes is padding of the row
      store_16_bytes(out + 8 * j, words);
    }
  }
}

template <typename Operand, bool kWeigh, bool kFactors, int kCluster>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kFusedThreads, 1) fused_tile_kernel(
    const __grid_constant__ CUtensorMap rows,
    const __grid_constant__ CUtensorMap classes,
    const __grid_constant__ FusedTileArgs args,
    double log2_out_scale,
    Tiles tiles) {
  extern __shared__ unsigned char memory[];
  FusedShared& shared = *reinterpret_cast<FusedShared*>((reinterpret_cast<uintptr_t>(memory) + 1023) / 1024 * 1024);
  const uint32_t rank = kCluster == 1 ? 0 : cluster_rank();
  const int32_t slices = static_cast<int32_t>((args.features + kSliceFeatures - 1) / kSliceFeatures);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(shared_address(&shared.full[stage]), 1);
      init_barrier(shared_address(&shared.empty[stage]), kConsumerWarps * kCluster);
    }
    fence_barriers();
  }
  cluster_sync();
  if (threadIdx.x < kWarpgroup) {
    give_registers<40>();
    if (threadIdx.x == 0) {
      copy_slices<kCluster>(shared, rows, classes, tiles, slices, rank);
    }
  } else {
    take_registers<232>();
    const int group = static_cast<int>(threadIdx.x / kWarpgroup) - 1;
    const int thread = static_cast<int>(threadIdx.x % kWarpgroup);
    int stage = 0;
    uint32_t parity = 0;
    int turn = 0;
    for (int32_t index = blockIdx.x / kCluster; index < tiles.count; index += gridDim.x / kCluster, turn ^= 1) {
      const Place place = place_of<kCluster>(tiles, index, rank);
      const int32_t left = static_cast<int32_t>(args.tile.class_count) - place.class_index;
      const int64_t row = place.row + group * (kTileRows / 2) + thread / kWarp * 16 + thread % kWarp / 4;
      const LoadedRow first = load_row<kWeigh, kCluster>(args, row);
      const LoadedRow second = load_row<kWeigh, kCluster>(args, row + 8);
      float loaded_factors[2] = {0.0F, 0.0F};
      if constexpr (kFactors) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const int32_t column = thread + part * kWarpgroup;
          if (column < left) {
            loaded_factors[part] = static_cast<const float*>(args.tile.class_factors)[place.class_index + column];
          }
        }
      }
      float acc[128];
      make_products<Operand, kCluster>(shared, acc, group, slices, stage, parity);
      float* const factors = shared.factors[group][turn];
      if constexpr (kFactors) { // NB: who reads those of the tile before this one has room of its own
        factors[thread] = loaded_factors[0];
        factors[thread + kWarpgroup] = loaded_factors[1];
        warpgroup_sync(group);
      }
      if constexpr (kWeigh) {
        weigh_row<Operand, kFactors>(args, log2_out_scale, acc, 0, row, first, factors, place.class_index, left);
        weigh_row<Operand, kFactors>(args, log2_out_scale, acc, 1, row + 8, second, factors, place.class_index, left);
      } else {
        add_row<kFactors, kCluster>(args, acc, 0, row, first, factors, place.class_index, left);
        add_row<kFactors, kCluster>(args, acc, 1, row + 8, second, factors, place.class_index, left);
      }
    }
  }
  __syncwarp();
  cluster_sync(); // no block ends while another copies to it
}

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  static const Encode found = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(pointer) : nullptr;
  }();
  return found;
}

// [rows, features] in boxes of 64 features and `box_rows` rows.
cudaError_t make_map(
    CUtensorMap& map,
    c10::ScalarType dtype,
    const void* data,
    int64_t rows,
    int64_t features,
    int64_t stride,
    uint32_t box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(features), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kSliceFeatures, box_rows};
  const cuuint32_t steps[2] = {1, 1};
  const CUtensorMapDataType type =
      dtype == c10::ScalarType::Half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = encoder()(
      &map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// A kernel may have more than 48 KiB of shared memory where that was asked for, once for each device.
cudaError_t allow_shared_memory(const void* kernel, std::atomic<uint64_t>& devices, int device) {
  const uint64_t bit = uint64_t(1) << (device % 64);
  if (device < 64 && (devices.load(std::memory_order_acquire) & bit) != 0) {
    return cudaSuccess;
  }
  const cudaError_t result = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (result == cudaSuccess && device < 64) {
    devices.fetch_or(bit, std::memory_order_release);
  }
  return result;
}

struct Launch {
  CUtensorMap rows;
  CUtensorMap classes;
  FusedTileArgs args;
  Tiles tiles;
  int device;
  int processors;
  cudaStream_t stream;
};

template <typename Operand, bool kWeigh, bool kFactors, int kCluster>
cudaError_t enqueue(const Launch& launch) {
  static std::atomic<uint64_t> devices{0};
  const auto kernel = fused_tile_kernel<Operand, kWeigh, kFactors, kCluster>;
  const cudaError_t allowed = allow_shared_memory(reinterpret_cast<const void*>(kernel), devices, launch.device);
  if (allowed != cudaSuccess) {
    return allowed;
  }
  const int most = launch.processors / kCluster;
  const int clusters = launch.tiles.count < most ? launch.tiles.count : most;
  kernel<<<clusters * kCluster, kFusedThreads, kSharedBytes, launch.stream>>>(
      launch.rows, launch.classes, launch.args, std::log2(launch.args.out_scale), launch.tiles);
  return cudaSuccess;
}

template <typename Body>
cudaError_t with_bool(bool value, Body body) {
  return value ? body(std::true_type()) : body(std::false_type());
}

} // namespace

bool can_describe_matrices() {
  return encoder() != nullptr;
}

cudaError_t launch_fused_tile(const FusedTileArgs& args, cudaStream_t stream) {
  const ProductsTile& tile = args.tile;
  if (tile.row_count == 0 || tile.class_count == 0) {
    return cudaSuccess;
  }
  Launch launch{};
  launch.args = args;
  launch.stream = stream;
  const int32_t row_tiles = static_cast<int32_t>((tile.row_count + kTileRows - 1) / kTileRows);
  const int32_t class_tiles = static_cast<int32_t>((tile.class_count + kTileClasses - 1) / kTileClasses);
  const bool pairs = row_tiles % 2 == 0 || row_tiles > 6; // else too much of the last pair is empty
  launch.tiles.row_groups = pairs ? (row_tiles + 1) / 2 : row_tiles;
  launch.tiles.count = launch.tiles.row_groups * class_tiles;
  cudaError_t result = cudaGetDevice(&launch.device);
  if (result == cudaSuccess) {
    result = cudaDeviceGetAttribute(&launch.processors, cudaDevAttrMultiProcessorCount, launch.device);
  }
  if (result == cudaSuccess) {
    result = make_map(
        launch.rows, args.dtype, args.row_operand, tile.row_count, args.features, args.row_operand_stride, kTileRows);
  }
  if (result == cudaSuccess) {
    result = make_map(
        launch.classes, args.dtype, args.class_operand, tile.class_count, args.features, args.class_operand_stride,
        kTileClasses / 2);
  }
  if (result != cudaSuccess) {
    return result;
  }
  return with_bool(args.dtype == c10::ScalarType::Half, [&](auto half) {
    using Operand = std::conditional_t<decltype(half)::value, c10::Half, c10::BFloat16>;
    return with_bool(args.out != nullptr, [&](auto weigh) {
      return with_bool(tile.class_factors != nullptr, [&](auto factors) {
        return with_bool(pairs, [&](auto paired) {
          constexpr int kCluster = decltype(paired)::value ? 2 : 1;
          return enqueue<Operand, decltype(weigh)::value, decltype(factors)::value, kCluster>(launch);
        });
      });
    });
  });
}

} // namespace torchmargin::hopper
