// Host build of what stands between a step's products, for tests: the device's code over loops, and attention as it
// is on the device, block by block, launched as CUDA's driver would.
#include "warp_host.h"

#include "attention.h"
#include "layer.h"

namespace size_32 {
#define HEAD_SIZE 32
#include "attention.cu"
#undef HEAD_SIZE
}  // namespace size_32
namespace size_64 {
#define HEAD_SIZE 64
#include "attention.cu"
#undef HEAD_SIZE
}  // namespace size_64
namespace size_96 {
#define HEAD_SIZE 96
#include "attention.cu"
#undef HEAD_SIZE
}  // namespace size_96
namespace size_128 {
#define HEAD_SIZE 128
#include "attention.cu"
#undef HEAD_SIZE
}  // namespace size_128

namespace {

unsigned order = 0;

// The one thread of the host.
struct Alone {
  int lane = 0;
  float sum(float x) const { return x; }
};

template <void (*kKernel)(diagd::AttendArguments)>
void attend(const void* arguments) {
  kKernel(*static_cast<const diagd::AttendArguments*>(arguments));
}

auto attention_of(size_t size) {
  return size == 32   ? attend<size_32::diagd_attend>
         : size == 64 ? attend<size_64::diagd_attend>
         : size == 96 ? attend<size_96::diagd_attend>
                      : attend<size_128::diagd_attend>;
}

// As a grid of one thread a column.
template <typename Arguments, typename Work>
void each(const Arguments& a, unsigned columns, unsigned rows, int step, Work work) {
  for (unsigned row = 0; row < rows; ++row) {
    for (unsigned column = 0; column < columns; ++column) work(a, row, static_cast<int32_t>(column) * step);
  }
}

}  // namespace

// In which blocks of attention run from now on: see host::run_grid.
extern "C" void diagd_order_on_host(unsigned wanted) { order = wanted; }

// In place of cuLaunchKernel: a function is its place among them (onnxruntime_ops.cpp), from 1, and above eight bits
// the size of a head.
extern "C" int diagd_launch_on_host(void* function, unsigned across, unsigned down, unsigned deep, unsigned threads,
                                    unsigned beside, unsigned, unsigned bytes, void*, void** arguments, void**) {
  const auto code = reinterpret_cast<uintptr_t>(function);
  const unsigned columns = across * threads;
  const void* a = arguments[0];
  switch (code & 255) {
    case 1:
      for (unsigned row = 0; row < across; ++row)
        diagd::norm_row<diagd::kMostHidden>(Alone{}, *static_cast<const diagd::NormArguments*>(a), row);
      return 0;
    case 2:
      each(*static_cast<const diagd::ActivationArguments*>(a), columns, down, diagd::kVector, diagd::swiglu_vector);
      return 0;
    case 3:
      each(*static_cast<const diagd::ActivationArguments*>(a), columns, down, diagd::kVector, diagd::gelu_vector);
      return 0;
    case 4:
      each(*static_cast<const diagd::EmbedArguments*>(a), columns, down, diagd::kVector, diagd::embed_vector);
      return 0;
    case 5:
      host::run_grid({across, down, deep}, {threads, beside, 1}, bytes, order, attention_of(code >> 8), a);
      return 0;
    default:
      return 1;
  }
}
