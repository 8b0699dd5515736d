// The chunk plan: a pure function, so its promises are checked over many sizes.
#include <gtest/gtest.h>

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
SweepSizes on_gpu(int64_t rows, int64_t features, int64_t classes) {
  return {rows, features, classes, 4, 2, true, false, 1, torchmargin::kGpuTile};
}

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

TEST(ChunkPlan, FillsAGpu) {
  const ChunkPlan plan = choose_chunk_plan(on_gpu(1024, 512, 360232), 256 * kMiB);
  EXPECT_EQ(plan.row_tile, 1024);
  EXPECT_EQ(plan.class_chunk % torchmargin::kOutputTile, 0);
  EXPECT_LE(plan.row_tile * plan.class_chunk * 4, 32 * kMiB); // logits that stay in the L2 cache
  EXPECT_EQ(plan.input_splits, 4); // 8 x 4 output tiles of grad_input for 128 and more processors
  EXPECT_EQ(choose_chunk_plan(on_gpu(4096, 512, 360232), 256 * kMiB).input_splits, 1);
  EXPECT_EQ(choose_chunk_plan(on_gpu(64, 512, 360232), 256 * kMiB).input_splits, torchmargin::kMostSplits);
  EXPECT_EQ(choose_chunk_plan(on_gpu(64, 512, 300), 256 * kMiB).input_splits, 1); // too few classes
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
    return choose_operands(torchmargin::kGpuTraits, dtype, compute);
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
