// The two kernels of a step, as functions of one thread: the device and the host build run the same code.
//
// advance: the record of the next step -> the fixed tensors that a step graph reads.
// append:  the rows that a portable graph returned -> the K/V buffers, and its tokens -> the token buffer.
//
// A record is a header of 32-bit words in a buffer, which says where its columns and the next header are:
//   rows, write_index, live, updates, temperature, top_k, top_p, next header,
//   sources, positions, sinks, uniforms (each [rows]), slots, their positions (each [updates]), 0, 0
// temperature, top_p and uniforms are float bits. diagd/engines/records.py writes it.
#pragma once

#if defined(__CUDACC_RTC__)  // NVRTC has no standard headers
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
#else
#include <cstdint>
#endif

#if defined(__CUDACC__)
#define DIAGD_HOST_DEVICE __host__ __device__ inline
#else
#define DIAGD_HOST_DEVICE inline
#endif

namespace diagd {

enum Header {
  kRows,
  kWriteIndex,
  kLive,
  kUpdates,
  kTemperature,
  kTopK,
  kTopP,
  kNext,
  kSources,
  kPositions,
  kSinks,
  kUniforms,
  kSlots,
  kSlotPositions
};

struct AdvanceArguments {
  const int32_t* records;
  int32_t* cursor;  // word at which the next step's header begins
  int32_t* sources;
  int32_t* positions;
  int32_t* sinks;
  float* uniforms;
  int64_t* write_index;
  int32_t* live;
  float* temperature;
  int32_t* top_k;
  float* top_p;
  int32_t* slot_position;
  int32_t width;    // of the graph that follows: rows up to it are filled with pads
  int32_t scratch;  // place of the token buffer that nobody reads
};

struct Chunk {
  uint32_t words[4];
};

struct AppendArguments {
  const Chunk* const* rows;  // of each K/V tensor, [groups, width, row_chunks]
  Chunk* const* buffers;     // likewise, [groups, capacity, row_chunks]
  const int64_t* write_index;
  const int32_t* tokens;
  const int32_t* sinks;
  int32_t* token_buffer;
  int32_t tensors;
  int32_t groups;
  int32_t capacity;
  int32_t width;
  int32_t row_chunks;  // 16-byte pieces of a row
};

DIAGD_HOST_DEVICE float as_float(int32_t bits) {
  union {
    int32_t integer;
    float real;
  } value;
  value.integer = bits;
  return value.real;
}

// One of `threads` threads. Pad rows stand where the last row stands, so that every query sees a key.
DIAGD_HOST_DEVICE void advance_thread(const AdvanceArguments& a, const int32_t* record, int thread, int threads) {
  const int32_t* sources = a.records + record[kSources];
  const int32_t* positions = a.records + record[kPositions];
  const int32_t* sinks = a.records + record[kSinks];
  const int32_t* uniforms = a.records + record[kUniforms];
  const int32_t* slots = a.records + record[kSlots];
  const int32_t* slot_positions = a.records + record[kSlotPositions];
  const int32_t rows = record[kRows];
  for (int row = thread; row < a.width; row += threads) {
    const bool pad = row >= rows;
    a.sources[row] = pad ? 0 : sources[row];
    a.positions[row] = rows == 0 ? 0 : positions[pad ? rows - 1 : row];
    a.sinks[row] = pad ? a.scratch : sinks[row];
    a.uniforms[row] = pad ? 0.5f : as_float(uniforms[row]);
  }
  for (int update = thread; update < record[kUpdates]; update += threads) {
    a.slot_position[slots[update]] = slot_positions[update];
  }
  if (thread == 0) {
    *a.write_index = record[kWriteIndex];
    *a.live = record[kLive];
    *a.temperature = as_float(record[kTemperature]);
    *a.top_k = record[kTopK];
    *a.top_p = as_float(record[kTopP]);
  }
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
  for (int64_t row = thread; row < a.width; row += threads) {
    if (a.sinks[row] >= 0) a.token_buffer[a.sinks[row]] = a.tokens[row];
  }
}

}  // namespace diagd
