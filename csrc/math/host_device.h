// The mathematics of this folder is read by the C++ compiler and by nvcc.
#pragma once

#if defined(__CUDACC__)
#define TORCHMARGIN_HOST_DEVICE __host__ __device__
#else
#define TORCHMARGIN_HOST_DEVICE
#endif
