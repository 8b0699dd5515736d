// The seam's kernels and the elementwise ops on a CUDA stream: raw pointers to device memory,
// no ATen, no synchronisation, no allocation. Each launcher enqueues and returns.
#pragma once

#include "sweep/cosine_kernels.h"
#include "sweep/kernels.h"
#include "sweep/loss_kernels.h"

#if defined(TORCHMARGIN_DEVICE_ON_HOST)
#include "device_on_host.h"
#else
#include <driver_types.h>
#endif

namespace torchmargin::device {

void launch_load_rows(const LoadRowsArgs& args, c10::ScalarType acc, cudaStream_t stream);
void launch_accumulate_chunk(const AccumulateChunkArgs& args, c10::ScalarType acc, cudaStream_t stream);
// What launch_accumulate_chunk and launch_softmax_chunk come down to where not only Q counts.
void launch_accumulate_head(const AccumulateChunkArgs& args, c10::ScalarType acc, cudaStream_t stream);
void launch_weigh_head(const SoftmaxChunkArgs& args, c10::ScalarType acc, cudaStream_t stream);
void launch_add_binary(const AddBinaryArgs& args, c10::ScalarType acc, cudaStream_t stream);
void launch_weigh_binary(const WeighBinaryArgs& args, c10::ScalarType acc, cudaStream_t stream);
void launch_fold_centers(const FoldCentersArgs& args, c10::ScalarType acc, cudaStream_t stream);
void launch_spread_centers(const SpreadCentersArgs& args, c10::ScalarType acc, cudaStream_t stream);
void launch_write_hardest(const WriteHardestArgs& args, c10::ScalarType acc, cudaStream_t stream);
void launch_hard_rows(const HardRowsArgs& args, c10::ScalarType acc, cudaStream_t stream);
void launch_merge_hardest(const MergeHardestArgs& args, c10::ScalarType acc, cudaStream_t stream);
void launch_softmax_chunk(const SoftmaxChunkArgs& args, c10::ScalarType acc, cudaStream_t stream);
void launch_target_rows(const TargetRowsArgs& args, c10::ScalarType acc, cudaStream_t stream);
void launch_combine_rows(const CombineRowsArgs& args, c10::ScalarType acc, cudaStream_t stream);
void launch_finish_classes(const FinishClassesArgs& args, c10::ScalarType acc, cudaStream_t stream);
void launch_finish_own_classes(const FinishClassesArgs& args, c10::ScalarType acc, cudaStream_t stream);
void launch_widen_upstream(const WidenUpstreamArgs& args, cudaStream_t stream);
void launch_fold_sets(const FoldSetsArgs& args, cudaStream_t stream);
void launch_finish_rows(const FinishRowsArgs& args, c10::ScalarType acc, cudaStream_t stream);

void launch_loss(const LossArgs& args, cudaStream_t stream);
void launch_loss_gradient(const LossGradientArgs& args, cudaStream_t stream);

void launch_cosine_forward(const CosineForwardArgs& args, int64_t rows, cudaStream_t stream);
void launch_cosine_backward(const CosineBackwardArgs& args, int64_t rows, cudaStream_t stream);
void launch_transform(const TransformArgs& args, int64_t count, cudaStream_t stream);

} // namespace torchmargin::device
