// Attention of a step's rows over a ring of cached slots: what a launch is given, and how it is divided.
#pragma once

#include "half.h"

namespace diagd {

constexpr int kTileRows = 16;    // of a warp: the rows of one matrix instruction
constexpr int kTileSlots = 32;   // read at a time by the warps of a team
constexpr int kStages = 3;       // tiles on their way: a third of a team's memory waits for the bus
constexpr int kLeastWarps = 3;   // of a team: those without rows help to read
constexpr int kMostWarps = 6;    // two such teams fit the registers of a processor: one works while the other waits
constexpr int kWarps = 12;       // that fit those registers, and a block
constexpr int kMostTeams = kWarps / kLeastWarps;
constexpr int kBeside = 4;       // splits that are put together at a time
constexpr int kTileCost = 160;   // rows that are put together in a team's time for a tile, had it the bus: see below

// All float16 and contiguous. Rows are those of `shared` query heads of a KV head, one head's after the other's:
// shared * width of each of streams * groups KV heads.
struct AttendArguments {
  const half* fused;  // [streams * width, across D]: what a product gives, of queries, then keys, then values
  const half* bias;   // [across D]; these are null where a model has none
  const half* query_norm;  // [D]
  const half* key_norm;
  const half* cosines;  // [streams * width, D / 2]
  const half* sines;
  const int32_t* positions;      // [streams, width]
  const int32_t* slot_position;  // [streams, slots]; null: every slot is seen
  const int64_t* write_index;    // [streams], slot of the first row; null: nothing is written
  half* keys;                    // [streams, groups, slots, D]
  half* values;
  half* out;          // [streams * width, groups * shared D]
  unsigned* arrived;  // [streams * groups, blocks of rows], 0 from launch to launch
  half* found;        // [streams * groups, splits, rows, D]: what each split finds by itself
  float* laws;        // [streams * groups, splits, rows, 2]: its greatest score (base 2) and its weight
  int32_t width;
  int32_t groups;
  int32_t shared;
  int32_t across;
  int32_t slots;
  int32_t splits;
  int32_t split_tiles;
  float epsilon;
  float scale;  // of scores, times log2(e)
};

#if !defined(__CUDACC_RTC__)  // which takes no functions of the host

// How a launch is divided: warps of a team share tiles of K and V, teams of a block share rows and a head, blocks
// share rows, heads and slots.
struct AttendPlan {
  int32_t warps;
  int32_t teams;
  int32_t row_blocks;
  int32_t splits;
  int32_t split_tiles;
};

inline int32_t divided(int32_t count, int32_t by) { return (count + by - 1) / by; }

// Bytes of a team's memory: stages of a tile of K and one of V, whose rows are eight float16 longer than a head.
inline int32_t team_bytes(int32_t size) { return kStages * 2 * kTileSlots * (size + 8) * 2; }

// Teams that a processor has at a time, whose blocks have so many bytes at most.
inline int32_t teams_beside(int32_t warps, int32_t size, int32_t bytes) {
  const int32_t most = bytes / team_bytes(size);
  return most < 1 ? 1 : most < kWarps / warps ? most : kWarps / warps;
}

// A GPU: its processors and the bytes that a block of one may have.
struct Processors {
  int32_t count;
  int32_t bytes;
};

// What takes least: teams go through their tiles, then one block puts together what splits found of its rows. A tile
// is 128 bytes a column, of a bus that gives each processor some 25 a nanosecond for all of its teams; a row is 2,
// from the cache of all processors, at some 64 a nanosecond.
inline AttendPlan attend_plan(int32_t heads, int32_t rows, int32_t slots, int32_t size, Processors gpu) {
  const int32_t row_tiles = divided(rows, kTileRows), slot_tiles = divided(slots, kTileSlots);
  AttendPlan plan = {}, best = {};
  plan.row_blocks = divided(row_tiles, kMostWarps);
  plan.warps = divided(row_tiles, plan.row_blocks);
  plan.warps = plan.warps < kLeastWarps ? kLeastWarps : plan.warps;
  const int32_t blocks = heads * plan.row_blocks, beside = teams_beside(plan.warps, size, gpu.bytes);
  int64_t least = INT64_MAX;
  for (plan.teams = 1; plan.teams <= beside; ++plan.teams) {
    const int32_t room = gpu.count * (beside / plan.teams);  // blocks that run at a time: splits are no more
    int32_t tiles = divided(slot_tiles, room < blocks ? 1 : room / blocks);
    for (tiles = divided(tiles, plan.teams) * plan.teams;; tiles += plan.teams) {  // of a block
      plan.split_tiles = tiles, plan.splits = divided(slot_tiles, tiles);
      const int64_t waves = divided(plan.splits * blocks, room);
      const int64_t reading = waves * (tiles / plan.teams) * beside * kTileCost;
      const int64_t cost = reading + (plan.splits > 1 ? plan.splits * divided(rows, plan.row_blocks) : 0);
      if (cost < least) least = cost, best = plan;
      if (plan.splits == 1 || reading >= least) break;
    }
  }
  return best;
}

// What splits of a launch leave for the last block: rows of all heads, none where there is one split.
inline int64_t rows_between(const AttendPlan& plan, int32_t heads, int32_t rows) {
  return plan.splits == 1 ? 0 : int64_t{heads} * plan.splits * rows;
}

// At most: no more blocks have splits than run at a time.
inline int64_t most_rows_between(int32_t processors) { return int64_t{processors} * kWarps * kTileRows; }

// Counters that blocks of rows have at most, as many.
inline int32_t most_counters(int32_t processors) { return processors * kMostTeams; }

// Bytes of memory that lies between the blocks of a launch: those counters, then such rows, a head's columns and two
// floats each.
inline int64_t bytes_between(int32_t processors, int32_t size) {
  return 4 * int64_t{most_counters(processors)} + most_rows_between(processors) * (2 * size + 8);
}

#endif

}  // namespace diagd
