// Attention over cached slots, divided among blocks by slots as well ("flash decoding", Dao et al., 2023), from what
// the product of a layer gives of its rows: their queries are normalised and turned by each block for itself, their
// keys and values by those that read their slots, one of which also writes them into the cache.
//
// A step has few rows and many slots: kernels that give a block to each head leave most of a GPU idle. The
// online softmax and the layout of fragments are those of FlashAttention-2 (arXiv 2307.08691). Compiled by NVRTC
// for one HEAD_SIZE; needs compute capability 8.0 (mma.m16n8k16, cp.async).
//
// New rows: slot s of a KV head is in the tiles of the blocks of one split, which have other rows each. None of them
// reads s from the cache where it is new, and the first of them writes it there: in one launch nobody reads what is
// written, and the next launch begins when this one has ended.
//
// Splits: a block writes what it found, meets (bar.sync: all of that is ahead of its first thread's fence), and its
// first thread, between two fences, takes a ticket. The last to take one of its rows' has synchronised with those
// ahead of it, through fence, ticket and fence (PTX memory model, causality order), and its meeting passes that on
// to all of its threads: they see what all splits found. No block waits for another, so that any number may run at a
// time, in any order; what was found is put together in the order of slots, whoever is last, to the same bits. The
// counter wraps to 0 with the last ticket, for the next launch or the next replay of a graph.
#if defined(__CUDACC__)
#include "warp.h"
#else
#include "warp_host.h"
#endif

#include "attention.h"

constexpr int kSize = HEAD_SIZE;
constexpr int kStride = kSize + 8;  // elements of a row in shared memory: eight rows fall into different banks
constexpr int kSteps = kSize / 16;
constexpr int kChunks = kSize / diagd::kVector;  // of a row
constexpr int kColumns = diagd::kTileSlots / 8;
constexpr int kTile = diagd::kTileSlots * kStride;
constexpr int kLanes = 8;                  // that work out a key or a value
constexpr float kLowest = -1e30f;          // below every score
constexpr int kNowhere = -2147483647 - 1;  // the position of a row that sees nothing
constexpr int kNever = 2147483647;         // that of a slot that no row sees

using diagd::Vector;

struct Pair {
  float low, high;
};

__device__ __forceinline__ Pair pair_at(const half* place) {
  const u32 both = *reinterpret_cast<const u32*>(place);
  return {to_float(both & 0xffff), to_float(both >> 16)};
}

// Over 2, 4, .. `lanes` neighbours.
__device__ __forceinline__ float greatest_of(float x, int lanes) {
  for (int other = 1; other < lanes; other *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, other));
  return x;
}

__device__ __forceinline__ float sum_of(float x, int lanes) {
  for (int other = 1; other < lanes; other *= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
  return x;
}

__device__ __forceinline__ float norm_scale(const diagd::AttendArguments& a, float squares) {
  return 1.0f / sqrtf(squares / kSize + a.epsilon);
}

// One KV head of a stream, and the query heads that share it.
struct Head {
  const diagd::AttendArguments& a;
  int number, stream, group;
  int first_new;  // slot of the stream's first new row

  __device__ __forceinline__ Head(const diagd::AttendArguments& arguments, int number)
      : a(arguments), number(number), stream(number / arguments.groups), group(number % arguments.groups) {
    first_new = a.write_index ? static_cast<int>(a.write_index[stream]) : kNever;
  }

  __device__ __forceinline__ int64_t row(int place) const { return static_cast<int64_t>(stream) * a.width + place; }
  __device__ __forceinline__ half* keys() const { return a.keys + static_cast<int64_t>(number) * a.slots * kSize; }
  __device__ __forceinline__ half* values() const { return a.values + static_cast<int64_t>(number) * a.slots * kSize; }
  __device__ __forceinline__ bool is_new(int slot) const { return slot >= first_new && slot - first_new < a.width; }
};

// One of a row's heads as the product gives it, and its bias.
struct Given {
  const half* row;
  const half* bias;

  __device__ __forceinline__ Given(const Head& head, int place, int number)
      : row(head.a.fused + (head.row(place) * head.a.across + number) * kSize),
        bias(head.a.bias ? head.a.bias + number * kSize : nullptr) {}

  __device__ __forceinline__ Pair pair(int column) const {
    const Pair found = pair_at(row + column);
    if (!bias) return found;
    const Pair added = pair_at(bias + column);
    return {found.low + added.low, found.high + added.high};
  }

  __device__ __forceinline__ void eight(int column, float (&x)[diagd::kVector]) const {
    const Vector found = diagd::vector_at(row + column);
    Vector added = {};
    if (bias) added = diagd::vector_at(bias + column);
    for (int n = 0; n < diagd::kVector; ++n) x[n] = to_float(found.values[n]) + to_float(added.values[n]);
  }
};

// A lane's part of the query of one row: of side 0, columns 16 step + 8 part + pair and the next of the matrix's row
// lane / 4, of side 1 those of the row eight further. Both of the columns that are turned together are one lane's.
__device__ __forceinline__ void load_query(const Head& head, int row, bool there, int side, int pair,
                                           u32 (&query)[kSteps][4]) {
  const diagd::AttendArguments& a = head.a;
  const int place = there ? row % a.width : 0, number = head.group * a.shared + (there ? row / a.width : 0);
  const Given given(head, place, number);
  Pair x[kSteps][2];
  float squares = 0.0f;
  for (int step = 0; step < kSteps; ++step) {
    for (int part = 0; part < 2; ++part) {
      x[step][part] = given.pair(16 * step + 8 * part + pair);
      squares += x[step][part].low * x[step][part].low + x[step][part].high * x[step][part].high;
    }
  }
  if (a.query_norm) {
    const float scale = norm_scale(a, sum_of(squares, 4));
    for (int step = 0; step < kSteps; ++step) {
      for (int part = 0; part < 2; ++part) {
        const Pair weight = pair_at(a.query_norm + 16 * step + 8 * part + pair);
        x[step][part].low *= scale * weight.low, x[step][part].high *= scale * weight.high;
      }
    }
  }
  for (int step = 0; step < kSteps / 2 && a.cosines; ++step) {
    for (int part = 0; part < 2; ++part) {
      const int64_t at = head.row(place) * (kSize / 2) + 16 * step + 8 * part + pair;
      const Pair cosine = pair_at(a.cosines + at), sine = pair_at(a.sines + at);
      Pair &first = x[step][part], &second = x[step + kSteps / 2][part];
      const Pair low = {first.low, second.low}, high = {first.high, second.high};
      first = {low.low * cosine.low - low.high * sine.low, high.low * cosine.high - high.high * sine.high};
      second = {low.high * cosine.low + low.low * sine.low, high.high * cosine.high + high.low * sine.high};
    }
  }
  for (int step = 0; step < kSteps; ++step) {
    for (int part = 0; part < 2; ++part)
      query[step][side + 2 * part] = there ? packed(x[step][part].low, x[step][part].high) : 0;
  }
}

// Eight columns of each half of a new key or value.
__device__ __forceinline__ void load_new(const Head& head, int place, bool is_value, bool there, int column,
                                         Vector (&out)[2]) {
  const diagd::AttendArguments& a = head.a;
  float x[2][diagd::kVector] = {}, squares = 0.0f;
  const Given given(head, place, (a.shared + is_value) * a.groups + head.group);
  for (int side = 0; side < 2 && there; ++side) given.eight(column + side * kSize / 2, x[side]);
  for (int n = 0; n < diagd::kVector; ++n) squares += x[0][n] * x[0][n] + x[1][n] * x[1][n];
  squares = sum_of(squares, kLanes);
  if (!there) return;
  if (a.key_norm && !is_value) {
    const float scale = norm_scale(a, squares);
    for (int side = 0; side < 2; ++side) {
      const Vector weight = diagd::vector_at(a.key_norm + column + side * kSize / 2);
      for (int n = 0; n < diagd::kVector; ++n) x[side][n] *= scale * to_float(weight.values[n]);
    }
  }
  if (a.cosines && !is_value) {
    const int64_t at = head.row(place) * (kSize / 2) + column;
    const Vector cosines = diagd::vector_at(a.cosines + at), sines = diagd::vector_at(a.sines + at);
    for (int n = 0; n < diagd::kVector; ++n) {
      const float cosine = to_float(cosines.values[n]), sine = to_float(sines.values[n]), first = x[0][n];
      x[0][n] = first * cosine - x[1][n] * sine;
      x[1][n] = x[1][n] * cosine + first * sine;
    }
  }
  for (int side = 0; side < 2; ++side) {
    for (int n = 0; n < diagd::kVector; ++n) out[side].values[n] = to_half(x[side][n]);
  }
}

// New rows of a tile of K and one of V, by a team; into the cache too where it is to `keep` them.
__device__ __forceinline__ void fill_new(const Head& head, int first_slot, half* tile, bool keep) {
  const int column = threadIdx.x % kLanes * diagd::kVector;
  for (int job = threadIdx.x / kLanes; job < 2 * diagd::kTileSlots; job += blockDim.x / kLanes) {
    const int row = job % diagd::kTileSlots, slot = first_slot + row;
    const bool is_value = job >= diagd::kTileSlots;
    const bool there = head.is_new(slot) && slot < head.a.slots && column < kSize / 2;
    Vector out[2];
    load_new(head, there ? slot - head.first_new : 0, is_value, there, column, out);
    if (!there) continue;
    half* cached = (is_value ? head.values() : head.keys()) + static_cast<int64_t>(slot) * kSize + column;
    half* target = tile + is_value * kTile + row * kStride + column;
    for (int side = 0; side < 2; ++side) {
      diagd::put_vector(target + side * kSize / 2, out[side]);
      if (keep) diagd::put_vector(cached + side * kSize / 2, out[side]);
    }
  }
}

// A tile of K and one of V on their way into a team's memory.
__device__ __forceinline__ void fetch_tile(const Head& head, int first_slot, half* tile, bool keep) {
  const int slots = head.a.slots;
  for (int chunk = threadIdx.x; chunk < diagd::kTileSlots * kChunks; chunk += blockDim.x) {
    const int row = chunk / kChunks, column = chunk % kChunks * diagd::kVector, slot = first_slot + row;
    if (head.is_new(slot)) continue;
    const bool there = slot < slots;
    const int64_t source = static_cast<int64_t>(there ? slot : 0) * kSize + column;
    copy_chunk(tile + row * kStride + column, head.keys() + source, there);
    copy_chunk(tile + kTile + row * kStride + column, head.values() + source, there);
  }
  if (head.first_new < first_slot + diagd::kTileSlots && first_slot - head.first_new < head.a.width)
    fill_new(head, first_slot, tile, keep);
}

// Positions of the slots that are a lane's columns of a tile.
__device__ __forceinline__ void look(const Head& head, int first_slot, int pair, int (&at)[kColumns][2]) {
  const diagd::AttendArguments& a = head.a;
  const int32_t* positions = a.slot_position ? a.slot_position + static_cast<int64_t>(head.stream) * a.slots : nullptr;
  for (int n = 0; n < kColumns; ++n) {
    for (int column = 0; column < 2; ++column) {
      const int slot = first_slot + 8 * n + pair + column;
      at[n][column] = slot >= a.slots ? kNever : positions ? positions[slot] : 0;
    }
  }
}

// Columns of a row that several found parts of: each is a mean over its slots, and the weight of those beside
// exp2(most).
struct Found {
  float mean[diagd::kVector] = {};
  float most = kLowest, weight = 0.0f;

  __device__ __forceinline__ void take(const float (&other)[diagd::kVector], float other_most, float other_weight) {
    const float greatest = fmaxf(most, other_most);
    const float before = exp2_fast(most - greatest), share = exp2_fast(other_most - greatest) * other_weight;
    for (int n = 0; n < diagd::kVector; ++n) mean[n] = mean[n] * before + other[n] * share;
    weight = weight * before + share, most = greatest;
  }

  __device__ __forceinline__ Vector rounded() const {
    const float share = weight > 0.0f ? 1.0f / weight : 0.0f;  // a row that sees nothing gives zeros
    Vector out;
    for (int n = 0; n < diagd::kVector; ++n) out.values[n] = to_half(mean[n] * share);
    return out;
  }
};

// The rows of a block, from its first: eight columns of one are a thread's at a time.
struct BlockRows {
  const Head& head;
  int first, count;

  // Where splits leave what they found of a row.
  __device__ __forceinline__ int64_t between(int split, int row) const {
    const int64_t all = static_cast<int64_t>(head.a.width) * head.a.shared;
    return (static_cast<int64_t>(head.number) * head.a.splits + split) * all + first + row;
  }

  __device__ __forceinline__ void put(int row, int column, const Found& found) const {
    const diagd::AttendArguments& a = head.a;
    const int place = (first + row) % a.width, number = head.group * a.shared + (first + row) / a.width;
    const int64_t at = head.row(place) * a.groups * a.shared + number;
    diagd::put_vector(a.out + at * kSize + column, found.rounded());
  }

  // What teams found, [rows of a team, kStride] each: sums, and behind them their greatest score and their weight.
  __device__ __forceinline__ void join_teams(const float* found, int team_floats) const {
    const diagd::AttendArguments& a = head.a;
    for (int item = thread(); item < count * kChunks; item += blockDim.x * blockDim.y) {
      const int row = item / kChunks, column = item % kChunks * diagd::kVector;
      Found all;
      for (int team = 0; team < static_cast<int>(blockDim.y); ++team) {
        const float* part = found + team * team_floats + row * kStride;
        const float4 low = *reinterpret_cast<const float4*>(part + column);
        const float4 high = *reinterpret_cast<const float4*>(part + column + 4);
        const float mean[diagd::kVector] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        all.take(mean, part[kSize], part[kSize + 1]);
      }
      if (a.splits == 1) {
        put(row, column, all);
        continue;
      }
      const int64_t at = between(blockIdx.x, row);
      diagd::put_vector(a.found + at * kSize + column, all.rounded());
      if (column == 0) *reinterpret_cast<float2*>(a.laws + 2 * at) = make_float2(all.most, all.weight);
    }
  }

  __device__ __forceinline__ void join_splits() const {
    const diagd::AttendArguments& a = head.a;
    for (int item = thread(); item < count * kChunks; item += blockDim.x * blockDim.y) {
      const int row = item / kChunks, column = item % kChunks * diagd::kVector;
      Found all;
      for (int first_split = 0; first_split < a.splits; first_split += diagd::kBeside) {
        uint4 means[diagd::kBeside];
        float2 laws[diagd::kBeside];  // all are asked for before the first is waited for
        for (int n = 0; n < diagd::kBeside; ++n) {
          const int64_t at = between(min(first_split + n, a.splits - 1), row);
          means[n] = seen_by_all(reinterpret_cast<const uint4*>(a.found + at * kSize + column));
          laws[n] = seen_by_all(reinterpret_cast<const float2*>(a.laws + 2 * at));
        }
        for (int n = 0; n < diagd::kBeside && first_split + n < a.splits; ++n) {
          const u32 pairs[4] = {means[n].x, means[n].y, means[n].z, means[n].w};
          float mean[diagd::kVector];
          for (int part = 0; part < diagd::kVector; ++part)
            mean[part] = to_float(part % 2 ? pairs[part / 2] >> 16 : pairs[part / 2] & 0xffff);
          all.take(mean, laws[n].x, laws[n].y);
        }
      }
      put(row, column, all);
    }
  }

  static __device__ __forceinline__ int thread() { return threadIdx.y * blockDim.x + threadIdx.x; }
};

// Whether this block is the last of those that share its rows. Everything that its threads wrote is seen by the last.
__device__ __forceinline__ bool comes_last(const diagd::AttendArguments& a) {
  __shared__ bool last;
  __syncthreads();
  if (BlockRows::thread() == 0) {
    __threadfence();
    const unsigned ahead = a.splits - 1;
    last = atomicInc(a.arrived + blockIdx.z * gridDim.y + blockIdx.y, ahead) == ahead;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// What a lane has of its warp's rows: columns 2 (lane % 4) and the next of rows lane / 4 and lane / 4 + 8.
struct Rows {
  u32 query[kSteps][4];
  int position[2];
  float out[kSize / 8][4] = {};
  float greatest[2] = {kLowest, kLowest}, weight[2] = {0.0f, 0.0f};

  __device__ __forceinline__ void load(const Head& head, int first, int lane) {
    const diagd::AttendArguments& a = head.a;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int row = first + lane / 4 + 8 * side;
      const bool there = row < a.width * a.shared;
      position[side] = !there ? kNowhere : a.slot_position ? a.positions[head.row(row % a.width)] : 0;
      load_query(head, row, there, side, 2 * (lane % 4), query);
    }
  }

  // A bit for each score of a tile whose slots' positions are `at`: of column 8 n + 2 (lane % 4) + c, 4 n + 2 side + c.
  __device__ __forceinline__ u32 seen(const int (&at)[kColumns][2]) const {
    u32 bits = 0;
    for (int n = 0; n < kColumns; ++n) {
      for (int part = 0; part < 4; ++part)
        bits |= static_cast<u32>(at[n][part % 2] <= position[part / 2]) << (4 * n + part);
    }
    return bits;
  }

  __device__ __forceinline__ void attend(const half* keys, const half* values, u32 seen, int lane, float scale) {
    float score[kColumns][4] = {};
    for (int step = 0; step < kSteps; ++step) {
      for (int n = 0; n < diagd::kTileSlots / 16; ++n) {
        u32 b[4];
        const int slot = n * 16 + lane / 16 * 8 + lane % 8, column = step * 16 + lane / 8 % 2 * 8;
        load_matrices(b, keys + slot * kStride + column);
        multiply(score[2 * n], query[step], b[0], b[1]);
        multiply(score[2 * n + 1], query[step], b[2], b[3]);
      }
    }
    float rescale[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) rescale[side] = weigh(side, score, seen, scale);
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
        load_transposed(b, values + slot * kStride + column);
        multiply(out[2 * n], a, b[0], b[1]);
        multiply(out[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  // Scores of a row to weights; returns what those ahead are to be multiplied by.
  __device__ __forceinline__ float weigh(int side, float (&score)[kColumns][4], u32 seen, float scale) {
    float most = kLowest, sum = 0.0f;
    for (int n = 0; n < kColumns; ++n) {
      for (int part = 2 * side; part < 2 * side + 2; ++part) {
        const bool visible = seen >> (4 * n + part) & 1;
        score[n][part] = visible ? score[n][part] * scale : 2.0f * kLowest;  // which weighs nothing beside any other
        most = fmaxf(most, score[n][part]);
      }
    }
    most = fmaxf(greatest[side], greatest_of(most, 4));
    const float rescale = exp2_fast(greatest[side] - most);
    greatest[side] = most;
    for (int n = 0; n < kColumns; ++n) {
      for (int part = 2 * side; part < 2 * side + 2; ++part) {
        score[n][part] = exp2_fast(score[n][part] - most);
        sum += score[n][part];
      }
    }
    weight[side] = weight[side] * rescale + sum;
    return rescale;
  }

  __device__ __forceinline__ void leave(float* found, int lane) const {  // as BlockRows::join_teams takes it
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float total = sum_of(weight[side], 4), share = total > 0.0f ? 1.0f / total : 0.0f;
      float* row = found + (lane / 4 + 8 * side) * kStride;
      for (int n = 0; n < kSize / 8; ++n) {
        *reinterpret_cast<float2*>(row + 8 * n + 2 * (lane % 4)) =
            make_float2(out[n][2 * side] * share, out[n][2 * side + 1] * share);
      }
      if (lane % 4 == 0) *reinterpret_cast<float2*>(row + kSize) = make_float2(greatest[side], total);
    }
  }
};

// Grid: splits x blocks of rows x heads; block: threads of a team x teams. Each warp of a team has 16 rows, and the
// teams of a block take turns at its tiles.
DIAGD_KERNEL(32 * diagd::kWarps) diagd_attend(const diagd::AttendArguments arguments) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = threadIdx.y, teams = blockDim.y;
  const int block_rows = blockDim.x / 32 * diagd::kTileRows, rows = arguments.width * arguments.shared;
  const int first_row = blockIdx.y * block_rows, first_tile = blockIdx.x * arguments.split_tiles;
  const int all_tiles = (arguments.slots + diagd::kTileSlots - 1) / diagd::kTileSlots;
  const int end_tile = min(first_tile + arguments.split_tiles, all_tiles);
  const int tiles = (end_tile - first_tile - team + teams - 1) / teams;
  constexpr int kTeamMemory = diagd::kStages * 2 * kTile;
  half* stages = block_memory() + team * kTeamMemory;
  const Head head(arguments, blockIdx.z);

  auto first_slot = [&](int tile) { return (first_tile + team + tile * teams) * diagd::kTileSlots; };
  auto stage = [&](int tile) { return stages + tile % diagd::kStages * 2 * kTile; };
  auto fetch = [&](int tile) {
    if (tile < tiles) fetch_tile(head, first_slot(tile), stage(tile), blockIdx.y == 0);
    end_group();
  };

  for (int tile = 0; tile < diagd::kStages - 1; ++tile) fetch(tile);
  int next[kColumns][2];
  look(head, first_slot(0), 2 * (lane % 4), next);
  Rows found;
  found.load(head, first_row + warp * diagd::kTileRows, lane);
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_groups<diagd::kStages - 2>();
    meet_team(team, blockDim.x);  // the tile is there for all, and the stage that is filled next has been read by all
    fetch(tile + diagd::kStages - 1);
    const u32 seen = found.seen(next);
    look(head, first_slot(tile + 1), 2 * (lane % 4), next);
    if (__any_sync(0xffffffffu, seen))
      found.attend(stage(tile), stage(tile) + kTile, seen, lane, arguments.scale);
  }
  wait_for_groups<0>();
  meet_team(team, blockDim.x);  // all tiles have been read

  found.leave(reinterpret_cast<float*>(stages) + warp * diagd::kTileRows * kStride, lane);
  __syncthreads();
  const BlockRows block = {head, first_row, min(block_rows, rows - first_row)};
  block.join_teams(reinterpret_cast<float*>(block_memory()), kTeamMemory / 2);
  if (arguments.splits > 1 && comes_last(arguments)) block.join_splits();
}
