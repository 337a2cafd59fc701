// Device build: see layer.h. Compiled by NVRTC.
#include "layer.h"

struct BlockOfWarps {
  int lane;
  float* shared;  // of each warp
  __device__ float sum(float x) const {
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    __syncthreads();  // what was shared before has been read
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.0f;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) x += shared[warp];
    return x;
  }
};

__device__ int thread_number() { return blockIdx.x * blockDim.x + threadIdx.x; }

// A block a row; a thread has one vector of it.
extern "C" __global__ void __launch_bounds__(1024) diagd_norm(const diagd::NormArguments arguments) {
  __shared__ float shared[32];
  diagd::norm_row<diagd::kVector>(BlockOfWarps{static_cast<int>(threadIdx.x), shared}, arguments, blockIdx.x);
}

// Vectors of a row x rows.
extern "C" __global__ void diagd_embed(const diagd::EmbedArguments arguments) {
  diagd::embed_vector(arguments, blockIdx.y, thread_number() * diagd::kVector);
}

extern "C" __global__ void diagd_swiglu(const diagd::ActivationArguments arguments) {
  diagd::swiglu_vector(arguments, blockIdx.y, thread_number() * diagd::kVector);
}

extern "C" __global__ void diagd_gelu(const diagd::ActivationArguments arguments) {
  diagd::gelu_vector(arguments, blockIdx.y, thread_number() * diagd::kVector);
}
