// Attention of a step in the prefix form, on the host.
#pragma once

#include <cstdint>

namespace diagd {

// Of the `prefix` form: what one product gave of a step's rows, and what becomes of it on the way to attention.
struct PrefixArguments {
  const float* fused;                      // [streams * width, groups * (shared + 2) * size]: queries, keys, values
  const float* bias;                       // of a row of it; null without
  const float *query_norm, *key_norm;      // [size], null without
  const float *cosines, *sines;            // [streams * width, size / 2], null without
  const int32_t *positions, *slot_position;  // [streams, width], [slots, streams]
  const int64_t* written;                  // [streams, width], slots of the rows
  float *keys, *values;                    // [slots, streams, groups, size]
  float* out;                              // [streams * width, groups * shared * size]
  int64_t slots;
  int32_t streams, width, groups, shared, size;  // query heads that share one of K and V
  float epsilon;

  int64_t across() const { return int64_t{groups} * (shared + 2) * size; }
};

// Parts of a step, none of which depends on another; at least as many as threads, where there is so much to do.
class PrefixTasks {
 public:
  PrefixTasks(const PrefixArguments& arguments, int32_t threads);
  void write() const;  // the keys and values of the step's rows, ahead of all tasks
  int64_t count() const { return (int64_t{a.streams} * a.groups * parts + each - 1) / each; }
  void run(int64_t task) const;

 private:
  PrefixArguments a;
  int32_t rows, parts;  // of those that share a head: side by side, and how often
  int32_t each;  // parts of a task
};

// A row of the residual stream with what it is given, and that normalised by its root mean square.
struct NormRow {
  const float *x, *added, *weight;
  float *sum, *out;
  int64_t columns;
  float epsilon;
};

void normalise(const NormRow& row);

// silu(gate) * up of columns of a row.
void gate(const float* gate, const float* up, int64_t columns, float* out);

}  // namespace diagd
