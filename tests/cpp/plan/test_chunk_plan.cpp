// The chunk plan: a pure function, so its promises are checked over many sizes.
#include <gtest/gtest.h>

#include <array>
#include <string>

#include "plan/chunk_plan.h"
#include "plan/operands.h"

namespace {

using torchmargin::choose_chunk_plan;
using torchmargin::ChunkPlan;
using torchmargin::kept_columns;
using torchmargin::SweepSizes;

constexpr int64_t kMiB = int64_t{1} << 20;

SweepSizes float32(int64_t rows, int64_t features, int64_t classes) {
  return {rows, features, classes, 4, 4, false, false, 2};
}

// float32 parameters with 16-bit products on a GPU.
SweepSizes
on_gpu(int64_t rows, int64_t features, int64_t classes, const torchmargin::GpuShape& gpu = torchmargin::kSomeGpu) {
  SweepSizes sizes{rows, features, classes, 4, 2, true, false, 1, torchmargin::gpu_traits(gpu).tile};
  sizes.fused = gpu.fused_tiles;
  return sizes;
}

// By their data sheets.
struct NamedGpu {
  const char* name;
  torchmargin::GpuShape shape;
};
constexpr std::array<NamedGpu, 5> kGpus{
    {{"A100", {108, 40 * kMiB, false}},
     {"H100", {132, 50 * kMiB, true}},
     {"H200", {132, 60 * kMiB, true}},
     {"RTX 4090", {128, 72 * kMiB, false}},
     {"B200", {148, 126 * kMiB, false}}}};

TEST(ChunkPlan, StaysUnderTheLimitOrSaysThatItCannot) {
  for (const int64_t rows : {int64_t{0}, int64_t{1}, int64_t{7}, int64_t{256}, int64_t{100000}}) {
    for (const int64_t features : {1, 8, 512}) {
      for (const int64_t classes : {int64_t{1}, int64_t{10}, int64_t{100000}, int64_t{20000000}}) {
        for (const int64_t limit : {int64_t{1024}, int64_t{4096}, kMiB, 256 * kMiB}) {
          for (const bool half : {false, true}) {
            for (const SweepSizes& sizes :
                 {SweepSizes{rows, features, classes, 4, 4, half, half, half ? 1 : 8},
                  on_gpu(rows, features, classes)}) {
              const ChunkPlan plan = choose_chunk_plan(sizes, limit);
              EXPECT_GE(plan.row_tile, 1);
              EXPECT_GE(plan.class_chunk, 1);
              EXPECT_LE(plan.class_chunk, classes);
              const int64_t kept = rows * kept_columns(plan.kept_classes, classes) * sizes.acc_bytes;
              EXPECT_EQ(plan.fits, plan.scratch_bytes <= limit);
              if (plan.fits) {
                EXPECT_LE(plan.scratch_bytes + kept, limit);
              }
              EXPECT_TRUE(plan.kept_classes == classes || plan.kept_classes % plan.class_chunk == 0);
            }
          }
        }
      }
    }
  }
}

TEST(ChunkPlan, KeepsEverythingThatFits) {
  EXPECT_EQ(choose_chunk_plan(float32(256, 512, 100000), 256 * kMiB).kept_classes, 100000);
  const ChunkPlan large = choose_chunk_plan(float32(256, 512, 1000000), 256 * kMiB);
  EXPECT_GT(large.kept_classes, 0);
  EXPECT_LT(large.kept_classes, 1000000);
}

TEST(ChunkPlan, CallsThatWaitForTheirBackwardShareWhatIsKept) {
  const SweepSizes sizes = float32(256, 512, 100000);
  const int64_t alone = choose_chunk_plan(sizes, 256 * kMiB).kept_classes;
  for (const int64_t calls : {2, 16}) {
    const ChunkPlan plan = choose_chunk_plan(sizes, 256 * kMiB, calls);
    EXPECT_LE(plan.kept_classes * calls * sizes.rows * sizes.acc_bytes + plan.scratch_bytes, 256 * kMiB);
    EXPECT_GT(plan.kept_classes, 0);
    EXPECT_LE(plan.kept_classes, alone);
  }
  EXPECT_LT(choose_chunk_plan(sizes, 256 * kMiB, 16).kept_classes, alone);
}

TEST(ChunkPlan, FewClassesHaveTilesOfMoreRows) {
  EXPECT_EQ(choose_chunk_plan(float32(4096, 512, 100), 256 * kMiB).row_tile, 1024);
  EXPECT_EQ(choose_chunk_plan(float32(4096, 512, 400), 256 * kMiB).row_tile, 256 * 512 / 400);
  EXPECT_EQ(choose_chunk_plan(float32(4096, 512, 1000), 256 * kMiB).row_tile, 256);
  EXPECT_EQ(choose_chunk_plan(float32(64, 512, 100), 256 * kMiB).row_tile, 64);
}

TEST(ChunkPlan, ShrinksClassesBeforeRows) {
  const ChunkPlan roomy = choose_chunk_plan(float32(256, 512, 100000), 256 * kMiB);
  const ChunkPlan tight = choose_chunk_plan(float32(256, 512, 100000), 4 * kMiB);
  EXPECT_LT(tight.class_chunk, roomy.class_chunk);
  EXPECT_EQ(tight.row_tile, roomy.row_tile);
  const ChunkPlan tiny = choose_chunk_plan(float32(256, 512, 100000), kMiB / 4);
  EXPECT_LT(tiny.row_tile, roomy.row_tile);
}

// The logits' output tiles of a chunk fill the processors wave after wave, and what a chunk is made of stays near the
// cache.
TEST(ChunkPlan, FillsAGpuInWholeWaves) {
  const auto filled = [](const NamedGpu& gpu, int64_t rows, const ChunkPlan& plan) {
    const int64_t tiles = (rows + 127) / 128 * (plan.class_chunk / 256);
    const int64_t waves = (tiles + gpu.shape.processors - 1) / gpu.shape.processors;
    return static_cast<double>(tiles) / static_cast<double>(waves * gpu.shape.processors);
  };
  for (const NamedGpu& gpu : kGpus) {
    for (const int64_t rows : {128, 256, 512, 1024, 2048, 4096}) {
      const SweepSizes sizes = on_gpu(rows, 512, 2'000'000, gpu.shape);
      const ChunkPlan plan = choose_chunk_plan(sizes, int64_t{1} << 30);
      SCOPED_TRACE(std::string(gpu.name) + ", B = " + std::to_string(rows) + ": " + std::to_string(plan.class_chunk));
      EXPECT_EQ(plan.row_tile, rows);
      EXPECT_EQ(plan.class_chunk % 256, 0);
      if ((rows + 127) / 128 * (plan.class_chunk / 256) >= gpu.shape.processors) { // else not one wave fits the cache
        EXPECT_GE(filled(gpu, rows, plan), 0.95);
      }
      const int64_t bytes = rows * plan.class_chunk * (sizes.fused ? 2 : 6) + plan.class_chunk * 512 * 6;
      EXPECT_LE(bytes, 4 * gpu.shape.l2_bytes);
      EXPECT_GE(bytes, gpu.shape.l2_bytes);
    }
  }
  EXPECT_EQ(choose_chunk_plan(on_gpu(1024, 512, 360232, kGpus[2].shape), 256 * kMiB).class_chunk, 33792);
  EXPECT_EQ(choose_chunk_plan(on_gpu(1024, 512, 9000, kGpus[2].shape), 256 * kMiB).class_chunk, 9000); // all at once
}

TEST(ChunkPlan, SlicesTheInputsGradientWhereRowsAreFew) {
  const auto splits = [](int64_t rows, int64_t classes) {
    return choose_chunk_plan(on_gpu(rows, 512, classes), 256 * kMiB).input_splits;
  };
  EXPECT_EQ(splits(1024, 360232), 2); // 8 x 4 output tiles of grad_input for half of 132 processors
  EXPECT_EQ(splits(4096, 360232), 1);
  EXPECT_EQ(splits(64, 360232), torchmargin::kMostSplits);
  EXPECT_EQ(splits(64, 300), 1); // too few classes
}

// What is never written is not kept.
TEST(ChunkPlan, FusedTilesKeepNothingAndTakeLess) {
  const ChunkPlan fused = choose_chunk_plan(on_gpu(1024, 512, 360232, kGpus[1].shape), 256 * kMiB);
  torchmargin::GpuShape shape = kGpus[1].shape;
  shape.fused_tiles = false;
  const ChunkPlan apart = choose_chunk_plan(on_gpu(1024, 512, 360232, shape), 256 * kMiB);
  EXPECT_EQ(fused.kept_classes, 0);
  EXPECT_GT(apart.kept_classes, 0);
  EXPECT_LT(fused.scratch_bytes / fused.class_chunk, apart.scratch_bytes / apart.class_chunk);
}

TEST(ChunkPlan, WorkspaceRowsBeginAt16Bytes) {
  EXPECT_EQ(on_gpu(1, 1, 1).padded(1), 8);
  EXPECT_EQ(on_gpu(1, 1, 1).padded(512), 512);
  EXPECT_EQ(float32(1, 1, 1).padded(7), 7);
  EXPECT_EQ(kept_columns(61, 61), 64);
  EXPECT_EQ(kept_columns(12, 61), 12);
}

// What is read in which form: the contract's list.
TEST(Operands, AreChosenByDtypeAndDevice) {
  using c10::ScalarType;
  using torchmargin::choose_operands;
  const auto gpu = [](ScalarType dtype, std::optional<ScalarType> compute = std::nullopt) {
    return choose_operands(torchmargin::gpu_traits(torchmargin::kSomeGpu), dtype, compute);
  };
  for (const ScalarType narrow : {ScalarType::Half, ScalarType::BFloat16}) {
    EXPECT_EQ(choose_operands(torchmargin::kCpuTraits, ScalarType::Float, narrow).dtype, ScalarType::Float);
    EXPECT_EQ(choose_operands(torchmargin::kCpuTraits, narrow, std::nullopt).dtype, ScalarType::Float);
    EXPECT_EQ(gpu(ScalarType::Float, narrow).dtype, ScalarType::Half);
    EXPECT_TRUE(gpu(ScalarType::Float, narrow).unit_vectors);
  }
  EXPECT_EQ(gpu(ScalarType::Float).dtype, ScalarType::Float);
  EXPECT_EQ(gpu(ScalarType::Float, ScalarType::Float).dtype, ScalarType::Float);
  EXPECT_EQ(gpu(ScalarType::Double).dtype, ScalarType::Double);
  EXPECT_TRUE(gpu(ScalarType::Half).unit_vectors);
  EXPECT_EQ(gpu(ScalarType::BFloat16).dtype, ScalarType::BFloat16);
  EXPECT_FALSE(gpu(ScalarType::BFloat16).unit_vectors);
}

TEST(ChunkPlan, IndicesPast32Bits) {
  const ChunkPlan plan = choose_chunk_plan(float32(int64_t{1} << 22, 512, int64_t{1} << 24), 256 * kMiB);
  EXPECT_TRUE(plan.fits);
  EXPECT_EQ(plan.kept_classes, 0);
  EXPECT_EQ(plan.lanes, 1); // operands of all rows would not fit
}

} // namespace
