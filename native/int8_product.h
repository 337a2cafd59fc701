// Products of a step's rows with a weight of eight bits, on the host.
#pragma once

#include <cstdint>
#include <memory>

namespace diagd {

// Whether this processor multiplies eight bits in vectors of 512 (VNNI): there is no kernel for others.
bool has_int8_products();

// int8 [inputs, outputs], as the kernel reads it: panels of columns, in each of them four rows of a column side by side.
class Int8Weight {
 public:
  Int8Weight(const int8_t* weight, int64_t inputs, int64_t outputs);

  const int64_t inputs, outputs, panels;
  // Bytes of a row that is rounded, the last ones without meaning: rows a page apart would share a few lines of a cache.
  int64_t across() const { return (fours * 4 + 63) / 64 * 64 + 64; }

  // Rows [rows, across()] by which panels first..last are multiplied: (row - zero) * weight * row's scale * column's.
  struct Rows {
    const uint8_t* rounded;
    const float* scales;  // of each
    int64_t rows;
  };
  void multiply(const Rows& rows, int32_t zero, const float* scales, int64_t first, int64_t last, float* out) const;

 private:
  struct Free {
    void operator()(void* memory) const;
  };

  const int64_t fours;
  std::unique_ptr<int8_t, Free> packed;
  std::unique_ptr<int32_t, Free> sums;  // of columns
};

// Numbers as uint8: divided by the scale, to the nearest whole number, from `zero` on. As many as fill up the last four.
void round_row(const float* x, int64_t count, float scale, int32_t zero, uint8_t* out);

// The largest magnitude of numbers, `least` at least; NaN where there is one.
float reach(const float* x, int64_t count, float least);

}  // namespace diagd
