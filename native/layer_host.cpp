// Host build of what stands between a step's products, for tests: the device's code over loops, launched as CUDA's
// driver would, and attention as it is written down.
#include <vector>

#include "attention.h"
#include "layer.h"

namespace {

void attend(const diagd::AttendArguments& a, int size, int32_t head, int32_t row) {
  const half* query = static_cast<const half*>(a.queries) + (int64_t{head} * a.rows + row) * size;
  const half* keys = static_cast<const half*>(a.keys) + int64_t{head} * a.slots * size;
  const half* values = static_cast<const half*>(a.values) + int64_t{head} * a.slots * size;
  const half* masks = static_cast<const half*>(a.mask) + head / a.heads_a_stream * a.mask_stride;
  const half* mask = masks + int64_t{row} * a.slots;
  std::vector<float> scores(a.slots), out(size);
  float most = -INFINITY, total = 0.0f;
  for (int32_t slot = 0; slot < a.slots; ++slot) {
    float product = 0.0f;
    for (int n = 0; n < size; ++n) product += to_float(query[n]) * to_float(keys[int64_t{slot} * size + n]);
    scores[slot] = product * a.scale + to_float(mask[slot]) * 1.4426950408889634f;
    most = std::fmax(most, scores[slot]);
  }
  for (int32_t slot = 0; slot < a.slots; ++slot) {
    const float weight = std::exp2(scores[slot] - most);
    total += weight;
    for (int n = 0; n < size; ++n) out[n] += weight * to_float(values[int64_t{slot} * size + n]);
  }
  half* target = static_cast<half*>(a.out) + diagd::place_of(a, head, row) * size;
  for (int n = 0; n < size; ++n) target[n] = to_half(out[n] / total);
}

void attend_all(const diagd::AttendArguments& a, int size, int32_t heads) {
  for (int32_t head = 0; head < heads; ++head) {
    for (int32_t row = 0; row < a.rows; ++row) attend(a, size, head, row);
  }
}

template <int kSize>
void arrange_all(const diagd::HeadsArguments& a, int32_t rows) {
  for (int32_t row = 0; row < rows; ++row) {
    for (int head = 0; head < a.heads + 2 * a.groups; ++head) diagd::arrange_head<kSize>(diagd::Alone{}, a, row, head);
  }
}

void arrange(const diagd::HeadsArguments& a, int size, int32_t rows) {
  if (size == 32) arrange_all<32>(a, rows);
  if (size == 64) arrange_all<64>(a, rows);
  if (size == 96) arrange_all<96>(a, rows);
  if (size == 128) arrange_all<128>(a, rows);
}

// As a grid of one thread a column.
template <typename Arguments, typename Work>
void each(const Arguments& a, unsigned columns, unsigned rows, int step, Work work) {
  for (unsigned row = 0; row < rows; ++row) {
    for (unsigned column = 0; column < columns; ++column) work(a, row, static_cast<int32_t>(column) * step);
  }
}

}  // namespace

// In place of cuLaunchKernel: a function is its place among them (onnxruntime_ops.cpp), from 1, and above eight bits
// the size of a head.
extern "C" int diagd_launch_on_host(void* function, unsigned across, unsigned down, unsigned deep, unsigned threads,
                                    unsigned, unsigned, unsigned, void*, void** arguments, void**) {
  const auto code = reinterpret_cast<uintptr_t>(function);
  const int size = static_cast<int>(code >> 8);
  const unsigned columns = across * threads;
  const void* a = arguments[0];
  switch (code & 255) {
    case 1:
      for (unsigned row = 0; row < across; ++row)
        diagd::norm_row<diagd::kMostHidden>(diagd::Alone{}, *static_cast<const diagd::NormArguments*>(a), row);
      return 0;
    case 2:
      arrange(*static_cast<const diagd::HeadsArguments*>(a), size, across);
      return 0;
    case 3:
      each(*static_cast<const diagd::ActivationArguments*>(a), columns, down, diagd::kVector, diagd::swiglu_vector);
      return 0;
    case 4:
      each(*static_cast<const diagd::ActivationArguments*>(a), columns, down, diagd::kVector, diagd::gelu_vector);
      return 0;
    case 5:
      each(*static_cast<const diagd::MaskArguments*>(a), columns, down, 1, diagd::mask_slot);
      return 0;
    case 6:
      each(*static_cast<const diagd::EmbedArguments*>(a), columns, down, diagd::kVector, diagd::embed_vector);
      return 0;
    case 7:
      attend_all(*static_cast<const diagd::AttendArguments*>(a), size, static_cast<int32_t>(deep));
      return 0;
    default:
      return 0;  // the parts of attention, which is whole on the host
  }
}
