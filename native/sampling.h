// From the logits of a row to its token, the same to the bit on the device, on the host and in NumPy.
//
// diagd/engines/sampler.py has the rules. A row is one block's work, in phases that all its threads run through
// between barriers. Weights are multiples of 2^-36 in 64-bit integers, so that the order of a sum does not matter;
// everything else is a sum, product or quotient of float, rounded one by one: compile without contraction.
#pragma once

#if defined(__CUDACC_RTC__)  // NVRTC has no standard headers
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif

#if defined(__CUDACC__)
#define DIAGD_HOST_DEVICE __host__ __device__ inline
#else
#define DIAGD_HOST_DEVICE inline
#endif

namespace diagd {

DIAGD_HOST_DEVICE float as_float(uint32_t bits) {
  union {
    uint32_t integer;
    float real;
  } value;
  value.integer = bits;
  return value.real;
}

DIAGD_HOST_DEVICE uint32_t as_bits(float real) {
  union {
    float real;
    uint32_t integer;
  } value;
  value.real = real;
  return value.integer;
}

constexpr uint32_t kNan = 0xFFFFFFFF, kInfinity = 0xFF800000, kMinusInfinity = 0x007FFFFF;

// Integers in the order of floats; zeros are equal, and a NaN is above infinity.
DIAGD_HOST_DEVICE uint32_t order_of(float value) {
  if (value != value) return kNan;
  const uint32_t bits = as_bits(value + 0.0f);
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

DIAGD_HOST_DEVICE float value_of(uint32_t order) { return as_float(order & 0x80000000 ? order ^ 0x80000000 : ~order); }

// 2^logarithm in units of 2^-36, for logarithms up to 0.
DIAGD_HOST_DEVICE float power_of_two(float logarithm) {
  const float x = logarithm > -100.0f ? logarithm : -100.0f;
  const float shifted = x + 12582912.0f;  // next to it floats are whole numbers
  const float part = x - (shifted - 12582912.0f);
  float power = part * 1.33335581e-3f;
  power = (power + 9.61812911e-3f) * part;
  power = (power + 5.55041087e-2f) * part;
  power = (power + 2.40226507e-1f) * part;
  power = (power + 6.93147181e-1f) * part;
  power = power + 1.0f;
  power = as_float(as_bits(power) + (as_bits(shifted) << 23));
  return (power + 1.220703125e-4f) - 1.220703125e-4f;
}

// -ln(1 - (word + 1/2) / 2^32); see diagd/engines/sampler.py.
DIAGD_HOST_DEVICE float exponential(uint32_t word) {
  float v = static_cast<float>(word) * 2.3283064365386963e-10f;
  v = v + 1.1641532182693481e-10f;
  v = v < 0.99999994f ? v : 0.99999994f;
  const float rest = 1.0f - v;
  const int32_t exponent = static_cast<int32_t>(as_bits(rest) - 0x3F3504F3u) >> 23;
  const float m = as_float(as_bits(rest) - (static_cast<uint32_t>(exponent) << 23));
  const float z = exponent == 0 ? v : 1.0f - m;
  const float s = z / (2.0f - z);
  const float square = s * s;
  float series = square * (1.0f / 7);
  series = (series + 1.0f / 5) * square;
  series = (series + 1.0f / 3) * square;
  series = (series + 1.0f) * (s + s);
  return series - static_cast<float>(exponent) * 0.69314718f;
}

// Philox4x32-10 of counter (position, position >> 32, id / 4, 1); word id % 4.
DIAGD_HOST_DEVICE uint32_t random_word(uint32_t seed_low, uint32_t seed_high, uint64_t position, uint32_t id) {
  uint32_t words[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), id >> 2, 1};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(words[0]) * 0xD2511F53u;
    const uint64_t second = static_cast<uint64_t>(words[2]) * 0xCD9E8D57u;
    words[0] = static_cast<uint32_t>(second >> 32) ^ words[1] ^ seed_low;
    words[2] = static_cast<uint32_t>(first >> 32) ^ words[3] ^ seed_high;
    words[1] = static_cast<uint32_t>(second);
    words[3] = static_cast<uint32_t>(first);
    seed_low += 0x9E3779B9u;
    seed_high += 0xBB67AE85u;
  }
  return words[id & 3];
}

constexpr int kPivots = 7, kListed = 2048;

// What the threads of a block share.
struct RowState {
  uint64_t best;  // order of a value, or bits of a score, above 32 bits; what is lower for higher ids below
  uint64_t total, sums[kPivots];
  uint64_t low, high;  // more than allowed lies from `low` on, no more than allowed from `high` on
  uint32_t listed;
  float list[kListed];
};

struct Row {
  const float* logits;  // of the ids [low, high)
  int32_t low, high;
  float temperature, top_p;
  int32_t top_k;
  bool keep_crossing;
  uint32_t seed_low, seed_high;
  uint64_t position;
};

// All threads of the block that a row is the work of; each of them holds one Block.
#if defined(__CUDA_ARCH__)
struct Block {
  int thread, threads;  // a multiple of 32

  template <typename Work>
  __device__ void each(Work work) const {
    work(thread);
    __syncthreads();
  }
  // What is shared, before any thread goes on and changes it.
  template <typename Value>
  __device__ Value read(const Value& shared) const {
    const Value value = shared;
    __syncthreads();
    return value;
  }
  static __device__ void sum(uint64_t* target, uint64_t value) {
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xFFFFFFFF, value, offset);
    if (threadIdx.x % 32 == 0 && value) atomicAdd(reinterpret_cast<unsigned long long*>(target), value);
  }
  static __device__ void maximum(uint64_t* target, uint64_t value) {
    for (int offset = 16; offset > 0; offset /= 2) {
      const uint64_t other = __shfl_down_sync(0xFFFFFFFF, value, offset);
      value = other > value ? other : value;
    }
    if (threadIdx.x % 32 == 0) atomicMax(reinterpret_cast<unsigned long long*>(target), value);
  }
  static __device__ uint32_t next(uint32_t* counter) { return atomicAdd(counter, 1u); }
};
#else
struct Block {
  int threads;

  template <typename Work>
  DIAGD_HOST_DEVICE void each(Work work) const {
    for (int thread = 0; thread < threads; ++thread) work(thread);
  }
  template <typename Value>
  DIAGD_HOST_DEVICE Value read(const Value& shared) const {
    return shared;
  }
  static DIAGD_HOST_DEVICE void sum(uint64_t* target, uint64_t value) { *target += value; }
  static DIAGD_HOST_DEVICE void maximum(uint64_t* target, uint64_t value) { *target = value > *target ? value : *target; }
  static DIAGD_HOST_DEVICE uint32_t next(uint32_t* counter) { return (*counter)++; }
};
#endif

constexpr int kTogetherLoaded = 8;

// Each of the values, with its place: a thread asks for several before it waits for the first.
template <typename Work>
DIAGD_HOST_DEVICE void for_each(const Block& block, int thread, const float* values, int32_t count, Work work) {
  int32_t at = thread;
  for (; at + (kTogetherLoaded - 1) * block.threads < count; at += kTogetherLoaded * block.threads) {
    float loaded[kTogetherLoaded];
    for (int n = 0; n < kTogetherLoaded; ++n) loaded[n] = values[at + n * block.threads];
    for (int n = 0; n < kTogetherLoaded; ++n) work(loaded[n], at + n * block.threads);
  }
  for (; at < count; at += block.threads) work(values[at], at);
}

// Largest value of a row, its order above and the complement of its lowest id below.
DIAGD_HOST_DEVICE void find_largest(const Block& block, RowState& state, const Row& row) {
  block.each([&](int thread) {
    if (thread == 0) state.best = 0;
  });
  block.each([&](int thread) {
    uint64_t best = 0;
    for_each(block, thread, row.logits + row.low, row.high - row.low, [&](float value, int32_t place) {
      const uint64_t found = static_cast<uint64_t>(order_of(value)) << 32 | ~static_cast<uint32_t>(row.low + place);
      best = found > best ? found : best;
    });
    Block::maximum(&state.best, best);
  });
}

// Order of the lowest value from which on no more than `allowed` lies, into state.high. More lies from
// state.low on, no more from state.high on. `mass` of a value is what it counts.
template <typename Mass>
DIAGD_HOST_DEVICE void narrow(
    const Block& block, RowState& state, const float* values, int32_t count, double allowed, Mass mass) {
  while (true) {
    block.each([&](int thread) {
      for (int pivot = thread; pivot < kPivots; pivot += block.threads) state.sums[pivot] = 0;
    });
    const uint64_t low = state.low, width = state.high - low;
    if (width == 1) return;
    uint32_t pivots[kPivots];
    for (int pivot = 0; pivot < kPivots; ++pivot) {
      pivots[pivot] = static_cast<uint32_t>(low + width * (pivot + 1) / (kPivots + 1));
    }
    block.each([&](int thread) {
      uint64_t sums[kPivots] = {};
      for_each(block, thread, values, count, [&](float value, int32_t) {
        const uint32_t order = order_of(value);
        const uint64_t weight = mass(value);
        for (int pivot = 0; pivot < kPivots; ++pivot) sums[pivot] += order >= pivots[pivot] ? weight : 0;
      });
      for (int pivot = 0; pivot < kPivots; ++pivot) Block::sum(&state.sums[pivot], sums[pivot]);
    });
    block.each([&](int thread) {
      if (thread != 0) return;
      for (int pivot = 0; pivot < kPivots; ++pivot) {
        const uint64_t at = pivots[pivot];
        if (static_cast<double>(state.sums[pivot]) > allowed) {
          if (at > state.low) state.low = at;
        } else if (at < state.high) {
          state.high = at;
        }
      }
    });
  }
}

// Order of the smallest value that top-k keeps.
DIAGD_HOST_DEVICE uint32_t top_k_floor(const Block& block, RowState& state, const Row& row, uint32_t top) {
  if (row.top_k <= 0 || row.top_k >= row.high - row.low) return 0;
  block.each([&](int thread) {
    if (thread == 0) state.low = 0, state.high = static_cast<uint64_t>(top) + 1;
  });
  narrow(block, state, row.logits + row.low, row.high - row.low, row.top_k - 1, [](float) { return 1ull; });
  return static_cast<uint32_t>(block.read(state.high) - 1);
}

// Order of the smallest value that top-p keeps among those from `floor` on.
DIAGD_HOST_DEVICE uint32_t top_p_floor(
    const Block& block, RowState& state, const Row& row, uint32_t top, uint32_t floor, float scale) {
  if (!(row.top_p < 1)) return floor;
  const float largest = value_of(top);
  const auto mass = [&](float value) {
    if (order_of(value) < floor) return 0ull;
    return static_cast<unsigned long long>(power_of_two((value - largest) * scale) * 68719476736.0f);
  };
  block.each([&](int thread) {
    if (thread == 0) state.low = 0, state.high = static_cast<uint64_t>(top) + 1, state.total = 0, state.listed = 0;
  });
  block.each([&](int thread) {
    uint64_t sum = 0;
    for_each(block, thread, row.logits + row.low, row.high - row.low,
             [&](float value, int32_t) { sum += mass(value); });
    Block::sum(&state.total, sum);
  });
  const double total = static_cast<double>(block.read(state.total)), p = static_cast<double>(row.top_p);
  const double share = total * p;
  // Values lighter than (1 - p) of the mean cannot weigh 1 - p of all together: the threshold lies above them.
  const double lightest = 0.99 * (1 - p) * total / (row.high - row.low);
  block.each([&](int thread) {
    for_each(block, thread, row.logits + row.low, row.high - row.low, [&](float value, int32_t) {
      if (static_cast<double>(mass(value)) < lightest) return;
      const uint32_t place = Block::next(&state.listed);
      if (place < kListed) state.list[place] = value;
    });
  });
  const uint32_t listed = block.read(state.listed);
  if (listed <= kListed) {
    narrow(block, state, state.list, listed, share, mass);
  } else {
    narrow(block, state, row.logits + row.low, row.high - row.low, share, mass);
  }
  const uint64_t high = block.read(state.high), crossed = row.keep_crossing ? high - 1 : high;
  const uint32_t kept = static_cast<uint32_t>(crossed < top ? crossed : top);
  return kept > floor ? kept : floor;
}

// The token of a row, or -1 where its largest value is not finite: then state.best has it above 32 bits.
DIAGD_HOST_DEVICE int32_t draw_row(const Block& block, RowState& state, const Row& row) {
  find_largest(block, state, row);
  const uint64_t best = block.read(state.best);
  const uint32_t top = static_cast<uint32_t>(best >> 32);
  const int32_t first = static_cast<int32_t>(~static_cast<uint32_t>(best));
  if (top >= kInfinity || top <= kMinusInfinity) return -1;
  if (row.temperature == 0) return first;
  const float scale = static_cast<float>(1 / (0.6931471805599453 * static_cast<double>(row.temperature)));
  const float largest = value_of(top);
  const uint32_t floor = top_p_floor(block, state, row, top, top_k_floor(block, state, row, top), scale);
  block.each([&](int thread) {
    if (thread == 0) state.best = 0;
  });
  block.each([&](int thread) {
    uint64_t best = 0;
    for_each(block, thread, row.logits + row.low, row.high - row.low, [&](float value, int32_t place) {
      if (order_of(value) < floor) return;
      const uint32_t id = static_cast<uint32_t>(row.low + place);
      const float weight = power_of_two((value - largest) * scale);
      const float noise = exponential(random_word(row.seed_low, row.seed_high, row.position, id));
      const uint64_t score = static_cast<uint64_t>(as_bits(weight / noise)) << 32 | ~id;
      best = score > best ? score : best;
    });
    Block::maximum(&state.best, best);
  });
  return static_cast<int32_t>(~static_cast<uint32_t>(state.best));
}

}  // namespace diagd
