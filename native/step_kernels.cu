// Device build: see step_kernels.h. Compiled to PTX by nvcc ahead of time, or by NVRTC where it is first used.
#include "step_kernels.h"

// One block: every thread must have read the counter before it moves on.
extern "C" __global__ void diagd_advance(const diagd::AdvanceArguments arguments) {
  const int32_t step = *arguments.counter;
  diagd::advance_thread(arguments, diagd::record_of(arguments, step), threadIdx.x, blockDim.x);
  __syncthreads();
  if (threadIdx.x == 0) *arguments.counter = (step + 1) % arguments.records_in_ring;
}

extern "C" __global__ void diagd_append(const diagd::AppendArguments arguments) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  diagd::append_thread(arguments, thread, static_cast<int64_t>(gridDim.x) * blockDim.x);
}
