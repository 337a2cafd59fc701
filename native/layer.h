// What stands between the products of a layer, in float16, but for attention: norms of the residual stream with what
// is added to it, and activations; and what is read ahead of all layers.
//
// Values are float inside and rounded where they are stored. The device and the host build run the same code: a
// norm is one block's work, on the host one thread's with the values of all.
#pragma once

#include "half.h"

namespace diagd {

constexpr int kMostAdded = 3, kMostHidden = 8192;

// Rows of x, of what is added and of what is made are `hidden` elements, contiguous.
struct NormArguments {
  const half* x;
  const half* added[kMostAdded];  // null: no more
  int64_t steps[kMostAdded];      // elements between rows: 0 where there is one for all
  const half* weight;
  const half* shift;  // null: none
  half* sum;
  half* out;
  int32_t hidden;
  int32_t centred;
  float epsilon;
};

// Rows of tables, which are null where a model has none, and so is what is made of them.
struct EmbedArguments {
  const int32_t* ids;  // [rows]
  const int32_t* positions;
  const half* embedding;  // [.., hidden], as those of places in a frame and of positions that are added to it
  const half* slots;
  const half* places;
  const half* cosines;  // [.., pairs]
  const half* sines;
  const half* added;  // [.., hidden]
  half* x;
  half* cosine_rows;
  half* sine_rows;
  half* added_rows;
  int32_t hidden;
  int32_t pairs;
  int32_t prefix;  // positions ahead of the first frame
  int32_t frame_length;
};

struct ActivationArguments {
  const half* x;     // [rows, inner], or [rows, 2 inner] where it is gated
  const half* bias;  // [inner]
  half* out;         // [rows, inner]
  int32_t inner;
};

DIAGD_BOTH float exponential_of(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  return std::exp(x);
#endif
}

DIAGD_BOTH float root_of(float x) {
#if defined(__CUDA_ARCH__)
  return sqrtf(x);
#else
  return std::sqrt(x);
#endif
}

DIAGD_BOTH void copy_vector(half* target, const half* source, int64_t from, int64_t to) {
  put_vector(target + to, vector_at(source + from));
}

// One vector of a row of each table.
DIAGD_BOTH void embed_vector(const EmbedArguments& a, int64_t row, int32_t column) {
  const int32_t position = a.positions[row];
  if (column < a.hidden) {
    const half* tables[3] = {a.embedding, a.slots, a.places};
    const int32_t behind = (position - a.prefix) % a.frame_length;
    const int32_t rows[3] = {a.ids[row], behind < 0 ? behind + a.frame_length : behind, position};
    float sum[kVector] = {};
    Vector out;
    for (int number = 0; number < 3; ++number) {
      if (!tables[number]) continue;
      const Vector found = vector_at(tables[number] + int64_t{rows[number]} * a.hidden + column);
      for (int n = 0; n < kVector; ++n) sum[n] += to_float(found.values[n]);
    }
    for (int n = 0; n < kVector; ++n) out.values[n] = to_half(sum[n]);
    put_vector(a.x + row * a.hidden + column, out);
    if (a.added) copy_vector(a.added_rows, a.added, int64_t{position} * a.hidden + column, row * a.hidden + column);
  }
  if (a.cosines && column < a.pairs) {
    const int64_t from = int64_t{position} * a.pairs + column, to = row * a.pairs + column;
    copy_vector(a.cosine_rows, a.cosines, from, to);
    copy_vector(a.sine_rows, a.sines, from, to);
  }
}

// One row. `kHeld` elements are a thread's: at least hidden / team.
template <int kHeld, typename Team>
DIAGD_BOTH void norm_row(const Team& team, const NormArguments& a, int64_t row) {
  float values[kHeld];
  float total = 0.0f;
  for (int held = 0; held < kHeld; held += kVector) {
    const int first = team.lane * kHeld + held;
    for (int n = 0; n < kVector; ++n) values[held + n] = 0.0f;
    if (first >= a.hidden) continue;
    const Vector x = vector_at(a.x + row * a.hidden + first);
    Vector sum, added[kMostAdded] = {};  // all are asked for before the first is waited for
    for (int number = 0; number < kMostAdded; ++number) {
      if (!a.added[number]) continue;
      added[number] = vector_at(a.added[number] + row * a.steps[number] + first);
    }
    for (int n = 0; n < kVector; ++n) values[held + n] = to_float(x.values[n]);
    for (int number = 0; number < kMostAdded; ++number) {
      for (int n = 0; n < kVector; ++n) values[held + n] += to_float(added[number].values[n]);
    }
    for (int n = 0; n < kVector; ++n) {
      sum.values[n] = to_half(values[held + n]);
      values[held + n] = to_float(sum.values[n]);
      total += a.centred ? values[held + n] : values[held + n] * values[held + n];
    }
    put_vector(a.sum + row * a.hidden + first, sum);
  }
  float mean = 0.0f, square = team.sum(total) / static_cast<float>(a.hidden);
  if (a.centred) {
    mean = square;
    total = 0.0f;
    for (int held = 0; held < kHeld; ++held) {
      const float apart = values[held] - mean;
      total += team.lane * kHeld + held < a.hidden ? apart * apart : 0.0f;
    }
    square = team.sum(total) / static_cast<float>(a.hidden);
  }
  const float scale = 1.0f / root_of(square + a.epsilon);
  for (int held = 0; held < kHeld; held += kVector) {
    const int first = team.lane * kHeld + held;
    if (first >= a.hidden) continue;
    const Vector weight = vector_at(a.weight + first);
    Vector out, shift = {};
    if (a.shift) shift = vector_at(a.shift + first);
    for (int n = 0; n < kVector; ++n) {
      const float normal = (values[held + n] - mean) * scale * to_float(weight.values[n]);
      out.values[n] = to_half(normal + to_float(shift.values[n]));
    }
    put_vector(a.out + row * a.hidden + first, out);
  }
}

// One vector of a row: silu(gate) * up.
DIAGD_BOTH void swiglu_vector(const ActivationArguments& a, int64_t row, int32_t column) {
  if (column >= a.inner) return;
  const Vector gate = vector_at(a.x + row * 2 * a.inner + column);
  const Vector up = vector_at(a.x + (row * 2 + 1) * a.inner + column);
  Vector out;
  for (int n = 0; n < kVector; ++n) {
    const float x = to_float(gate.values[n]);
    out.values[n] = to_half(x / (1.0f + exponential_of(-x)) * to_float(up.values[n]));
  }
  put_vector(a.out + row * a.inner + column, out);
}

// One vector of a row: GELU in its tanh form, which is x / (1 + exp(-2 u)).
DIAGD_BOTH void gelu_vector(const ActivationArguments& a, int64_t row, int32_t column) {
  if (column >= a.inner) return;
  const Vector found = vector_at(a.x + row * a.inner + column);
  Vector out, bias = {};
  if (a.bias) bias = vector_at(a.bias + column);
  for (int n = 0; n < kVector; ++n) {
    const float x = to_float(found.values[n]) + to_float(bias.values[n]);
    const float twice = 1.5957691216057308f * (x + 0.044715f * x * x * x);
    out.values[n] = to_half(x / (1.0f + exponential_of(-twice)));
  }
  put_vector(a.out + row * a.inner + column, out);
}

}  // namespace diagd
