// Attention of a step in the prefix form, on the host.
#pragma once

#include <cstdint>

namespace diagd {

// Of the `prefix` form: rows [slots, streams, groups, size] of K and V, those of the step among them.
struct PrefixArguments {
  const float *queries, *keys, *values;          // queries [streams * width, groups * shared, size]
  const int32_t *positions, *slot_position;      // [streams, width], [slots, streams]
  float* out;                                    // as queries
  int64_t slots;
  int32_t streams, width, groups, shared, size;  // query heads that share one of K and V
  float scale;  // of scores, whose powers of two are taken
};

// Parts of a step, none of which depends on another; at least as many as threads, where there is so much to do.
class PrefixTasks {
 public:
  PrefixTasks(const PrefixArguments& arguments, int32_t threads);
  int64_t count() const { return (int64_t{a.streams} * a.groups * parts + each - 1) / each; }
  void run(int64_t task) const;

 private:
  PrefixArguments a;
  int32_t rows, parts;  // of those that share a head: side by side, and how often
  int32_t each;  // parts of a task
};

}  // namespace diagd
