// What warps of a GPU have instructions for, from compute capability 8.0. native/warp_host.h has the same names.
#pragma once

#include "half.h"

#define DIAGD_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

using u32 = unsigned int;

// The memory of a block that a launch asks for.
__device__ __forceinline__ half* block_memory() {
  extern __shared__ __align__(16) half memory[];
  return memory;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ u32 packed(float low, float high) {
  u32 y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Eight elements into a block's memory, zeros where there are none; they are there once they were waited for.
__device__ __forceinline__ void copy_chunk(half* target, const half* source, bool there) {
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source), "r"(bytes));
}

__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;"); }

// For this thread's copies but for those of its last groups.
template <int kGroups>
__device__ __forceinline__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

__device__ __forceinline__ void load_matrices(u32 (&m)[4], const half* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row)));
}

__device__ __forceinline__ void load_transposed(u32 (&m)[4], const half* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row)));
}

// c [16, 8] += a [16, 16] b [16, 8]
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// All threads of one of at most four teams of a block.
__device__ __forceinline__ void meet_team(int team, int threads) {
  if (team == 0) asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
  if (team == 1) asm volatile("bar.sync 2, %0;" ::"r"(threads) : "memory");
  if (team == 2) asm volatile("bar.sync 3, %0;" ::"r"(threads) : "memory");
  if (team == 3) asm volatile("bar.sync 4, %0;" ::"r"(threads) : "memory");
}

// What other processors wrote in this launch: not from the first cache.
template <typename Words>
__device__ __forceinline__ Words seen_by_all(const Words* place) {
  return __ldcg(place);
}
