# The library's sources by layer (docs/design.md, section 3), each named here and nowhere else: the library, the CUDA build
# and the tests that compile some layers by themselves take them from here. Include it below the project() of torchmargin.

# The gates: arguments checked once, in one struct.
set(TORCHMARGIN_GATE_SOURCES
  csrc/ops/checks.cpp
  csrc/ops/margins.cpp
  csrc/ops/problem.cpp
  csrc/ops/cosine_problem.cpp
  csrc/ops/logit_bounds.cpp)

set(TORCHMARGIN_OPS_SOURCES
  csrc/ops/schema.cpp
  csrc/ops/class_weight.cpp
  csrc/ops/cross_entropy.cpp
  csrc/ops/kept_classes.cpp
  csrc/ops/linear.cpp
  csrc/ops/cosine.cpp
  csrc/ops/binary_cross_entropy.cpp
  csrc/ops/formula.cpp
  csrc/ops/hard_negatives.cpp
  csrc/ops/autograd_node.cpp
  csrc/ops/differentiable.cpp
  csrc/ops/linear_autograd.cpp
  csrc/ops/cosine_autograd.cpp
  csrc/ops/autocast.cpp
  csrc/ops/linear_meta.cpp
  csrc/ops/cosine_meta.cpp
  csrc/ops/recall_state.cpp
  csrc/ops/adaptive_margins.cpp)

# Classes over ranks.
set(TORCHMARGIN_DISTRIBUTED_SOURCES
  csrc/distributed/collectives.cpp
  csrc/distributed/merge.cpp
  csrc/distributed/class_parallel.cpp)

# Sizes and traits to plans.
set(TORCHMARGIN_PLAN_SOURCES
  csrc/plan/device_traits.cpp
  csrc/plan/sweep_plan.cpp
  csrc/plan/settings.cpp)

# The passes over the classes, for any device.
set(TORCHMARGIN_SWEEP_SOURCES
  csrc/sweep/class_loop.cpp
  csrc/sweep/row_operand.cpp
  csrc/sweep/forward_sweep.cpp
  csrc/sweep/gradient_sweep.cpp
  csrc/sweep/backward_sweep.cpp
  csrc/sweep/logits_sweep.cpp
  csrc/sweep/tile_steps.cpp
  csrc/sweep/upstream.cpp
  csrc/sweep/cosine_pass.cpp)

# The ops on the CPU.
set(TORCHMARGIN_CPU_SOURCES
  csrc/cpu/linear_cpu.cpp
  csrc/cpu/cosine_cpu.cpp
  csrc/cpu/cross_entropy_cpu.cpp
  csrc/cpu/labels_cpu.cpp
  csrc/cpu/target_values.cpp)

# What the CPU supplies to the sweep: the kernels in parallel loops,
set(TORCHMARGIN_CPU_LOOP_SOURCES
  csrc/cpu/device.cpp)

# the kernels on ranges (no ATen),
set(TORCHMARGIN_CPU_KERNEL_SOURCES
  csrc/cpu/range_kernels.cpp
  csrc/cpu/gradient_kernels.cpp
  csrc/cpu/target_kernels.cpp
  csrc/cpu/cosine_kernels.cpp)

# and the row kernels: what chooses one at run time, and what is compiled once per instruction set (no ATen).
set(TORCHMARGIN_ROW_KERNEL_DISPATCH
  csrc/cpu/row_kernels_dispatch.cpp)
set(TORCHMARGIN_ROW_KERNEL_SOURCES
  csrc/cpu/row_kernels.cpp)

set(TORCHMARGIN_API_SOURCES
  csrc/api/functional.cpp
  csrc/api/class_parallel.cpp
  csrc/api/loss_options.cpp
  csrc/api/margin_loss.cpp
  csrc/api/modules.cpp
  csrc/api/saved_numbers.cpp
  csrc/api/state_dict.cpp
  csrc/api/version.cpp)

# What the library shows to bindings, and the Python module.
set(TORCHMARGIN_INTROSPECTION_SOURCES
  csrc/bindings/introspection.cpp)
set(TORCHMARGIN_PYTHON_SOURCES
  csrc/bindings/module.cpp)

# The ops on a GPU (C++), and their kernels (no ATen).
set(TORCHMARGIN_CUDA_SOURCES
  cuda/linear_cuda.cpp
  cuda/cosine_cuda.cpp
  cuda/labels_cuda.cpp
  cuda/loss_cuda.cpp
  cuda/fused_tile.cpp)
set(TORCHMARGIN_DEVICE_KERNELS
  cuda/kernels/load_rows.cu
  cuda/kernels/accumulate_chunk.cu
  cuda/kernels/softmax_chunk.cu
  cuda/kernels/accumulate_head.cu
  cuda/kernels/weigh_head.cu
  cuda/kernels/rows.cu
  cuda/kernels/finish_classes.cu
  cuda/kernels/cosine.cu
  cuda/kernels/loss.cu)
set(TORCHMARGIN_HOPPER_KERNELS
  cuda/hopper/fused_tile.cu)

# From any folder of the project.
foreach(layer
    GATE_SOURCES OPS_SOURCES DISTRIBUTED_SOURCES PLAN_SOURCES SWEEP_SOURCES CPU_SOURCES CPU_LOOP_SOURCES CPU_KERNEL_SOURCES ROW_KERNEL_DISPATCH
    ROW_KERNEL_SOURCES API_SOURCES INTROSPECTION_SOURCES PYTHON_SOURCES CUDA_SOURCES DEVICE_KERNELS HOPPER_KERNELS)
  list(TRANSFORM TORCHMARGIN_${layer} PREPEND "${PROJECT_SOURCE_DIR}/")
endforeach()
