// Attention of a step in the prefix form, on the host: a query row is a lane, keys and values are read as they lie.
//
// Included once for each set of vector instructions, in a namespace of its own, with vectors of up to LONGEST floats in
// REGISTERS. A lane never meets another: what a row gets has one order of sums, whatever rows are computed beside it, in
// vectors of whatever length, and whatever is bound behind what it sees. The softmax is the online one of
// FlashAttention (arXiv 2205.14135).

template <int LANES>
struct Lanes {  // an alias template would lose the attribute (GCC)
  typedef float Floats __attribute__((vector_size(4 * LANES)));
  typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
};

template <int LANES>
using Floats = typename Lanes<LANES>::Floats;
template <int LANES>
using Integers = typename Lanes<LANES>::Integers;

template <typename Vector>
inline Vector load(const void* at) {
  Vector found;
  std::memcpy(&found, at, sizeof found);
  return found;
}

template <typename Vector>
inline void store(void* at, Vector value) {
  std::memcpy(at, &value, sizeof value);
}

// 2^x of numbers up to 0, to two units in the last place, exactly 1 of 0, and 0 below -126.
template <int LANES>
inline Floats<LANES> power_of_two(Floats<LANES> x) {
  const Integers<LANES> there = ~(x < -126.0f);  // NaN too
  const Floats<LANES> shifted = x + 12583039.0f;  // its last bits are the nearest whole number, and 127
  const Floats<LANES> r = x - (shifted - 12583039.0f);
  Floats<LANES> p = r * 1.54614447e-4f + 1.34004282e-3f;
  p = p * r + 9.61805668e-3f, p = p * r + 5.55032723e-2f, p = p * r + 2.40226509e-1f, p = p * r + 6.93147207e-1f;
  const Integers<LANES> exponent = load<Integers<LANES>>(&shifted) << 23;
  const auto power = load<Floats<LANES>>(&exponent);
  p = p * (r * power) + power;  // what is not a number stays none, whatever its bits are
  const Integers<LANES> chosen = load<Integers<LANES>>(&p) & there;
  return load<Floats<LANES>>(&chosen);
}

inline Floats<LONGEST> gated(Floats<LONGEST> x, Floats<LONGEST> by) {
  const Floats<LONGEST> power = power_of_two<LONGEST>((x < 0.0f ? x : -x) * 1.44269504f);
  return x * by * (x < 0.0f ? power : Floats<LONGEST>{} + 1.0f) / (power + 1.0f);
}

// silu(gate) * up of some columns; an element has the same bits in every vector.
inline void gate_columns(const float* gate, const float* up, int64_t columns, float* out) {
  using Floating = Floats<LONGEST>;
  int64_t column = 0;
  for (; column + LONGEST <= columns; column += LONGEST)
    store(out + column, gated(load<Floating>(gate + column), load<Floating>(up + column)));
  if (column == columns) return;
  Floating x = {}, by = {};
  const size_t bytes = sizeof(float) * (columns - column);
  std::memcpy(&x, gate + column, bytes), std::memcpy(&by, up + column, bytes);
  const Floating found = gated(x, by);
  std::memcpy(out + column, &found, bytes);
}

// x + added to `sum`, and that normalised; its squares are summed in eight lanes, whatever the vectors.
inline void normalise_row(const NormRow& a) {
  float squares[8] = {};
  for (int64_t column = 0; column < a.columns; ++column) {
    a.sum[column] = a.x[column] + a.added[column];
  }
  int64_t column = 0;
  for (; column + 8 <= a.columns; column += 8) {
    for (int lane = 0; lane < 8; ++lane) squares[lane] += a.sum[column + lane] * a.sum[column + lane];
  }
  for (; column < a.columns; ++column) squares[column % 8] += a.sum[column] * a.sum[column];
  float total = 0.0f;
  for (float square : squares) total += square;
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(a.columns) + a.epsilon);
  for (column = 0; column < a.columns; ++column) a.out[column] = a.sum[column] * scale * a.weight[column];
}

// A head of a step's row: with its bias, normalised and turned, where the model does so.
inline void prepare(const PrefixArguments& a, int64_t row, int head, const float* norm, bool turns, float* to) {
  const float* from = a.fused + row * a.across() + int64_t{head} * a.size;
  std::memcpy(to, from, sizeof(float) * a.size);
  if (a.bias) {
    const float* bias = a.bias + int64_t{head} * a.size;
    for (int channel = 0; channel < a.size; ++channel) to[channel] += bias[channel];
  }
  if (norm) {
    float squares = 0.0f;
    for (int channel = 0; channel < a.size; ++channel) squares += to[channel] * to[channel];
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(a.size) + a.epsilon);
    for (int channel = 0; channel < a.size; ++channel) to[channel] *= scale * norm[channel];
  }
  if (!turns || !a.cosines) return;
  const int half = a.size / 2;
  const float *cosines = a.cosines + row * half, *sines = a.sines + row * half;
  for (int pair = 0; pair < half; ++pair) {
    const float first = to[pair], second = to[half + pair];
    to[pair] = first * cosines[pair] - second * sines[pair];
    to[half + pair] = second * cosines[pair] + first * sines[pair];
  }
}

void write_rows(const PrefixArguments& a) {
  const int heads = a.groups * a.shared;
  for (int64_t row = 0; row < int64_t{a.streams} * a.width; ++row) {
    const int64_t place = (a.written[row] * a.streams + row / a.width) * a.groups * a.size;
    for (int group = 0; group < a.groups; ++group) {
      prepare(a, row, heads + group, a.key_norm, true, a.keys + place + group * a.size);
      prepare(a, row, heads + a.groups + group, nullptr, false, a.values + place + group * a.size);
    }
  }
}

// Rows that share a head of K and V, side by side, and what was found for them so far.
template <int LANES, int VECTORS>
struct Rows {
  static constexpr int kRows = LANES * VECTORS;
  static constexpr int kBeside = REGISTERS == 32 || VECTORS == 1 ? 8 : 4;  // slots, channels: sums stay in registers
  static constexpr int kMixed = REGISTERS == 32 && VECTORS == 1 ? 16 : kBeside;
  using Floating = Floats<LANES>;

  const PrefixArguments& a;
  const float *keys, *values;
  int64_t step;  // floats between two slots
  float *scores, *queries, *mixed;  // [kTile][kRows], [size][kRows] twice
  float weight[kRows] = {}, most[kRows] = {};
  int32_t position[kRows] = {}, last = 0;  // of all

  // Scores of COUNT slots, those that a row does not see below all others.
  template <int COUNT>
  void score(const float* key, const int32_t* at, float* out) {
    Floating sums[COUNT][VECTORS] = {};
    for (int channel = 0; channel < a.size; ++channel) {
      for (int vector = 0; vector < VECTORS; ++vector) {
        const Floating query = load<Floating>(queries + channel * kRows + vector * LANES);
        for (int slot = 0; slot < COUNT; ++slot) sums[slot][vector] += key[slot * step + channel] * query;
      }
    }
    for (int vector = 0; vector < VECTORS; ++vector) {
      const auto seen_from = load<Integers<LANES>>(position + vector * LANES);
      Floating highest = load<Floating>(most + vector * LANES);
      for (int slot = 0; slot < COUNT; ++slot) {
        const Floating found = at[slot] <= seen_from ? sums[slot][vector] : Floating{} + kUnseen;
        highest = found > highest ? found : highest;
        store(out + slot * kRows + vector * LANES, found);
      }
      store(most + vector * LANES, highest);
    }
  }

  // Scores of a tile to weights; what was mixed of tiles ahead is weighed anew.
  void weigh(const float* before, int slots) {
    for (int lane = 0; lane < kRows; lane += LANES) {
      const Floating highest = load<Floating>(most + lane);
      const Floating rescale = power_of_two<LANES>(load<Floating>(before + lane) - highest);
      Floating sum = load<Floating>(weight + lane) * rescale;
      for (int slot = 0; slot < slots; ++slot) {
        float* score = scores + slot * kRows + lane;
        const Floating found = power_of_two<LANES>(load<Floating>(score) - highest);
        sum += found;
        store(score, found);
      }
      store(weight + lane, sum);
      for (int channel = 0; channel < a.size; ++channel) {
        float* sums = mixed + channel * kRows + lane;
        store(sums, load<Floating>(sums) * rescale);
      }
    }
  }

  // Adds COUNT channels of a tile's values.
  template <int COUNT>
  void mix(const float* value, int slots, float* out) const {
    Floating sums[COUNT][VECTORS];
    for (int channel = 0; channel < COUNT; ++channel) {
      for (int vector = 0; vector < VECTORS; ++vector)
        sums[channel][vector] = load<Floating>(out + channel * kRows + vector * LANES);
    }
    for (int slot = 0; slot < slots; ++slot) {
      for (int vector = 0; vector < VECTORS; ++vector) {
        const Floating weighed = load<Floating>(scores + slot * kRows + vector * LANES);
        for (int channel = 0; channel < COUNT; ++channel)
          sums[channel][vector] += value[slot * step + channel] * weighed;
      }
    }
    for (int channel = 0; channel < COUNT; ++channel) {
      for (int vector = 0; vector < VECTORS; ++vector)
        store(out + channel * kRows + vector * LANES, sums[channel][vector]);
    }
  }

  void tile(int64_t first, const int32_t* at, int slots) {
    const int bound = slots;
    while (slots > 0 && at[slots - 1] > last) --slots;  // of longer streams, and not yet written
    if (slots == 0) return;
    slots = std::min(bound, divided(slots, kBeside) * kBeside);
    const float *key = keys + first * step, *value = values + first * step;
    float before[kRows];
    std::memcpy(before, most, sizeof before);
    int slot = 0, channel = 0;
    for (; slot + kBeside <= slots; slot += kBeside) {
      fetch(first + kTile + slot);
      score<kBeside>(key + slot * step, at + slot, scores + slot * kRows);
    }
    for (; slot < slots; ++slot) score<1>(key + slot * step, at + slot, scores + slot * kRows);
    weigh(before, slots);
    for (; channel + kMixed <= a.size; channel += kMixed) mix<kMixed>(value + channel, slots, mixed + channel * kRows);
    for (; channel < a.size; ++channel) mix<1>(value + channel, slots, mixed + channel * kRows);
  }

  // Has slots of the next tile on their way. A call of what only does so would be optimised away.
  __attribute__((always_inline)) void fetch(int64_t slot) const {
    for (const int64_t end = std::min(slot + kBeside, a.slots); slot < end; ++slot) {
      for (int channel = 0; channel < a.size; channel += kLine) {
        __builtin_prefetch(keys + slot * step + channel, 0, 2), __builtin_prefetch(values + slot * step + channel, 0, 2);
      }
    }
  }

  void take(const PrefixPart& part) {
    const int64_t head = (int64_t{part.stream} * a.groups + part.group) * a.size;
    const float scale = 1.44269504f / std::sqrt(static_cast<float>(a.size));  // weights are powers of two
    keys = a.keys + head, values = a.values + head, last = INT32_MIN;
    std::memset(queries, 0, sizeof(float) * kRows * a.size), std::memset(mixed, 0, sizeof(float) * kRows * a.size);
    for (int row = 0; row < kRows; ++row) {
      position[row] = INT32_MIN, weight[row] = 0.0f, most[row] = kLowest;
      if (row >= part.rows) continue;
      position[row] = a.positions[part.step_row(a, row)], last = std::max(last, position[row]);
      prepare(a, part.step_row(a, row), part.head(a, row), a.query_norm, true, scores);
      for (int channel = 0; channel < a.size; ++channel) queries[channel * kRows + row] = scores[channel] * scale;
    }
  }

  void give(const PrefixPart& part) const {
    for (int row = 0; row < part.rows; ++row) {
      const float share = 1.0f / (weight[row] > 0.0f ? weight[row] : 1.0f);  // a row that sees nothing is a pad
      float* out = a.out + (part.step_row(a, row) * a.groups * a.shared + part.head(a, row)) * a.size;
      for (int channel = 0; channel < a.size; ++channel) out[channel] = mixed[channel * kRows + row] * share;
    }
  }
};

template <int LANES, int VECTORS>
void attend(const PrefixArguments& a, const PrefixPart& part, std::vector<float>& memory) {
  using Part = Rows<LANES, VECTORS>;
  const size_t each = size_t{Part::kRows} * a.size, scores = std::max(kTile * Part::kRows, a.size);
  memory.resize(scores + 2 * each);
  float* own = memory.data() + scores;
  Part rows{a, nullptr, nullptr, int64_t{a.streams} * a.groups * a.size, memory.data(), own, own + each};
  rows.take(part);
  for (int64_t first = 0; first < a.slots; first += kTile) {
    int32_t at[kTile];
    const int slots = static_cast<int>(std::min<int64_t>(kTile, a.slots - first));
    for (int slot = 0; slot < slots; ++slot) at[slot] = a.slot_position[(first + slot) * a.streams + part.stream];
    rows.tile(first, at, slots);
  }
  rows.give(part);
}

// In the shortest vectors that hold the rows of a part, of which some may have fewer.
void attend_rows(const PrefixArguments& a, const PrefixPart& part, int32_t rows, std::vector<float>& memory) {
  if (rows > 2 * LONGEST) return attend<LONGEST, 3>(a, part, memory);
  if (rows > LONGEST) return attend<LONGEST, 2>(a, part, memory);
  if (rows > LONGEST / 2) return attend<LONGEST, 1>(a, part, memory);
  attend<std::max(4, LONGEST / 2), 1>(a, part, memory);
}
