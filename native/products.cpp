// Products with constant weights, which are read once for up to kMostRows rows, whose sums stay in registers; for more
// rows a panel is read again from the nearest cache. Meanwhile the next one is fetched.
//
// ONNX Runtime's take 1.3 to 2 times what memory, or the multipliers, allow for as few rows as a step has.
#include "products.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "processor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(_WIN32)
#include <malloc.h>
#else
#include <sys/mman.h>
#endif

namespace diagd {
namespace {

constexpr int kPanel = 32;  // columns: two vectors of sums

int64_t divided(int64_t number, int64_t by) { return (number + by - 1) / by; }

}  // namespace

#if defined(_WIN32)
void FreeMemory::operator()(void* memory) const { _aligned_free(memory); }
#else
void FreeMemory::operator()(void* memory) const { std::free(memory); }
#endif

Weight::Weight(int64_t inputs, int64_t outputs) : inputs(inputs), outputs(outputs), panels(divided(outputs, kPanel)) {}

#if defined(__x86_64__)

namespace {

constexpr int kMostRows = 14;  // two sums of each, two vectors of weights and one of rows are 31 of 32 registers
constexpr int kFetching = 8;   // rows from which on multipliers, not memory, are what is waited for
constexpr int kPacked = 8;     // panels that are packed beside each other: rows are read in pieces as long
constexpr int kLine = 64, kLargePage = 1 << 21;  // bytes

// Memory; in large pages, which the processor fetches ahead further, where there is enough of it.
template <typename Element>
Memory<Element> memory_of(int64_t count) {
  void* found = nullptr;
  const size_t size = static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(Element);
  const bool large = size >= kLargePage;
#if defined(_WIN32)
  found = _aligned_malloc(size, kLine);
  if (!found) throw std::bad_alloc();
#else
  if (posix_memalign(&found, large ? kLargePage : kLine, size)) throw std::bad_alloc();
#endif
#if defined(MADV_HUGEPAGE)
  if (large) madvise(found, size, MADV_HUGEPAGE);
#endif
  return Memory<Element>(static_cast<Element*>(found));
}

// Lines of the next panel, of which a step of a block fetches two.
struct Ahead {
  const char* from;
  int64_t lines;

  Ahead part(int64_t number, int64_t parts) const {
    const int64_t begun = number * lines / parts;
    return {from + begun * kLine, (number + 1) * lines / parts - begun};
  }
};

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512vnni")
#endif

inline __mmask16 mask_of(int64_t count) { return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1); }

inline void fetch(const Ahead& ahead, int64_t step) {
  if (2 * step >= ahead.lines) return;
  _mm_prefetch(ahead.from + 2 * step * kLine, _MM_HINT_T1);
  _mm_prefetch(ahead.from + (2 * step + 1) * kLine, _MM_HINT_T1);
}

// What blocks of rows and panels are made of; `out` has `stride` columns, of which `width` are the panel's.
struct Floats {
  using Row = float;
  const float* packed;
  int64_t across, steps, stride, width;
  float* out;

  template <int ROWS>
  void multiply(int64_t first, const float* rows, const Ahead& ahead) const {
    __m512 sums[ROWS][2];
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; ++row) sums[row][0] = sums[row][1] = _mm512_setzero_ps();
    const float* weights = packed;
    for (int64_t step = 0; step < steps; ++step, weights += kPanel) {
      fetch(ahead, step);
      const __m512 low = _mm512_load_ps(weights), high = _mm512_load_ps(weights + 16);
#pragma GCC unroll 14
      for (int row = 0; row < ROWS; ++row) {
        const __m512 given = _mm512_set1_ps(rows[row * across + step]);
        sums[row][0] = _mm512_fmadd_ps(given, low, sums[row][0]);
        sums[row][1] = _mm512_fmadd_ps(given, high, sums[row][1]);
      }
    }
    const __mmask16 there[2] = {mask_of(width), mask_of(width - 16)};
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; ++row) {
      float* to = out + (first + row) * stride;
      _mm512_mask_storeu_ps(to, there[0], sums[row][0]), _mm512_mask_storeu_ps(to + 16, there[1], sums[row][1]);
    }
  }
};

struct Bytes {
  using Row = uint8_t;
  const int8_t* packed;
  int64_t across, steps, stride, width;
  float* out;
  const float *row_scales, *scales;
  __m512i start[2];  // of sums

  template <int ROWS>
  void multiply(int64_t first, const uint8_t* rows, const Ahead& ahead) const {
    __m512i sums[ROWS][2];
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; ++row) sums[row][0] = start[0], sums[row][1] = start[1];
    const int8_t* weights = packed;
    for (int64_t step = 0; step < steps; ++step, weights += 4 * kPanel) {
      fetch(ahead, step);
      const __m512i low = _mm512_load_si512(weights), high = _mm512_load_si512(weights + kLine);
#pragma GCC unroll 14
      for (int row = 0; row < ROWS; ++row) {
        int32_t four;
        std::memcpy(&four, rows + row * across + 4 * step, sizeof four);
        const __m512i given = _mm512_set1_epi32(four);
        sums[row][0] = _mm512_dpbusd_epi32(sums[row][0], given, low);
        sums[row][1] = _mm512_dpbusd_epi32(sums[row][1], given, high);
      }
    }
    alignas(kLine) int32_t found[ROWS][kPanel];  // read from registers, GCC keeps the sums out of them
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; ++row)
      _mm512_store_si512(found[row], sums[row][0]), _mm512_store_si512(found[row] + 16, sums[row][1]);
    for (int64_t column = 0; column < width; column += 16) {
      const __mmask16 there = mask_of(width - column);
      const __m512 columns = _mm512_maskz_loadu_ps(there, scales + column);
      for (int row = 0; row < ROWS; ++row) {
        const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(row_scales[first + row]), columns);
        const __m512 total = _mm512_cvtepi32_ps(_mm512_load_si512(found[row] + column));
        _mm512_mask_storeu_ps(out + (first + row) * stride + column, there, _mm512_mul_ps(total, factor));
      }
    }
  }
};

template <typename Panel, int ROWS>
void multiply_block(const Panel& panel, int64_t first, const typename Panel::Row* rows, const Ahead& ahead) {
  panel.template multiply<ROWS>(first, rows, ahead);
}

// One panel, by all rows in blocks as even as can be.
template <typename Panel>
void multiply_panel(const Panel& panel, const typename Panel::Row* rows, int64_t count, const Ahead& ahead) {
  using Block = void (*)(const Panel&, int64_t, const typename Panel::Row*, const Ahead&);
  static constexpr Block kBlocks[kMostRows] = {
      multiply_block<Panel, 1>,  multiply_block<Panel, 2>,  multiply_block<Panel, 3>,  multiply_block<Panel, 4>,
      multiply_block<Panel, 5>,  multiply_block<Panel, 6>,  multiply_block<Panel, 7>,  multiply_block<Panel, 8>,
      multiply_block<Panel, 9>,  multiply_block<Panel, 10>, multiply_block<Panel, 11>, multiply_block<Panel, 12>,
      multiply_block<Panel, 13>, multiply_block<Panel, 14>};
  const int64_t blocks = divided(count, kMostRows);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * count / blocks, last = (block + 1) * count / blocks;
    kBlocks[last - first - 1](panel, first, rows + first * panel.across, ahead.part(block, blocks));
  }
}

// Up to four rows of a panel's columns, side by side; to sums of columns their own are added.
void pack_rows(const int8_t* weight, int64_t stride, int rows, int64_t width, int8_t* out, int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t column = 0; column < kPanel; column += 16) {
    __m128i read[4] = {};
    for (int row = 0; row < rows && column < width; ++row) {
      const int8_t* from = weight + row * stride + column;
      if (column + 16 <= width) {
        std::memcpy(&read[row], from, 16);
      } else {
        std::memcpy(&read[row], from, static_cast<size_t>(width - column));
      }
    }
    const __m128i low[2] = {_mm_unpacklo_epi8(read[0], read[1]), _mm_unpacklo_epi8(read[2], read[3])};
    const __m128i high[2] = {_mm_unpackhi_epi8(read[0], read[1]), _mm_unpackhi_epi8(read[2], read[3])};
    __m128i* to = reinterpret_cast<__m128i*>(out + 4 * column);
    _mm_store_si128(to, _mm_unpacklo_epi16(low[0], low[1]));
    _mm_store_si128(to + 1, _mm_unpackhi_epi16(low[0], low[1]));
    _mm_store_si128(to + 2, _mm_unpacklo_epi16(high[0], high[1]));
    _mm_store_si128(to + 3, _mm_unpackhi_epi16(high[0], high[1]));
    const __m512i sum = _mm512_load_si512(sums + column);
    _mm512_store_si512(sums + column, _mm512_dpbusd_epi32(sum, ones, _mm512_load_si512(to)));
  }
}

// Sums of columns as they begin where rows are counted from `zero` on.
inline void start_sums(const int32_t* columns, int32_t zero, __m512i start[2]) {
  const __m512i less = _mm512_set1_epi32(-zero);
  start[0] = _mm512_mullo_epi32(_mm512_load_si512(columns), less);
  start[1] = _mm512_mullo_epi32(_mm512_load_si512(columns + 16), less);
}

}  // namespace

// Of magnitudes the bits have the same order, that of NaN above all.
float reach(const float* x, int64_t count, float least) {
  __m512i found = _mm512_castps_si512(_mm512_set1_ps(least));
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t at = 0; at < count; at += 16) {
    const __mmask16 there = static_cast<__mmask16>((1u << std::min<int64_t>(16, count - at)) - 1);
    found = _mm512_max_epi32(found, _mm512_and_si512(_mm512_maskz_loadu_epi32(there, x + at), magnitude));
  }
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(found))));
}

void round_row(const float* x, int64_t count, float scale, int32_t zero, uint8_t* out) {
  const __m512 by = _mm512_set1_ps(scale);
  const __m512i from = _mm512_set1_epi32(zero), least = _mm512_setzero_si512(), most = _mm512_set1_epi32(255);
  for (int64_t at = 0; at < count; at += 16) {
    const __mmask16 there = static_cast<__mmask16>((1u << std::min<int64_t>(16, count - at)) - 1);
    const __m512 number = _mm512_div_ps(_mm512_maskz_loadu_ps(there, x + at), by);
    // To what is far beyond that is kept, so that it fits a whole number.
    const __m512 near = _mm512_max_ps(_mm512_min_ps(number, _mm512_set1_ps(1e3f)), _mm512_set1_ps(-1e3f));
    const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(near), from);
    const __m512i kept = _mm512_min_epi32(_mm512_max_epi32(whole, least), most);
    _mm512_mask_cvtepi32_storeu_epi8(out + at, there, kept);
  }
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

bool has_float_products() { return processor().avx512f && processor().avx512vl; }

bool has_int8_products() { return has_float_products() && processor().avx512vnni; }

FloatWeight::FloatWeight(const float* weight, int64_t inputs, int64_t outputs)
    : Weight(inputs, outputs), packed(memory_of<float>(panels * inputs * kPanel)) {
  for (int64_t first = 0; first < panels; first += kPacked) {
    for (int64_t row = 0; row < inputs; ++row) {
      for (int64_t panel = first; panel < std::min(first + kPacked, panels); ++panel) {
        const int64_t column = panel * kPanel, width = std::min<int64_t>(kPanel, outputs - column);
        float* to = packed.get() + (panel * inputs + row) * kPanel;
        if (width < kPanel) std::fill_n(to, kPanel, 0.0f);
        std::memcpy(to, weight + row * outputs + column, sizeof(float) * width);
      }
    }
  }
}

void FloatWeight::multiply(const float* rows, int64_t count, int64_t first, int64_t last, float* out) const {
  const int64_t size = inputs * kPanel, lines = count < kFetching ? 0 : 2 * inputs;
  for (int64_t panel = first; panel < last; ++panel) {
    const float* here = packed.get() + panel * size;
    const int64_t column = panel * kPanel, width = std::min<int64_t>(kPanel, outputs - column);
    const Ahead ahead = {reinterpret_cast<const char*>(here + size), panel + 1 < last ? lines : 0};
    multiply_panel(Floats{here, across(), inputs, outputs, width, out + column}, rows, count, ahead);
  }
}

Int8Weight::Int8Weight(const int8_t* weight, int64_t inputs, int64_t outputs)
    : Weight(inputs, outputs),
      fours(divided(inputs, 4)),
      packed(memory_of<int8_t>(panels * fours * 4 * kPanel)),
      sums(memory_of<int32_t>(panels * kPanel)) {
  std::fill_n(sums.get(), panels * kPanel, 0);
  for (int64_t first = 0; first < panels; first += kPacked) {
    for (int64_t four = 0; four < fours; ++four) {
      const int rows = static_cast<int>(std::min<int64_t>(4, inputs - 4 * four));
      for (int64_t panel = first; panel < std::min(first + kPacked, panels); ++panel) {
        const int64_t column = panel * kPanel, width = std::min<int64_t>(kPanel, outputs - column);
        pack_rows(weight + 4 * four * outputs + column, outputs, rows, width,
                  packed.get() + (panel * fours + four) * 4 * kPanel, sums.get() + column);
      }
    }
  }
}

void Int8Weight::multiply(const Rows& rows, int32_t zero, const float* scales, int64_t first, int64_t last,
                          float* out) const {
  const int64_t size = fours * 4 * kPanel, lines = rows.count < kFetching ? 0 : 2 * fours;
  for (int64_t panel = first; panel < last; ++panel) {
    const int8_t* here = packed.get() + panel * size;
    const int64_t column = panel * kPanel, width = std::min<int64_t>(kPanel, outputs - column);
    const Ahead ahead = {reinterpret_cast<const char*>(here + size), panel + 1 < last ? lines : 0};
    Bytes bytes = {here, across(), fours, outputs, width, out + column, rows.scales, scales + column, {}};
    start_sums(sums.get() + column, zero, bytes.start);
    multiply_panel(bytes, rows.rounded, rows.count, ahead);
  }
}

#else

bool has_float_products() { return false; }

bool has_int8_products() { return false; }

FloatWeight::FloatWeight(const float*, int64_t inputs, int64_t outputs) : Weight(inputs, outputs) {}

void FloatWeight::multiply(const float*, int64_t, int64_t, int64_t, float*) const {}

Int8Weight::Int8Weight(const int8_t*, int64_t inputs, int64_t outputs) : Weight(inputs, outputs), fours(0) {}

void Int8Weight::multiply(const Rows&, int32_t, const float*, int64_t, int64_t, float*) const {}

float reach(const float*, int64_t, float) { return 0.0f; }

void round_row(const float*, int64_t, float, int32_t, uint8_t*) {}

#endif

}  // namespace diagd
