// From the logits of rows to their tokens on a processor: the ids that sampling.h draws, by passes over whole rows
// that compilers make wide. One thread, a few microseconds for each thousand ids.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "sampling.h"

// One function for each generation of processors, chosen when it is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define DIAGD_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DIAGD_WIDE
#endif

namespace diagd {

struct DrawArguments {
  const float* logits;  // rows of them, `stride` apart
  const int32_t* low;   // [rows], first id that may be drawn, and one past the last
  const int32_t* high;
  const int64_t* positions;  // [rows], of the cells
  const uint64_t* seeds;     // [rows]
  int32_t* tokens;           // [rows]
  int64_t stride;
  int32_t rows;
  int32_t top_k;
  float temperature;
  float top_p;
  int32_t keep_crossing;
};

constexpr int kTogether = 64;

// Ids of one row that are still in question, and what is worked out of them; reused from row to row.
struct Scratch {
  std::vector<float> weights, values, masses;
  std::vector<int32_t> groups;
};

// The largest of n values; a NaN where one of them is.
DIAGD_WIDE inline float largest_of(const float* values, int n) {
  float top = -INFINITY;
  int odd = 0;
#pragma omp simd reduction(max : top) reduction(| : odd)
  for (int at = 0; at < n; ++at) {
    top = values[at] > top ? values[at] : top;
    odd |= values[at] != values[at];
  }
  return odd ? NAN : top;
}

// Weights of the values from `floor` on, 0 of others, and their sum: exact, in whatever order it is taken.
DIAGD_WIDE inline double weigh(
    const float* values, int n, float largest, float scale, float floor, float* weights) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int at = 0; at < n; ++at) {
    const float weight = power_of_two((values[at] - largest) * scale);
    weights[at] = values[at] >= floor ? weight : 0;
    total += weights[at];
  }
  return total;
}

// Values below `floor` weigh nothing.
DIAGD_WIDE inline void drop_below(const float* values, int n, float floor, float* weights) {
#pragma omp simd
  for (int at = 0; at < n; ++at) weights[at] = values[at] >= floor ? weights[at] : 0;
}

// What the values from `floor` on weigh: exact, in whatever order.
DIAGD_WIDE inline double mass_from(const float* values, const float* masses, int n, float floor) {
  double mass = 0;
#pragma omp simd reduction(+ : mass)
  for (int at = 0; at < n; ++at) mass += values[at] >= floor ? masses[at] : 0;
  return mass;
}

// Moves what lies from `floor` on, or below it, to the front; how many these are.
inline int keep(float* values, float* masses, int n, float floor, bool from) {
  int count = 0;
  for (int at = 0; at < n; ++at) {
    const float value = values[at], mass = masses[at];
    values[count] = value, masses[count] = mass;
    count += (value >= floor) == from;
  }
  return count;
}

// The value at which the mass from the largest on exceeds `share`, or else the least from `low` on.
inline float crossing(float* values, float* masses, int n, double share, float low, float high) {
  n = keep(values, masses, n, low, true);
  low = *std::min_element(values, values + n);
  while (low < high) {
    float middle = low / 2 + high / 2;
    if (middle <= low || middle > high) middle = high;
    const double above = mass_from(values, masses, n, middle);
    const bool inside = above > share;
    if (inside) {
      low = middle;
    } else {
      high = std::nextafter(middle, low), share -= above;
    }
    n = keep(values, masses, n, middle, inside);
  }
  return low;
}

// The smallest value that top-k keeps.
inline float top_k_floor(const float* values, int n, int top_k, Scratch& scratch) {
  if (top_k <= 0 || top_k >= n) return -INFINITY;
  const auto first = scratch.weights.begin(), last = std::copy_n(values, n, first);
  std::nth_element(first, first + top_k - 1, last, std::greater<float>());
  return first[top_k - 1];
}

// The smallest value that top-p keeps of those from `floor` on, which weigh `total`.
inline float top_p_floor(const float* values, const float* weights, int n, float largest, float scale, float floor,
                         double total, double p, bool keep_crossing, Scratch& scratch) {
  // What is lighter than (1 - p) of the mean cannot weigh 1 - p of all together: the threshold lies above it.
  const double lightest = std::log2(0.9 * (1 - p) * total / n) / scale;
  const float least = std::max({floor, static_cast<float>(largest + lightest), std::numeric_limits<float>::lowest()});
  float *some = scratch.values.data(), *masses = scratch.masses.data();
  std::copy_n(values, n, some), std::copy_n(weights, n, masses);
  const float crossed = crossing(some, masses, n, total * p, least, largest);
  return keep_crossing ? crossed : std::min(std::nextafter(crossed, INFINITY), largest);
}

// Words of groups of four ids of one cell: words[k][n] is that of id 4 * groups[n] + k.
DIAGD_WIDE inline void random_words(
    uint64_t seed, uint64_t position, const int32_t* groups, int count, uint32_t (*words)[kTogether]) {
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  for (int at = 0; at < count; ++at) {
    words[0][at] = static_cast<uint32_t>(position), words[1][at] = static_cast<uint32_t>(position >> 32);
    words[2][at] = groups[at], words[3][at] = 1;
  }
  for (int round = 0; round < 10; ++round) {
#pragma omp simd
    for (int at = 0; at < count; ++at) {
      const uint64_t first = static_cast<uint64_t>(words[0][at]) * 0xD2511F53u;
      const uint64_t second = static_cast<uint64_t>(words[2][at]) * 0xCD9E8D57u;
      words[0][at] = static_cast<uint32_t>(second >> 32) ^ words[1][at] ^ low;
      words[2][at] = static_cast<uint32_t>(first >> 32) ^ words[3][at] ^ high;
      words[1][at] = static_cast<uint32_t>(second);
      words[3][at] = static_cast<uint32_t>(first);
    }
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
}

// Bits of weight / noise of the ids of these groups, whose weights stand side by side, and the largest of them.
DIAGD_WIDE inline int32_t race(
    uint32_t (*words)[kTogether], const float* weights, int count, int32_t (*scores)[kTogether]) {
  int32_t best = 0;
  for (int k = 0; k < 4; ++k) {
#pragma omp simd reduction(max : best)
    for (int at = 0; at < count; ++at) {
      const int32_t score = static_cast<int32_t>(as_bits(weights[4 * at + k] / exponential(words[k][at])));
      scores[k][at] = score;
      best = score > best ? score : best;
    }
  }
  return best;
}

// Whether one of these ids may beat a score: noise is no less than its uniform number.
DIAGD_WIDE inline bool may_win(uint32_t (*words)[kTogether], const float* weights, int count, float best) {
  int any = 0;
  for (int k = 0; k < 4; ++k) {
#pragma omp simd reduction(| : any)
    for (int at = 0; at < count; ++at) {
      any |= weights[4 * at + k] * 1.0001f > static_cast<float>(words[k][at]) * 2.3283064365386963e-10f * best;
    }
  }
  return any != 0;
}

// The id of greatest weight / noise, the lowest of equals. weights[0] is that of id 4 * first; they are moved.
inline int32_t winner(uint64_t seed, int64_t position, float* weights, int first, int groups, int32_t* some) {
  int count = 0;
  for (int group = 0; group < groups; ++group) {
    const float* four = weights + 4 * group;
    const bool any = (four[0] + four[1]) + (four[2] + four[3]) > 0;
    std::copy_n(four, 4, weights + 4 * count);
    some[count] = first + group;
    count += any;
  }
  int32_t best = 0, token = 0;
  for (int start = 0; start < count; start += kTogether) {
    int32_t scores[4][kTogether];
    uint32_t words[4][kTogether];
    const int part = std::min(kTogether, count - start);
    random_words(seed, static_cast<uint64_t>(position), some + start, part, words);
    if (!may_win(words, weights + 4 * start, part, as_float(best))) continue;
    if (race(words, weights + 4 * start, part, scores) <= best) continue;
    for (int at = 0; at < part; ++at) {
      for (int k = 0; k < 4; ++k) {
        if (scores[k][at] > best) best = scores[k][at], token = 4 * some[start + at] + k;
      }
    }
  }
  return token;
}

// The token of a row, or -1 where its largest value is not finite.
inline int32_t draw(const DrawArguments& a, int row, Scratch& scratch) {
  const int low = a.low[row], n = a.high[row] - low;
  const float* values = a.logits + row * a.stride + low;
  const float largest = largest_of(values, n);
  if (!std::isfinite(largest)) return -1;
  if (a.temperature == 0) return low + static_cast<int32_t>(std::find(values, values + n, largest) - values);
  for (auto* array : {&scratch.weights, &scratch.values, &scratch.masses}) array->resize(n + 8);
  scratch.groups.resize(n / 4 + 2);
  const float scale = static_cast<float>(1 / (0.6931471805599453 * static_cast<double>(a.temperature)));
  const int before = low % 4, groups = (before + n + 3) / 4;
  float* weights = scratch.weights.data() + before;
  float floor = top_k_floor(values, n, a.top_k, scratch);
  const double total = weigh(values, n, largest, scale, floor, weights);
  if (a.top_p < 1) {
    floor = top_p_floor(values, weights, n, largest, scale, floor, total, a.top_p, a.keep_crossing != 0, scratch);
    drop_below(values, n, floor, weights);
  }
  std::fill_n(weights - before, before, 0.0f);
  std::fill_n(weights + n, 4 * groups - before - n, 0.0f);
  return winner(a.seeds[row], a.positions[row], weights - before, low / 4, groups, scratch.groups.data());
}

}  // namespace diagd
