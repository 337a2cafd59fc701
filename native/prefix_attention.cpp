// Attention of a step in the prefix form, with the vector instructions that the processor has.
#include "prefix_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "processor.h"

// Unlike the sampler's, products need not be rounded before they are added.
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

namespace diagd {
namespace {

constexpr int kTile = 32;  // slots: those of sixteen streams are a page apart, and go to few sets of a cache
constexpr int kLine = 16;  // floats
constexpr float kLowest = -1.0e30f, kUnseen = -3.0e38f;  // a row that sees nothing of a tile weighs it with 0

int32_t divided(int64_t number, int64_t by) { return static_cast<int32_t>((number + by - 1) / by); }

// Rows `first`.. of those that share a head of K and V, of a stream.
struct PrefixPart {
  int32_t stream, group, first, rows;

  // Queries of a step's row that share a head are neighbours.
  int64_t step_row(const PrefixArguments& a, int row) const {
    return int64_t{stream} * a.width + (first + row) / a.shared;
  }
  int32_t head(const PrefixArguments& a, int row) const { return group * a.shared + (first + row) % a.shared; }
};

namespace plain {
#define LONGEST 4
#define REGISTERS 16
#include "prefix_attention_lanes.h"
#undef LONGEST
#undef REGISTERS
}  // namespace plain

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define LONGEST 8
#define REGISTERS 16
#include "prefix_attention_lanes.h"
#undef LONGEST
#undef REGISTERS
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512dq")
#endif
namespace avx512 {
#define LONGEST 16
#define REGISTERS 32
#include "prefix_attention_lanes.h"
#undef LONGEST
#undef REGISTERS
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

struct Kernel {
  void (*write)(const PrefixArguments&);
  void (*attend)(const PrefixArguments&, const PrefixPart&, std::vector<float>&);
  void (*gate)(const float*, const float*, int64_t, float*);
  void (*normalise)(const NormRow&);
};

Kernel fastest() {
#if defined(__x86_64__)
  const bool has_fma = processor().avx2 && processor().fma;
  if (has_fma && processor().avx512vl && processor().avx512dq)
    return {avx512::write_rows, avx512::attend_rows, avx512::gate_columns, avx512::normalise_row};
  if (has_fma) return {avx2::write_rows, avx2::attend_rows, avx2::gate_columns, avx2::normalise_row};
#endif
  return {plain::write_rows, plain::attend_rows, plain::gate_columns, plain::normalise_row};
}

const Kernel& kernel() {
  static const Kernel found = fastest();
  return found;
}

}  // namespace

// Tasks as many as there are threads; heads are parted where they are fewer.
PrefixTasks::PrefixTasks(const PrefixArguments& arguments, int32_t threads) : a(arguments) {
  const int64_t all = int64_t{a.width} * a.shared, heads = int64_t{a.streams} * a.groups;
  rows = divided(all, std::min<int64_t>(all, divided(threads, heads)));
  parts = divided(all, rows), each = divided(heads * parts, threads);
}

void gate(const float* gate, const float* up, int64_t columns, float* out) { kernel().gate(gate, up, columns, out); }

void normalise(const NormRow& row) { kernel().normalise(row); }

void PrefixTasks::write() const { kernel().write(a); }

void PrefixTasks::run(int64_t task) const {
  thread_local std::vector<float> memory;
  const int64_t all = int64_t{a.streams} * a.groups * parts;
  for (int64_t number = task * each; number < std::min(all, (task + 1) * each); ++number) {
    PrefixPart part = {};
    part.stream = static_cast<int32_t>(number / (int64_t{a.groups} * parts));
    part.group = static_cast<int32_t>(number / parts % a.groups);
    part.first = static_cast<int32_t>(number % parts) * rows;
    part.rows = std::min(a.width * a.shared - part.first, rows);
    kernel().attend(a, part, memory);
  }
}

}  // namespace diagd

extern "C" void diagd_bound_attention(const diagd::PrefixArguments* arguments, int32_t threads) {
  const diagd::PrefixTasks tasks(*arguments, threads);
  tasks.write();
  for (int64_t task = 0; task < tasks.count(); ++task) tasks.run(task);
}

extern "C" void diagd_normalise(const diagd::NormRow* row) { diagd::normalise(*row); }

extern "C" void diagd_gate(const float* gate, const float* up, int64_t columns, float* out) {
  diagd::gate(gate, up, columns, out);
}
