// Device build: see step_kernels.h. Compiled to PTX by nvcc ahead of time, or by NVRTC where it is first used.
#include "step_kernels.h"

// One block: every thread must have read the cursor before it moves on.
extern "C" __global__ void diagd_advance(const diagd::AdvanceArguments arguments) {
  const int32_t* record = arguments.records + *arguments.cursor;
  diagd::advance_thread(arguments, record, threadIdx.x, blockDim.x);
  __syncthreads();
  if (threadIdx.x == 0) *arguments.cursor = record[diagd::kNext];
}

extern "C" __global__ void diagd_append(const diagd::AppendArguments arguments) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  diagd::append_thread(arguments, thread, static_cast<int64_t>(gridDim.x) * blockDim.x);
}
