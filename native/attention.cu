// Attention over cached slots, divided among blocks by slots as well ("flash decoding", Dao et al., 2023).
//
// A step has few rows and many slots: kernels that give a block to each head leave most of a GPU idle. The
// online softmax and the layout of fragments are those of FlashAttention-2 (arXiv 2307.08691). Compiled by NVRTC
// for one HEAD_SIZE; needs compute capability 8.0 (mma.m16n8k16, cp.async).
#include "attention.h"

using u32 = unsigned int;

constexpr int kSize = HEAD_SIZE;
constexpr int kStride = kSize + 8;  // elements of a row in shared memory: eight rows fall into different banks
constexpr int kSteps = kSize / 16;
constexpr int kChunks = kSize / 8;  // of 16 bytes in a row
constexpr int kColumns = diagd::kTileSlots / 8;
constexpr float kLowest = -1e30f;        // below every score
constexpr float kHidden = -29000.0f;     // added to a score, it makes its weight exactly 0 beside any visible one
constexpr u32 kHiddenPair = 0xfbfffbff;  // twice the lowest float16

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

__device__ __forceinline__ void copy_chunk(u32 target, const half* source, bool there) {
  const int bytes = there ? 16 : 0;  // what is not read is zero
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes));
}

__device__ __forceinline__ void load_matrices(u32 (&m)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address));
}

__device__ __forceinline__ void load_transposed(u32 (&m)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address));
}

// c [16, 8] += a [16, 16] b [16, 8]
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two neighbours of a row of the mask, of which ``left`` are there.
__device__ __forceinline__ u32 mask_pair(const half* added, int left, bool aligned) {
  if (left <= 0) return kHiddenPair;
  if (aligned) return *reinterpret_cast<const u32*>(added);
  return added[0] | (left > 1 ? static_cast<u32>(added[1]) << 16 : kHiddenPair & 0xffff0000u);
}

__device__ __forceinline__ float of_four(float x, bool greatest) {
  for (int lanes = 1; lanes <= 2; lanes *= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, x, lanes);
    x = greatest ? fmaxf(x, other) : x + other;
  }
  return x;
}

// Grid: splits x blocks of rows x heads. Each warp has 16 rows; a lane has columns 2 (lane % 4) and the next of
// rows lane / 4 and lane / 4 + 8.
extern "C" __global__ void __launch_bounds__(32 * diagd::kMostWarps, 2)
    diagd_attend(const diagd::AttendArguments arguments) {
  extern __shared__ __align__(16) half memory[];
  constexpr int kTile = diagd::kTileSlots * kStride;
  const int lane = threadIdx.x % 32, group = lane / 4, pair = 2 * (lane % 4);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int head = blockIdx.z, rows = arguments.rows, slots = arguments.slots;
  const int first_row = (blockIdx.y * warps + warp) * diagd::kTileRows;
  const int first_tile = blockIdx.x * arguments.split_tiles;
  const int all_tiles = (slots + diagd::kTileSlots - 1) / diagd::kTileSlots;
  const int tiles = min(arguments.split_tiles, all_tiles - first_tile);
  const int64_t cache = static_cast<int64_t>(head) * slots * kSize;
  const half* keys = static_cast<const half*>(arguments.keys) + cache;
  const half* values = static_cast<const half*>(arguments.values) + cache;
  const half* queries = static_cast<const half*>(arguments.queries) + static_cast<int64_t>(head) * rows * kSize;
  const half* mask = static_cast<const half*>(arguments.mask) + head / arguments.heads_a_stream * arguments.mask_stride;

  const bool has[2] = {first_row + group < rows, first_row + group + 8 < rows};

  auto fetch = [&](int tile) {  // into its stage
    if (tile < tiles) {
      half* target = memory + tile % diagd::kStages * 2 * kTile;
      for (int chunk = threadIdx.x; chunk < diagd::kTileSlots * kChunks; chunk += blockDim.x) {
        const int row = chunk / kChunks, column = chunk % kChunks * 8;
        const int slot = (first_tile + tile) * diagd::kTileSlots + row;
        const bool there = slot < slots;
        const int64_t source = static_cast<int64_t>(there ? slot : 0) * kSize + column;
        copy_chunk(shared_address(target + row * kStride + column), keys + source, there);
        copy_chunk(shared_address(target + kTile + row * kStride + column), values + source, there);
      }
    }
    asm volatile("cp.async.commit_group;");
  };

  u32 added[kColumns][2];  // of the mask, for the tile that comes next
  auto look = [&](int tile) {
    for (int n = 0; n < kColumns; ++n) {
      for (int side = 0; side < 2; ++side) {
        const half* row = mask + static_cast<int64_t>(first_row + group + 8 * side) * slots;
        const int slot = (first_tile + tile) * diagd::kTileSlots + 8 * n + pair;
        added[n][side] = has[side] ? mask_pair(row + slot, slots - slot, slots % 2 == 0) : kHiddenPair;
      }
    }
  };

  u32 query[kSteps][4];
  for (int step = 0; step < kSteps; ++step) {
    for (int part = 0; part < 4; ++part) {
      const int row = first_row + group + part % 2 * 8, column = step * 16 + pair + part / 2 * 8;
      const half* pairs = queries + static_cast<int64_t>(row) * kSize + column;
      query[step][part] = has[part % 2] ? *reinterpret_cast<const u32*>(pairs) : 0;
    }
  }
  float out[kSize / 8][4] = {}, greatest[2] = {kLowest, kLowest}, weight[2] = {0.0f, 0.0f};
  for (int tile = 0; tile < diagd::kStages - 1; ++tile) fetch(tile);
  look(0);

  for (int tile = 0; tile < tiles; ++tile) {
    asm volatile("cp.async.wait_group %0;" ::"n"(diagd::kStages - 2));
    __syncthreads();  // the tile is there for all, and the stage that is filled next has been read by all
    fetch(tile + diagd::kStages - 1);
    const half* tile_keys = memory + tile % diagd::kStages * 2 * kTile;
    const half* tile_values = tile_keys + kTile;

    float score[kColumns][4];
    bool visible = false;
    for (int n = 0; n < kColumns; ++n) {
      for (int part = 0; part < 4; ++part) {
        const u32 both = added[n][part / 2];
        score[n][part] = to_float(part % 2 ? both >> 16 : both & 0xffff);
        visible |= score[n][part] > kHidden;
      }
    }
    look(tile + 1);
    if (!__any_sync(0xffffffffu, visible)) continue;
    float products[kColumns][4] = {};
    for (int step = 0; step < kSteps; ++step) {
      for (int n = 0; n < diagd::kTileSlots / 16; ++n) {
        u32 b[4];
        const int slot = n * 16 + lane / 16 * 8 + lane % 8, column = step * 16 + lane / 8 % 2 * 8;
        load_matrices(b, shared_address(tile_keys + slot * kStride + column));
        multiply(products[2 * n], query[step], b[0], b[1]);
        multiply(products[2 * n + 1], query[step], b[2], b[3]);
      }
    }
    float rescale[2];
    for (int side = 0; side < 2; ++side) {
      float most = kLowest;
      for (int n = 0; n < kColumns; ++n) {
        for (int part = 2 * side; part < 2 * side + 2; ++part) {
          score[n][part] = products[n][part] * arguments.scale + score[n][part] * 1.4426950408889634f;
          most = fmaxf(most, score[n][part]);
        }
      }
      most = fmaxf(greatest[side], of_four(most, true));
      rescale[side] = exp2_fast(greatest[side] - most);
      greatest[side] = most;
      float sum = 0.0f;
      for (int n = 0; n < kColumns; ++n) {
        for (int part = 2 * side; part < 2 * side + 2; ++part) {
          score[n][part] = exp2_fast(score[n][part] - most);
          sum += score[n][part];
        }
      }
      weight[side] = weight[side] * rescale[side] + sum;
    }
    if (__any_sync(0xffffffffu, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
      for (int n = 0; n < kSize / 8; ++n) {
        for (int part = 0; part < 4; ++part) out[n][part] *= rescale[part / 2];
      }
    }
    for (int step = 0; step < diagd::kTileSlots / 16; ++step) {
      const u32 a[4] = {packed(score[2 * step][0], score[2 * step][1]), packed(score[2 * step][2], score[2 * step][3]),
                        packed(score[2 * step + 1][0], score[2 * step + 1][1]),
                        packed(score[2 * step + 1][2], score[2 * step + 1][3])};
      for (int n = 0; n < kSize / 16; ++n) {
        u32 b[4];
        const int slot = step * 16 + lane / 8 % 2 * 8 + lane % 8, column = n * 16 + lane / 16 * 8;
        load_transposed(b, shared_address(tile_values + slot * kStride + column));
        multiply(out[2 * n], a, b[0], b[1]);
        multiply(out[2 * n + 1], a, b[2], b[3]);
      }
    }
  }
  asm volatile("cp.async.wait_all;");

  for (int side = 0; side < 2; ++side) {
    const float total = of_four(weight[side], false), share = total > 0.0f ? 1.0f / total : 0.0f;
    const int row = first_row + group + 8 * side;
    if (!has[side]) continue;
    if (arguments.splits == 1) {
      half* target = static_cast<half*>(arguments.out) + diagd::place_of(arguments, head, row) * kSize + pair;
      for (int n = 0; n < kSize / 8; ++n) {
        *reinterpret_cast<u32*>(target + 8 * n) = packed(out[n][2 * side] * share, out[n][2 * side + 1] * share);
      }
    } else {
      float* target = arguments.partial +
                      ((static_cast<int64_t>(head) * arguments.splits + blockIdx.x) * rows + row) * (kSize + 2);
      for (int n = 0; n < kSize / 8; ++n) {
        *reinterpret_cast<float2*>(target + 8 * n + pair) = make_float2(out[n][2 * side], out[n][2 * side + 1]);
      }
      if (pair == 0) *reinterpret_cast<float2*>(target + kSize) = make_float2(greatest[side], total);
    }
  }
}

// What the splits found, in one. Grid: rows x heads. A thread has two columns of every kBeside-th split.
extern "C" __global__ void diagd_attend_combine(const diagd::AttendArguments arguments) {
  __shared__ float found[diagd::kBeside][kSize + 2];
  const int row = blockIdx.x, head = blockIdx.y, column = 2 * threadIdx.x, first = threadIdx.y;
  const int64_t between = static_cast<int64_t>(arguments.rows) * (kSize + 2);
  const float* partial = arguments.partial + head * arguments.splits * between +
                         static_cast<int64_t>(row) * (kSize + 2);
  float low = 0.0f, high = 0.0f, total = 0.0f, most = kLowest;
  for (int split = first; split < arguments.splits; split += diagd::kBeside) {
    const float* part = partial + split * between;
    const float2 sums = *reinterpret_cast<const float2*>(part + column);
    const float2 law = *reinterpret_cast<const float2*>(part + kSize);  // its greatest score and its weight
    const float greatest = fmaxf(most, law.x);
    const float before = exp2_fast(most - greatest), share = exp2_fast(law.x - greatest);
    low = low * before + share * sums.x, high = high * before + share * sums.y;
    total = total * before + share * law.y, most = greatest;
  }
  found[first][column] = low, found[first][column + 1] = high;
  if (threadIdx.x == 0) found[first][kSize] = most, found[first][kSize + 1] = total;
  __syncthreads();
  if (first != 0) return;
  for (int other = 1; other < diagd::kBeside; ++other) most = fmaxf(most, found[other][kSize]);
  low = high = total = 0.0f;
  for (int other = 0; other < diagd::kBeside; ++other) {
    const float share = exp2_fast(found[other][kSize] - most);
    low += share * found[other][column], high += share * found[other][column + 1];
    total += share * found[other][kSize + 1];
  }
  half* target = static_cast<half*>(arguments.out) + diagd::place_of(arguments, head, row) * kSize;
  const float share = total > 0.0f ? 1.0f / total : 0.0f;  // a row that sees nothing gives zeros
  *reinterpret_cast<u32*>(target + column) = packed(low * share, high * share);
}
