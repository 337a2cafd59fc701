// Attention of a step in the prefix form, on the host: two products a tile of slots, keys turned.
//
// Included once for each set of vector instructions, in a namespace of its own, with vectors of up to LONGEST floats in
// REGISTERS. What a row gets has one order of sums, whatever rows are beside it, in vectors of whatever length, and
// whatever is bound behind what it sees. The softmax is the online one of FlashAttention (arXiv 2205.14135).

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
  constexpr int kEach = LONGEST < 8 ? LONGEST : 8;
  using Some = Floats<kEach>;
  Some squares[8 / kEach] = {};
  const int64_t whole = a.columns / 8 * 8;
  for (int64_t column = 0; column < whole; column += 8) {
#pragma GCC unroll 2
    for (int part = 0; part < 8 / kEach; ++part) {
      const int64_t at = column + part * kEach;
      const Some sum = load<Some>(a.x + at) + load<Some>(a.added + at);
      store(a.sum + at, sum), squares[part] += sum * sum;
    }
  }
  float total = 0.0f;
  for (int lane = 0; lane < 8; ++lane) {
    const int64_t column = whole + lane;
    float square = squares[lane / kEach][lane % kEach];
    if (column < a.columns) a.sum[column] = a.x[column] + a.added[column], square += a.sum[column] * a.sum[column];
    total += square;
  }
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(a.columns) + a.epsilon);
  using Floating = Floats<LONGEST>;
  int64_t column = 0;
  for (; column + LONGEST <= a.columns; column += LONGEST)
    store(a.out + column, load<Floating>(a.sum + column) * scale * load<Floating>(a.weight + column));
  for (; column < a.columns; ++column) a.out[column] = a.sum[column] * scale * a.weight[column];
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

// What of K or V is fetched next, a slot's two vectors after the other.
struct Ahead {
  const float* at;
  int64_t left, each, skip;  // pairs of this slot and of each, and floats from the end of one to the next
};

// Rows of `c` weighed by `scale`, or zeros where that is null, plus `a` times `b`; sums go in the order of `count`.
struct Factors {
  const float *a, *b, *scale;
  float* c;
  int64_t a_step, b_step, c_step;
  int count;
  Ahead* ahead;
};

constexpr int kWide = 2 * LONGEST;  // columns of a product at once

template <int ROWS>
void multiply_rows(const Factors& of, int first, int column) {
  using Floating = Floats<LONGEST>;
  const int64_t a_step = of.a_step, b_step = of.b_step, c_step = of.c_step;
  Floating sums[ROWS][2] = {};
  float* const out = of.c + first * c_step + column;
  if (of.scale) {
    const float *c = out, *scale = of.scale + first;
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row, c += c_step) {
      sums[row][0] = load<Floating>(c) * scale[row];
      sums[row][1] = load<Floating>(c + LONGEST) * scale[row];
    }
  }
  const float *a = of.a + first * a_step, *b = of.b + column;
  Ahead ahead = *of.ahead;
  const int64_t on = first ? 0 : kWide;
  for (int k = of.count; k; --k, ++a, b += b_step) {
    __builtin_prefetch(ahead.at, 0, 2), __builtin_prefetch(ahead.at + LONGEST, 0, 2);
    ahead.at += on;
    if (--ahead.left == 0) ahead.at += ahead.skip, ahead.left = ahead.each;
    const Floating one = load<Floating>(b), other = load<Floating>(b + LONGEST);
    const float* factor = a;
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row, factor += a_step) {
      sums[row][0] += *factor * one;
      sums[row][1] += *factor * other;
    }
  }
  if (first == 0) *of.ahead = ahead;
  float* c = out;
#pragma GCC unroll 12
  for (int row = 0; row < ROWS; ++row, c += c_step) {
    store(c, sums[row][0]);
    store(c + LONGEST, sums[row][1]);
  }
}

constexpr int kMost = REGISTERS == 32 ? 12 : 6;  // rows whose sums stay in registers

template <int... ROWS>
inline void multiply_any(int rows, const Factors& of, int first, int column, std::integer_sequence<int, ROWS...>) {
  static constexpr void (*products[])(const Factors&, int, int) = {multiply_rows<ROWS + 1>...};
  products[rows - 1](of, first, column);
}

void multiply(const Factors& of, int rows, int columns) {
  const int each = divided(rows, divided(rows, kMost));
  for (int column = 0; column < columns; column += kWide) {
    for (int row = 0; row < rows; row += each)
      multiply_any(std::min(each, rows - row), of, row, column, std::make_integer_sequence<int, kMost>());
  }
}

// Lanes that are BLOCK apart are swapped between vectors that are as far from each other.
template <int BLOCK, int... LANES>
inline void swap_lanes(Floats<LONGEST>* rows, std::integer_sequence<int, LANES...>) {
  using Floating = Floats<LONGEST>;
  for (int row = 0; row < LONGEST; ++row) {
    if (row & BLOCK) continue;
    const Floating upper = rows[row], lower = rows[row + BLOCK];
    rows[row] = Floating{(LANES & BLOCK ? lower[(LANES - BLOCK) & (LONGEST - 1)] : upper[LANES])...};
    rows[row + BLOCK] = Floating{(LANES & BLOCK ? lower[LANES] : upper[(LANES + BLOCK) & (LONGEST - 1)])...};
  }
}

// LONGEST slots of as many channels to channels of slots.
inline void transpose(const float* from, int64_t step, float* to) {
  using Floating = Floats<LONGEST>;
  Floating rows[LONGEST];
  for (int slot = 0; slot < LONGEST; ++slot) rows[slot] = load<Floating>(from + slot * step);
  constexpr auto lanes = std::make_integer_sequence<int, LONGEST>();
  swap_lanes<1>(rows, lanes), swap_lanes<2>(rows, lanes);
  if constexpr (LONGEST > 4) swap_lanes<4>(rows, lanes);
  if constexpr (LONGEST > 8) swap_lanes<8>(rows, lanes);
  for (int channel = 0; channel < LONGEST; ++channel) store(to + channel * kTile, rows[channel]);
}

template <typename Vector>
inline Vector higher(Vector x, Vector y) {
  return x > y ? x : y;
}

// The highest lane and `most`, without branches.
template <int LANES, int... HALF>
inline float highest_lane(Floats<LANES> x, float most, std::integer_sequence<int, HALF...>) {
  if constexpr (LANES == 4) {
    x = higher(x, Floats<4>{x[2], x[3], x[0], x[1]});
    return higher(higher(x, Floats<4>{x[1], x[0], x[3], x[2]}), Floats<4>{} + most)[0];
  } else {
    constexpr int kHalf = LANES / 2;
    const Floats<kHalf> low{x[HALF]...}, high{x[kHalf + HALF]...};
    return highest_lane<kHalf>(higher(low, high), most, std::make_integer_sequence<int, kHalf / 2>());
  }
}

// Query rows of a part, what a tile takes, and what was found so far.
struct Rows {
  const PrefixArguments& a;
  const PrefixPart part;
  const int64_t step;                      // floats between two slots
  const int columns;                       // of `mixed`, in whole products
  const float *keys, *values;              // of the part's head
  float *turned, *padded, *scores;         // [size][kTile], [kTile][kWide], [rows][kTile]
  float *queries, *mixed, *sums;           // [rows][size], [rows][columns], [rows][kLine]
  float *most, *before;                    // [rows]
  int32_t *position, last = INT32_MIN;     // [rows], of all

  Rows(const PrefixArguments& arguments, const PrefixPart& which, std::vector<float>& memory)
      : a(arguments),
        part(which),
        step(int64_t{a.streams} * a.groups * a.size),
        columns(divided(a.size, kWide) * kWide) {
    const int64_t head = (int64_t{part.stream} * a.groups + part.group) * a.size, rows = part.rows;
    keys = a.keys + head, values = a.values + head;
    memory.resize(rows * (a.size + columns + kTile + kLine + 3) + kTile * (a.size + kWide) + 10 * kLine);
    float* next = memory.data() + -(reinterpret_cast<uintptr_t>(memory.data()) / sizeof(float)) % kLine;
    const auto lines = [&next](int64_t floats) { return std::exchange(next, next + divided(floats, kLine) * kLine); };
    turned = lines(a.size * kTile), padded = lines(kTile * kWide), scores = lines(rows * kTile);
    queries = lines(rows * a.size), mixed = lines(rows * columns), sums = lines(rows * kLine);
    most = lines(rows), before = lines(rows), position = reinterpret_cast<int32_t*>(lines(rows));
  }

  void take() {
    const float scale = 1.44269504f / std::sqrt(static_cast<float>(a.size));  // weights are powers of two
    std::fill(mixed, most, 0.0f), std::fill(most, most + part.rows, kLowest);
    for (int row = 0; row < part.rows; ++row) {
      position[row] = a.positions[part.step_row(a, row)], last = std::max(last, position[row]);
      float* query = queries + row * a.size;
      prepare(a, part.step_row(a, row), part.head(a, row), a.query_norm, true, query);
      for (int channel = 0; channel < a.size; ++channel) query[channel] *= scale;
    }
  }

  void turn(const float* key, int slots) const {
    for (int slot = 0; slot < slots; slot += LONGEST, key += LONGEST * step) {
      const int count = std::min(LONGEST, slots - slot);
      for (int channel = 0; channel < a.size;) {
        float* to = turned + channel * kTile + slot;
        if (count == LONGEST && channel + LONGEST <= a.size) {
          transpose(key + channel, step, to), channel += LONGEST;
        } else {
          for (int one = 0; one < count; ++one) to[one] = key[one * step + channel];
          ++channel;
        }
      }
    }
  }

  // Scores to weights; those of slots that a row does not see are below all others.
  void weigh(const int32_t* at, int rows) const {
    using Floating = Floats<LONGEST>;
    Integers<LONGEST> places[kTile / LONGEST];
    std::memcpy(places, at, sizeof places);
    for (int row = 0; row < rows; ++row) {
      const Integers<LONGEST> own = Integers<LONGEST>{} + position[row];
      Floating highest = Floating{} + kUnseen;
      float* score = scores + row * kTile;
#pragma GCC unroll 8
      for (int vector = 0; vector < kTile / LONGEST; ++vector, score += LONGEST) {
        const Floating found = places[vector] <= own ? load<Floating>(score) : Floating{} + kUnseen;
        highest = higher(found, highest);
        store(score, found);
      }
      before[row] = most[row];
      most[row] = highest_lane<LONGEST>(highest, most[row], std::make_integer_sequence<int, LONGEST / 2>());
    }
    for (int row = 0; row < rows; row += LONGEST)
      store(before + row, power_of_two<LONGEST>(load<Floating>(before + row) - load<Floating>(most + row)));
    for (int row = 0; row < rows; ++row) {
      for (int lane = 0; lane < kLine; lane += LONGEST) {  // as many sums in vectors of whatever length
        Floating sum = load<Floating>(sums + row * kLine + lane) * before[row];
        for (int slot = lane; slot < kTile; slot += kLine) {
          float* score = scores + row * kTile + slot;
          const Floating weight = power_of_two<LONGEST>(load<Floating>(score) - most[row]);
          sum += weight;
          store(score, weight);
        }
        store(sums + row * kLine + lane, sum);
      }
    }
  }

  void tile(int64_t first, const int32_t* at) const {
    const int bound = static_cast<int>(std::min<int64_t>(kTile, a.slots - first));
    int slots = bound;
    while (slots > 0 && at[slots - 1] > last) --slots;  // of longer streams, and not yet written
    int32_t earliest = INT32_MAX, rows = part.rows;
    for (int slot = 0; slot < slots; ++slot) earliest = std::min(earliest, at[slot]);
    while (rows > 0 && position[rows - 1] < earliest) --rows;  // pads, beside longer steps
    if (slots == 0 || rows == 0) return;
    const int64_t pairs = columns / kWide, skip = step - columns;
    const int64_t next = first + kTile < a.slots ? (first + kTile) * step : a.size;  // of the next head
    Ahead ahead_keys = {keys + next, pairs, pairs, skip}, ahead_values = {values + next, pairs, pairs, skip};
    turn(keys + first * step, std::min(bound, divided(slots, LONGEST) * LONGEST));
    multiply({queries, turned, nullptr, scores, a.size, kTile, kTile, a.size, &ahead_keys}, rows, kTile);
    weigh(at, rows);
    const float* value = values + first * step;
    const int whole = a.size / kWide * kWide;
    multiply({scores, value, before, mixed, kTile, step, columns, slots, &ahead_values}, rows, whole);
    if (whole == a.size) return;
    for (int slot = 0; slot < slots; ++slot)
      std::memcpy(padded + slot * kWide, value + slot * step + whole, sizeof(float) * (a.size - whole));
    multiply({scores, padded, before, mixed + whole, kTile, kWide, columns, slots, &ahead_values}, rows, kWide);
  }

  void give() const {
    for (int row = 0; row < part.rows; ++row) {
      const float sum = std::accumulate(sums + row * kLine, sums + (row + 1) * kLine, 0.0f);
      const float share = 1.0f / (sum > 0.0f ? sum : 1.0f);  // a row that sees nothing is a pad
      float* out = a.out + (part.step_row(a, row) * a.groups * a.shared + part.head(a, row)) * a.size;
      for (int channel = 0; channel < a.size; ++channel) out[channel] = mixed[row * columns + channel] * share;
    }
  }
};

void attend_rows(const PrefixArguments& a, const PrefixPart& part, std::vector<float>& memory) {
  Rows rows(a, part, memory);
  rows.take();
  for (int64_t first = 0; first < a.slots; first += kTile) {
    int32_t at[kTile];
    for (int64_t slot = first; slot < first + kTile; ++slot)
      at[slot - first] = slot < a.slots ? a.slot_position[slot * a.streams + part.stream] : INT32_MAX;
    rows.tile(first, at);
  }
  rows.give();
}
