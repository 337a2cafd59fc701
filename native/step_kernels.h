// The kernels of a step: the device and the host build run the same code.
//
// advance: the record of the next step -> the fixed tensors that a step graph reads.
// sample:  the logits that it returned -> the token buffer (sampling.h).
// append:  the rows that a portable graph returned -> the K/V buffers.
//
// A record is a header of 32-bit words in a buffer, which says where its columns and the next header are:
//   rows, write_index, live, updates, draws, temperature, top_k, top_p, seed (low, high), next header,
//   sources, positions (each [rows]), decoded rows, sinks, cells (each [draws], a cell two words),
//   slots, their positions (each [updates])
// temperature and top_p are float bits. diagd/engines/records.py writes it.
#pragma once

#include "sampling.h"

namespace diagd {

enum Header {
  kRows,
  kWriteIndex,
  kLive,
  kUpdates,
  kDraws,
  kTemperature,
  kTopK,
  kTopP,
  kSeedLow,
  kSeedHigh,
  kNext,
  kSources,
  kPositions,
  kDecoded,
  kSinks,
  kCells,
  kSlots,
  kSlotPositions
};

struct AdvanceArguments {
  const int32_t* records;
  int32_t* cursor;  // words at which the next step's header begins, and that of the step that runs
  int32_t* sources;
  int32_t* positions;
  int64_t* write_index;
  int32_t* live;
  int32_t* slot_position;
  int32_t width;  // of the graph that follows: rows up to it are filled with pads
};

struct SampleArguments {
  const int32_t* records;
  const int32_t* cursor;
  const float* logits;    // [width, vocabulary]
  const int32_t* ranges;  // [frame_length, 2]: ids that may be drawn at each place of a frame
  int32_t* token_buffer;
  uint64_t* refused;  // 1 + a row whose largest logit is not finite, and below 32 bits that logit
  int64_t prefix;     // positions ahead of the first frame
  int32_t frame_length;
  int32_t vocabulary;
  int32_t keep_crossing;
  int32_t width;
};

struct Chunk {
  uint32_t words[4];
};

struct AppendArguments {
  const Chunk* const* rows;  // of each K/V tensor, [groups, width, row_chunks]
  Chunk* const* buffers;     // likewise, [groups, capacity, row_chunks]
  const int64_t* write_index;
  int32_t tensors;
  int32_t groups;
  int32_t capacity;
  int32_t width;
  int32_t row_chunks;  // 16-byte pieces of a row
};

// One of `threads` threads. Pad rows stand where the last row stands, so that every query sees a key.
DIAGD_HOST_DEVICE void advance_thread(const AdvanceArguments& a, const int32_t* record, int thread, int threads) {
  const int32_t* sources = a.records + record[kSources];
  const int32_t* positions = a.records + record[kPositions];
  const int32_t* slots = a.records + record[kSlots];
  const int32_t* slot_positions = a.records + record[kSlotPositions];
  const int32_t rows = record[kRows];
  for (int row = thread; row < a.width; row += threads) {
    const bool pad = row >= rows;
    a.sources[row] = pad ? 0 : sources[row];
    a.positions[row] = rows == 0 ? 0 : positions[pad ? rows - 1 : row];
  }
  for (int update = thread; update < record[kUpdates]; update += threads) {
    a.slot_position[slots[update]] = slot_positions[update];
  }
  if (thread == 0) {
    *a.write_index = record[kWriteIndex];
    *a.live = record[kLive];
  }
}

// One draw of a step: one block's work.
DIAGD_HOST_DEVICE void sample_draw(const Block& block, RowState& state, const SampleArguments& a, int draw) {
  const int32_t* record = a.records + a.cursor[1];
  if (draw >= record[kDraws]) return;
  const int32_t* cell = a.records + record[kCells] + 2 * draw;
  const int64_t position = static_cast<int64_t>(cell[1]) << 32 | static_cast<uint32_t>(cell[0]);
  const int32_t* range = a.ranges + 2 * ((position - a.prefix) % a.frame_length);
  const int32_t decoded = a.records[record[kDecoded] + draw];
  Row row;
  row.logits = a.logits + static_cast<int64_t>(decoded) * a.vocabulary;
  row.low = range[0];
  row.high = range[1];
  row.temperature = as_float(record[kTemperature]);
  row.top_p = as_float(record[kTopP]);
  row.top_k = record[kTopK];
  row.keep_crossing = a.keep_crossing != 0;
  row.seed_low = record[kSeedLow];
  row.seed_high = record[kSeedHigh];
  row.position = position;
  const int32_t token = draw_row(block, state, row);
  block.each([&](int thread) {
    if (thread != 0) return;
    if (token >= 0) {
      a.token_buffer[a.records[record[kSinks] + draw]] = token;
    } else {
      const uint32_t largest = static_cast<uint32_t>(state.best >> 32);
      const uint32_t bits = largest == kNan ? 0x7FC00000 : as_bits(value_of(largest));
      *a.refused = static_cast<uint64_t>(draw + 1) << 32 | bits;
    }
  });
}

// One of `threads` threads; the rows of all tensors are one list of 16-byte chunks.
DIAGD_HOST_DEVICE void append_thread(const AppendArguments& a, int64_t thread, int64_t threads) {
  const int64_t group_chunks = static_cast<int64_t>(a.width) * a.row_chunks;
  const int64_t tensor_chunks = group_chunks * a.groups;
  for (int64_t chunk = thread; chunk < tensor_chunks * a.tensors; chunk += threads) {
    const int64_t tensor = chunk / tensor_chunks;
    const int64_t inside = chunk % tensor_chunks;
    const int64_t group = inside / group_chunks;
    const int64_t slot = group * a.capacity + *a.write_index;
    a.buffers[tensor][slot * a.row_chunks + inside % group_chunks] = a.rows[tensor][inside];
  }
}

}  // namespace diagd
