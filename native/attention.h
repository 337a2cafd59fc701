// Attention of a step's rows over a ring of cached slots: what a launch is given, and how it is divided.
#pragma once

#include "half.h"

namespace diagd {

constexpr int kTileRows = 16;    // of a warp: the rows of one matrix instruction
constexpr int kTileSlots = 32;   // read at a time by the warps of a block
constexpr int kStages = 3;       // tiles on their way: a third of a block's memory waits for the bus
constexpr int kLeastWarps = 3;   // of a block: those without rows help to read
constexpr int kMostWarps = 6;    // two such blocks fit the registers of a processor: one works while the other waits
constexpr int kMostSplits = 64;
constexpr int kBeside = 8;       // splits that are put together at a time

// Q [heads, rows, D], K and V [heads, slots, D], all float16 and contiguous; the mask [rows, slots], float16, is
// added to scores and is that of all heads of a stream. Rows are those of `shared` query heads, one head's after
// the other's; out is [streams, rows of a query head, query heads, D].
struct AttendArguments {
  const void* queries;
  const void* keys;
  const void* values;
  const void* mask;
  void* out;
  float* partial;       // [heads, splits, rows, D + 2]: sums, their greatest score (base 2) and their weight
  int64_t mask_stride;  // elements between the masks of two streams
  int32_t rows;
  int32_t slots;
  int32_t heads_a_stream;
  int32_t shared;
  int32_t splits;
  int32_t split_tiles;
  float scale;          // of scores, times log2(e)
};

// Where the values of a row begin in out, in heads.
DIAGD_BOTH int64_t place_of(const AttendArguments& a, int32_t head, int32_t row) {
  const int32_t stream = head / a.heads_a_stream, group = head % a.heads_a_stream, width = a.rows / a.shared;
  const int64_t place = static_cast<int64_t>(stream) * width + row % width;
  return (place * a.heads_a_stream + group) * a.shared + row / width;
}

#if !defined(__CUDACC_RTC__)  // which takes no functions of the host

// How a launch is divided: warps of a block share tiles of K and V, blocks share rows, heads and slots.
struct AttendPlan {
  int32_t warps;
  int32_t row_blocks;
  int32_t splits;
  int32_t split_tiles;
};

inline int32_t divided(int32_t count, int32_t by) { return (count + by - 1) / by; }

// Blocks that run on one processor at a time: its registers are enough for twelve warps.
inline int32_t blocks_beside(int32_t warps) { return 12 / warps; }

// As many blocks as run at a time, as long as each has a tile: one more would run alone behind all others.
inline AttendPlan attend_plan(int32_t heads, int32_t rows, int32_t slots, int32_t processors) {
  const int32_t tiles = divided(rows, kTileRows);
  AttendPlan plan;
  plan.row_blocks = divided(tiles, kMostWarps);
  plan.warps = divided(tiles, plan.row_blocks);
  plan.warps = plan.warps < kLeastWarps ? kLeastWarps : plan.warps;
  const int32_t wanted = processors * blocks_beside(plan.warps) / (heads * plan.row_blocks);
  const int32_t slot_tiles = divided(slots, kTileSlots);
  const int32_t most = wanted < kMostSplits ? wanted : kMostSplits;
  plan.split_tiles = divided(slot_tiles, most < 1 ? 1 : most);
  plan.splits = divided(slot_tiles, plan.split_tiles);
  return plan;
}

// Floats that the splits of a launch need.
inline int64_t needed_floats(const AttendPlan& plan, int32_t heads, int32_t rows, int32_t size) {
  return plan.splits == 1 ? 0 : int64_t{heads} * plan.splits * rows * (size + 2);
}

// Bytes of a block's memory: stages of a tile of K and one of V, whose rows are eight float16 longer than a head.
inline int32_t attend_shared(int32_t size) { return kStages * 2 * kTileSlots * (size + 8) * 2; }

// Floats that splits need at most: no more blocks have splits than run at a time.
inline int64_t attend_floats(int32_t processors, int32_t size) {
  int32_t most = 0;
  for (int32_t warps = kLeastWarps; warps <= kMostWarps; ++warps) {
    const int32_t rows = warps * blocks_beside(warps) * kTileRows;
    most = rows > most ? rows : most;
  }
  return int64_t{processors} * most * (size + 2);
}

#endif

}  // namespace diagd
