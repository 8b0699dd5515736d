#!/usr/bin/env bash
# What the CUDA kernels need of CUDA, in a manylinux_2_28 container (AlmaLinux 8), where CUDA_HOME says: /usr/local/cuda-13.0.
# Nothing where CUDA_HOME is empty.
set -euo pipefail
[ -n "${CUDA_HOME:-}" ] || exit 0
version="${CUDA_HOME##*/cuda-}"
[ "$CUDA_HOME" = "/usr/local/cuda-$version" ] || { echo "CUDA_HOME is $CUDA_HOME, not /usr/local/cuda-X.Y" >&2; exit 1; }
version="${version/./-}"
dnf -y install dnf-plugins-core
dnf config-manager --add-repo https://developer.download.nvidia.com/compute/cuda/repos/rhel8/x86_64/cuda-rhel8.repo
dnf -y install "cuda-nvcc-$version" "cuda-cudart-devel-$version" "cuda-cccl-$version"
"$CUDA_HOME/bin/nvcc" --version
