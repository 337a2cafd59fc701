// Products of a step's rows with constant weights, on the host.
#pragma once

#include <cstdint>
#include <memory>

namespace diagd {

// Whether this processor has the vectors that the kernels are written in, AVX-512, and its products of eight bits (VNNI).
bool has_float_products();
bool has_int8_products();

struct FreeMemory {
  void operator()(void* memory) const;
};

template <typename Element>
using Memory = std::unique_ptr<Element, FreeMemory>;

// A weight [inputs, outputs] as kernels read it: panels of columns, one behind the other.
struct Weight {
  const int64_t inputs, outputs, panels;

  Weight(int64_t inputs, int64_t outputs);

  // Elements of a row that is multiplied: rows a page apart would share a few lines of a cache.
  int64_t across() const { return (inputs + 63) / 64 * 64 + 64; }
};

// Rows of a panel lie one behind the other. A sum is taken in the order of the inputs, whatever rows are beside it.
class FloatWeight : public Weight {
 public:
  FloatWeight(const float* weight, int64_t inputs, int64_t outputs);

  // Of rows [rows, across()] and panels first..last.
  void multiply(const float* rows, int64_t count, int64_t first, int64_t last, float* out) const;

 private:
  Memory<float> packed;
};

// In each panel four rows of a column lie side by side.
class Int8Weight : public Weight {
 public:
  Int8Weight(const int8_t* weight, int64_t inputs, int64_t outputs);

  struct Rows {
    const uint8_t* rounded;  // [count, across()], what is behind the inputs without meaning
    const float* scales;     // of each
    int64_t count;
  };

  // (row - zero) * weight * row's scale * column's, of panels first..last.
  void multiply(const Rows& rows, int32_t zero, const float* scales, int64_t first, int64_t last, float* out) const;

 private:
  const int64_t fours;
  Memory<int8_t> packed;
  Memory<int32_t> sums;  // of columns
};

// Numbers as uint8: divided by the scale, to the nearest whole number, from `zero` on.
void round_row(const float* x, int64_t count, float scale, int32_t zero, uint8_t* out);

// The largest magnitude of numbers, `least` at least; NaN where there is one.
float reach(const float* x, int64_t count, float least);

}  // namespace diagd
