// Blocks of threads on the host, for tests: what native/warp.h has and what CUDA's compiler knows, in plain code.
//
// Threads of a block take turns on one processor; blocks run one after the other, in any order that is asked for.
// What a thread was not told to wait for is not there: its copies are made when it waits for them, and the memory of
// a block begins as NaN. Where threads wait that cannot meet, the program ends.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

#include "half.h"

#define DIAGD_KERNEL(threads) inline void
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define threadIdx (host::now->index)
#define blockIdx (host::block.index)
#define blockDim (host::block.size)
#define gridDim (host::block.grid)

using u32 = unsigned int;

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  u32 x, y, z, w;
};

namespace host {

constexpr size_t kStack = 128 << 10;

struct Place {
  unsigned x, y, z;
};

struct Meeting {
  unsigned arrived, generation;
};

struct Copy {
  half* target;
  const half* source;
  bool there;
};

// Words that lanes show each other, twice: a lane is at most one exchange ahead of another.
struct Warp {
  Meeting meeting;
  u32 words[2][32];
  const half* rows[2][32];
  float a[2][16][16], b[2][16][8];
};

struct Thread {
  Place index;
  Warp* warp;
  unsigned lane;
  std::deque<std::vector<Copy>> groups;
  ucontext_t context;
  bool done;
};

struct Block {
  Place index, size, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Meeting all, teams[4];
  std::vector<half> memory;
  size_t fruitless;  // turns since threads last met
  bool backwards;
  void (*work)(const void* arguments);
  const void* arguments;
  ucontext_t outside;
};

inline Block block;
inline Thread* now;

// A warp goes on until all of its threads wait for other warps: what it does not wait for has not happened.
inline Thread* next_thread() {
  const size_t warps = block.warps.size(), here = now->warp - block.warps.data(), lane = now->lane;
  const bool stays = block.fruitless % 32 != 0;
  for (size_t step = stays ? 0 : 1; step <= warps; ++step) {
    const size_t warp = (here + (block.backwards ? warps - step : step)) % warps;
    for (size_t other = 1; other <= 32; ++other) {
      Thread& thread = block.threads[32 * warp + (lane + other) % 32];
      if (!thread.done) return &thread;
    }
  }
  return nullptr;
}

inline void leave() {
  Thread *from = now, *next = next_thread();
  if (!next) setcontext(&block.outside);
  now = next;
  if (next != from) swapcontext(&from->context, &next->context);
}

inline void meet(Meeting& meeting, unsigned count) {
  const unsigned generation = meeting.generation;
  if (++meeting.arrived == count) {
    meeting.arrived = 0, ++meeting.generation, block.fruitless = 0;
    return;
  }
  while (meeting.generation == generation) {
    if (++block.fruitless > 4 * block.threads.size()) {
      std::fprintf(stderr, "threads of a block wait for others that do not come\n");
      std::abort();
    }
    leave();
  }
}

inline void begin_thread() {
  block.work(block.arguments);
  now->done = true, block.fruitless = 0;
  leave();
}

// `show` puts a lane's words into those of its warp, of which `number` is the half in use.
template <typename Show>
unsigned exchange(Show show) {
  Warp& warp = *now->warp;
  const unsigned number = warp.meeting.generation % 2;
  show(warp, number);
  meet(warp.meeting, 32);
  return number;
}

inline void run_block() {
  static std::vector<char> stacks;
  const size_t count = block.size.x * block.size.y;
  stacks.resize(count * kStack);
  block.threads.assign(count, {}), block.warps.assign(count / 32, {});
  block.all = {}, block.fruitless = 0;
  for (Meeting& team : block.teams) team = {};
  std::memset(block.memory.data(), 0xff, block.memory.size() * sizeof(half));
  for (size_t number = 0; number < count; ++number) {
    Thread& thread = block.threads[number];
    thread.index = {static_cast<unsigned>(number % block.size.x), static_cast<unsigned>(number / block.size.x), 0};
    thread.warp = &block.warps[number / 32], thread.lane = number % 32;
    thread.groups.emplace_back();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks.data() + number * kStack;
    thread.context.uc_stack.ss_size = kStack, thread.context.uc_link = nullptr;
    makecontext(&thread.context, begin_thread, 0);
  }
  now = block.backwards ? &block.threads.back() : &block.threads[0];
  swapcontext(&block.outside, &now->context);
}

// Order 0 is that of their numbers, 1 the other way round, of warps too; a prime: so many further each time.
inline void run_grid(Place grid, Place size, size_t bytes, unsigned order, void (*work)(const void*),
                     const void* arguments) {
  block.grid = grid, block.size = size, block.backwards = order % 2;
  block.work = work, block.arguments = arguments;
  block.memory.resize(bytes / sizeof(half));
  const size_t count = size_t{grid.x} * grid.y * grid.z, step = order < 2 ? 1 : order;
  for (size_t turn = 0; turn < count; ++turn) {
    const auto number = static_cast<unsigned>((order == 1 ? count - 1 - turn : turn) * step % count);
    block.index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    run_block();
  }
}

}  // namespace host

inline half* block_memory() { return host::block.memory.data(); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline u32 packed(float low, float high) { return to_half(low) | static_cast<u32>(to_half(high)) << 16; }
inline int min(int x, int y) { return std::min(x, y); }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline void __threadfence() {}
inline void __syncthreads() { host::meet(host::block.all, host::block.threads.size()); }
inline void meet_team(int team, int threads) { host::meet(host::block.teams[team], threads); }

inline unsigned atomicInc(unsigned* counter, unsigned most) {
  const unsigned found = *counter;
  *counter = found >= most ? 0 : found + 1;
  return found;
}

template <typename Words>
Words seen_by_all(const Words* place) {
  return *place;
}

inline float __shfl_xor_sync(u32, float x, int other) {
  host::Warp& warp = *host::now->warp;
  const unsigned number = host::exchange(
      [&](host::Warp& shown, unsigned half_in_use) { std::memcpy(&shown.words[half_in_use][host::now->lane], &x, 4); });
  std::memcpy(&x, &warp.words[number][host::now->lane ^ other], 4);
  return x;
}

inline bool __any_sync(u32, bool x) {
  host::Warp& warp = *host::now->warp;
  const unsigned number =
      host::exchange([&](host::Warp& shown, unsigned half_in_use) { shown.words[half_in_use][host::now->lane] = x; });
  return std::any_of(warp.words[number], warp.words[number] + 32, [](u32 word) { return word != 0; });
}

inline void copy_chunk(half* target, const half* source, bool there) {
  host::now->groups.back().push_back({target, source, there});
}

inline void end_group() { host::now->groups.emplace_back(); }

template <int kGroups>
void wait_for_groups() {
  auto& groups = host::now->groups;
  while (groups.size() > kGroups + 1) {
    for (const host::Copy& copy : groups.front()) {
      diagd::put_vector(copy.target, copy.there ? diagd::vector_at(copy.source) : diagd::Vector{});
    }
    groups.pop_front();
  }
}

// Element (row, column) of matrix `number`, whose rows the lanes 8 number .. show.
inline half shown(const half* const (&rows)[32], int number, int row, int column) {
  return rows[8 * number + row][column];
}

inline void load(u32 (&m)[4], const half* row, bool transposed) {
  host::Warp& warp = *host::now->warp;
  const int lane = host::now->lane, first = lane / 4, second = lane % 4 * 2;
  const unsigned number =
      host::exchange([&](host::Warp& shown, unsigned half_in_use) { shown.rows[half_in_use][lane] = row; });
  const auto& rows = warp.rows[number];
  for (int n = 0; n < 4; ++n) {
    const half low = transposed ? shown(rows, n, second, first) : shown(rows, n, first, second);
    const half high = transposed ? shown(rows, n, second + 1, first) : shown(rows, n, first, second + 1);
    m[n] = low | static_cast<u32>(high) << 16;
  }
}

inline void load_matrices(u32 (&m)[4], const half* row) { load(m, row, false); }
inline void load_transposed(u32 (&m)[4], const half* row) { load(m, row, true); }

inline void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const int lane = host::now->lane, group = lane / 4, pair = lane % 4 * 2;
  host::Warp& warp = *host::now->warp;
  const unsigned number = host::exchange([&](host::Warp& shown, unsigned half_in_use) {
    for (int part = 0; part < 8; ++part) {
      const u32 both = a[part / 2];
      shown.a[half_in_use][group + part / 2 % 2 * 8][pair + part / 4 * 8 + part % 2] =
          to_float(part % 2 ? both >> 16 : both & 0xffff);
    }
    for (int part = 0; part < 4; ++part) {
      const u32 both = part / 2 ? b1 : b0;
      shown.b[half_in_use][pair + part / 2 * 8 + part % 2][group] = to_float(part % 2 ? both >> 16 : both & 0xffff);
    }
  });
  for (int part = 0; part < 4; ++part) {
    for (int k = 0; k < 16; ++k)
      c[part] += warp.a[number][group + part / 2 * 8][k] * warp.b[number][k][pair + part % 2];
  }
}
