// The seam's kernels on the CPU as plain functions over a range of rows (classes, features):
// raw pointers, no ATen, any thread may call them on ranges that do not overlap. Each row is
// done by the row kernels of the running instruction set, and every sum has a fixed order.
#pragma once

#include "sweep/kernels.h"

namespace torchmargin::cpu {

// Rows [begin, end) of LoadRowsArgs::rows.
void load_rows_range(const LoadRowsArgs& args, c10::ScalarType acc, int64_t begin, int64_t end);
// Features [begin, end) of LoadRowsArgs::sum, after all rows are loaded.
void sum_rows_range(const LoadRowsArgs& args, c10::ScalarType acc, int64_t begin, int64_t end);
// Rows [begin, end) of the tile.
void accumulate_range(const AccumulateChunkArgs& args, c10::ScalarType acc, int64_t begin, int64_t end);
void softmax_range(const SoftmaxChunkArgs& args, c10::ScalarType acc, int64_t begin, int64_t end);
void fold_centers_range(const FoldCentersArgs& args, c10::ScalarType acc, int64_t begin, int64_t end);
void spread_centers_range(const SpreadCentersArgs& args, c10::ScalarType acc, int64_t begin, int64_t end);
void add_binary_range(const AddBinaryArgs& args, c10::ScalarType acc, int64_t begin, int64_t end);
void weigh_binary_range(const WeighBinaryArgs& args, c10::ScalarType acc, int64_t begin, int64_t end);
void write_hardest_range(const WriteHardestArgs& args, c10::ScalarType acc, int64_t begin, int64_t end);
// Rows [begin, end) of all rows.
void hard_rows_range(const HardRowsArgs& args, c10::ScalarType acc, int64_t begin, int64_t end);
void merge_hardest_range(const MergeHardestArgs& args, c10::ScalarType acc, int64_t begin, int64_t end);
void target_rows_range(const TargetRowsArgs& args, c10::ScalarType acc, int64_t begin, int64_t end);
void combine_rows_range(const CombineRowsArgs& args, c10::ScalarType acc, int64_t begin, int64_t end);
void finish_rows_range(const FinishRowsArgs& args, c10::ScalarType acc, int64_t begin, int64_t end);
// Classes [begin, end) of the chunk.
void finish_classes_range(const FinishClassesArgs& args, c10::ScalarType acc, int64_t begin, int64_t end);

// All rows: little work, and the largest gradient is of all of them.
void widen_upstream(const WidenUpstreamArgs& args);

} // namespace torchmargin::cpu
