// Products with weights of eight bits: whole numbers, whose sums are exact in any order.
//
// ONNX Runtime's come within a half to three quarters of what memory, or the multipliers, allow for as few rows as a
// step has. A panel of columns is read once for up to kMostRows rows, whose sums stay in registers; for more rows it
// is read again from the nearest cache, while the next one is fetched.
#include "int8_product.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/mman.h>
#endif

namespace diagd {

void Int8Weight::Free::operator()(void* memory) const { std::free(memory); }

#if defined(__x86_64__)

namespace {

constexpr int kPanel = 32;     // columns: two vectors of sums
constexpr int kMostRows = 14;  // two sums of each, two vectors of weights and one of rows are 31 of 32 registers
constexpr int kPacked = 8;     // panels that are packed beside each other: rows are read in pieces as long
constexpr int kLine = 64, kLargePage = 1 << 21;  // bytes

int64_t divided(int64_t number, int64_t by) { return (number + by - 1) / by; }

// Memory; in large pages, which the processor fetches ahead further, where there is enough of it.
void* aligned(int64_t bytes) {
  void* found = nullptr;
  const size_t size = static_cast<size_t>(std::max<int64_t>(bytes, 1)), by = bytes < kLargePage ? kLine : kLargePage;
  if (posix_memalign(&found, by, size)) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (by == kLargePage) madvise(found, size, MADV_HUGEPAGE);
#endif
  return found;
}

// What a block of rows is multiplied by: a panel, and what is fetched meanwhile.
struct Panel {
  const int8_t* weights;  // [fours, kPanel, 4]
  int64_t fours, across;
  const int8_t* next;
  int64_t lines;  // of `next`
};

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512vnni")
#endif

template <int ROWS>
void multiply_block(const Panel& panel, const uint8_t* rows, __m512i start[2], int32_t* out) {
  __m512i sums[ROWS][2];
#pragma GCC unroll 14
  for (int row = 0; row < ROWS; ++row) sums[row][0] = start[0], sums[row][1] = start[1];
  const int8_t* weights = panel.weights;
  for (int64_t four = 0; four < panel.fours; ++four, weights += 4 * kPanel) {
    if (four < panel.lines) _mm_prefetch(reinterpret_cast<const char*>(panel.next + four * kLine), _MM_HINT_T1);
    const __m512i first = _mm512_load_si512(weights), second = _mm512_load_si512(weights + kLine);
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; ++row) {
      int32_t bytes;
      std::memcpy(&bytes, rows + row * panel.across + 4 * four, sizeof bytes);
      const __m512i given = _mm512_set1_epi32(bytes);
      sums[row][0] = _mm512_dpbusd_epi32(sums[row][0], given, first);
      sums[row][1] = _mm512_dpbusd_epi32(sums[row][1], given, second);
    }
  }
#pragma GCC unroll 14
  for (int row = 0; row < ROWS; ++row) {
    _mm512_store_si512(out + row * kPanel, sums[row][0]), _mm512_store_si512(out + row * kPanel + 16, sums[row][1]);
  }
}

using Block = void (*)(const Panel&, const uint8_t*, __m512i[2], int32_t*);

constexpr Block kBlocks[kMostRows] = {
    multiply_block<1>,  multiply_block<2>,  multiply_block<3>,  multiply_block<4>,  multiply_block<5>,
    multiply_block<6>,  multiply_block<7>,  multiply_block<8>,  multiply_block<9>,  multiply_block<10>,
    multiply_block<11>, multiply_block<12>, multiply_block<13>, multiply_block<14>};

// One panel, by all rows in blocks as even as can be.
void multiply_panel(Panel panel, const Int8Weight::Rows& a, const int32_t* columns, int32_t zero, const float* scales,
                    int64_t width, int64_t stride, float* out) {
  alignas(kLine) int32_t found[kMostRows * kPanel];
  const __m512i less = _mm512_set1_epi32(-zero);
  __m512i start[2] = {_mm512_mullo_epi32(_mm512_load_si512(columns), less),
                      _mm512_mullo_epi32(_mm512_load_si512(columns + 16), less)};
  alignas(kLine) float of_columns[kPanel] = {};
  std::memcpy(of_columns, scales, sizeof(float) * width);
  const int64_t blocks = divided(a.rows, kMostRows), lines = panel.lines;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * a.rows / blocks, last = (block + 1) * a.rows / blocks;
    const int64_t begun = block * lines / blocks;
    Panel part = panel;
    part.next = panel.next + begun * kLine, part.lines = (block + 1) * lines / blocks - begun;
    kBlocks[last - first - 1](part, a.rounded + first * panel.across, start, found);
    for (int64_t row = first; row < last; ++row) {
      const __m512 scale = _mm512_set1_ps(a.scales[row]);
      for (int64_t column = 0; column < width; column += 16) {
        const __m512 total = _mm512_cvtepi32_ps(_mm512_load_si512(found + (row - first) * kPanel + column));
        const __m512 factor = _mm512_mul_ps(scale, _mm512_load_ps(of_columns + column));
        const __mmask16 there = static_cast<__mmask16>((1u << std::min<int64_t>(16, width - column)) - 1);
        _mm512_mask_storeu_ps(out + row * stride + column, there, _mm512_mul_ps(total, factor));
      }
    }
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

bool has_int8_products() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
}

Int8Weight::Int8Weight(const int8_t* weight, int64_t inputs, int64_t outputs)
    : inputs(inputs), outputs(outputs), panels(divided(outputs, kPanel)), fours(divided(inputs, 4)) {
  packed.reset(static_cast<int8_t*>(aligned(panels * fours * 4 * kPanel)));
  sums.reset(static_cast<int32_t*>(aligned(panels * kPanel * 4)));
  std::memset(sums.get(), 0, static_cast<size_t>(panels * kPanel * 4));
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
  const int64_t bytes = fours * 4 * kPanel, lines = rows.rows > kMostRows ? bytes / kLine : 0;
  for (int64_t panel = first; panel < last; ++panel) {
    const int8_t* here = packed.get() + panel * bytes;
    const int64_t column = panel * kPanel;
    multiply_panel({here, fours, across(), here + bytes, panel + 1 < last ? lines : 0}, rows, sums.get() + column, zero,
                   scales + column, std::min<int64_t>(kPanel, outputs - column), outputs, out + column);
  }
}

#else

bool has_int8_products() { return false; }

Int8Weight::Int8Weight(const int8_t*, int64_t inputs, int64_t outputs)
    : inputs(inputs), outputs(outputs), panels(0), fours(0) {}

void Int8Weight::multiply(const Rows&, int32_t, const float*, int64_t, int64_t, float*) const {}

float reach(const float*, int64_t, float) { return 0.0f; }

void round_row(const float*, int64_t, float, int32_t, uint8_t*) {}

#endif

}  // namespace diagd
