// Device build: see step_kernels.h. Compiled to PTX by nvcc ahead of time, or by NVRTC where it is first used.
#include "step_kernels.h"

// One block: every thread must have read the cursor before it moves on.
extern "C" __global__ void diagd_advance(const diagd::AdvanceArguments arguments) {
  const int32_t header = arguments.cursor[0];
  const int32_t* record = arguments.records + header;
  diagd::advance_thread(arguments, record, threadIdx.x, blockDim.x);
  __syncthreads();
  if (threadIdx.x == 0) {
    arguments.cursor[0] = record[diagd::kNext];
    arguments.cursor[1] = header;
  }
}

extern "C" __global__ void diagd_sample(const diagd::SampleArguments arguments) {
  __shared__ diagd::RowState state;
#if defined(__CUDA_ARCH__)
  const diagd::Block block = {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
  diagd::sample_draw(block, state, arguments, blockIdx.x);
#endif
}

extern "C" __global__ void diagd_append(const diagd::AppendArguments arguments) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  diagd::append_thread(arguments, thread, static_cast<int64_t>(gridDim.x) * blockDim.x);
}
