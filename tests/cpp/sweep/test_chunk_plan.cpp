// The chunk plan: a pure function, so its promises are checked over many sizes.
#include <gtest/gtest.h>

#include "sweep/chunk_plan.h"

namespace {

using torchmargin::choose_chunk_plan;
using torchmargin::ChunkPlan;
using torchmargin::SweepSizes;

constexpr int64_t kMiB = int64_t{1} << 20;

SweepSizes float32(int64_t rows, int64_t features, int64_t classes) {
  return {rows, features, classes, 4, false, false, 2};
}

TEST(ChunkPlan, StaysUnderTheLimitOrSaysThatItCannot) {
  for (const int64_t rows : {int64_t{0}, int64_t{1}, int64_t{7}, int64_t{256}, int64_t{100000}}) {
    for (const int64_t features : {1, 8, 512}) {
      for (const int64_t classes : {int64_t{1}, int64_t{10}, int64_t{100000}, int64_t{20000000}}) {
        for (const int64_t limit : {int64_t{1024}, int64_t{4096}, kMiB, 256 * kMiB}) {
          for (const bool half : {false, true}) {
            const SweepSizes sizes{rows, features, classes, 4, half, half, half ? 1 : 8};
            const ChunkPlan plan = choose_chunk_plan(sizes, limit);
            EXPECT_GE(plan.row_tile, 1);
            EXPECT_GE(plan.class_chunk, 1);
            EXPECT_LE(plan.class_chunk, classes);
            const int64_t kept = rows * plan.kept_classes * sizes.acc_bytes;
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

TEST(ChunkPlan, KeepsEverythingThatFits) {
  EXPECT_EQ(choose_chunk_plan(float32(256, 512, 100000), 256 * kMiB).kept_classes, 100000);
  const ChunkPlan large = choose_chunk_plan(float32(256, 512, 1000000), 256 * kMiB);
  EXPECT_GT(large.kept_classes, 0);
  EXPECT_LT(large.kept_classes, 1000000);
}

TEST(ChunkPlan, ShrinksClassesBeforeRows) {
  const ChunkPlan roomy = choose_chunk_plan(float32(256, 512, 100000), 256 * kMiB);
  const ChunkPlan tight = choose_chunk_plan(float32(256, 512, 100000), 4 * kMiB);
  EXPECT_LT(tight.class_chunk, roomy.class_chunk);
  EXPECT_EQ(tight.row_tile, roomy.row_tile);
  const ChunkPlan tiny = choose_chunk_plan(float32(256, 512, 100000), kMiB / 4);
  EXPECT_LT(tiny.row_tile, roomy.row_tile);
}

TEST(ChunkPlan, IndicesPast32Bits) {
  const ChunkPlan plan = choose_chunk_plan(float32(int64_t{1} << 22, 512, int64_t{1} << 24), 256 * kMiB);
  EXPECT_TRUE(plan.fits);
  EXPECT_EQ(plan.kept_classes, 0);
  EXPECT_EQ(plan.lanes, 1); // operands of all rows would not fit
}

} // namespace
