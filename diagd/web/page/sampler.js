// From logits to ids as diagd/engines/sampler.py does it: the same rules, the same noise, to the bit.
// Every sum, product and quotient is one of float32, rounded by itself (Math.fround), exponentials and logarithms are
// polynomials of our own, and weights are multiples of 2**-36, whose sums in float64 are exact: nothing here depends
// on how a machine rounds its library functions.

const f = Math.fround;
const KEYS = [0x9e3779b9, 0xbb67ae85], MULTIPLIERS = [0xd2511f53, 0xcd9e8d57], TAG = 1;
const ROOT_BITS = 0x3f3504f3, LN_2 = f(0.6931471805599453), SERIES = [f(1 / 5), f(1 / 3)], SEVENTH = f(1 / 7);
const POWERS = [1.33335581e-3, 9.61812911e-3, 5.55041087e-2, 2.40226507e-1, 6.93147181e-1].map(f);
const WHOLE = f(1.5 * 2 ** 23), ROUND = f(2 ** -13), WORD = 2 ** 32;
const floats = new Float32Array(1), bits = new Int32Array(floats.buffer);

// The high word of a product of two 32-bit words, from halves: doubles hold each part exactly.
function high(a, b) {
  const low = (a & 0xffff) * b; // below 2**48
  return Math.floor(((a >>> 16) * b + Math.floor(low / 0x10000)) / 0x10000) >>> 0;
}

// Philox4x32-10 of a block of four ids at a position; the key is the seed.
export function words(seed, position, block) {
  let a = position >>> 0, b = Math.floor(position / WORD), c = block, d = TAG;
  let one = seed >>> 0, two = Math.floor(seed / WORD) >>> 0;
  for (let round = 0; round < 10; round++) {
    const next = (high(MULTIPLIERS[1], c) ^ b ^ one) >>> 0, third = (high(MULTIPLIERS[0], a) ^ d ^ two) >>> 0;
    b = Math.imul(MULTIPLIERS[1], c) >>> 0;
    d = Math.imul(MULTIPLIERS[0], a) >>> 0;
    a = next;
    c = third;
    one = (one + KEYS[0]) >>> 0;
    two = (two + KEYS[1]) >>> 0;
  }
  return [a, b, c, d];
}

// -ln(1 - v) of v = (word + 1/2) / 2**32; see sampler.py.
export function exponential(word) {
  const v = Math.min(f(f(f(word) * 2 ** -32) + 2 ** -33), 1 - 2 ** -24);
  floats[0] = 1 - v;
  const exponent = (bits[0] - ROOT_BITS) >> 23;
  bits[0] -= exponent << 23;
  const z = exponent === 0 ? v : f(1 - floats[0]), s = f(z / f(2 - z)), square = f(s * s);
  let series = f(square * SEVENTH);
  for (const term of SERIES) series = f(f(series + term) * square);
  return f(f(f(series + 1) * f(s + s)) - f(exponent * LN_2));
}

// 2**log in multiples of 2**-36, for logs from -100 to 0.
function power(log) {
  const shifted = f(log + WHOLE), part = f(log - f(shifted - WHOLE));
  let result = f(part * POWERS[0]);
  for (let n = 1; n < POWERS.length; n++) result = f(f(result + POWERS[n]) * part);
  floats[0] = shifted;
  const exponent = bits[0] << 23;
  floats[0] = f(result + 1);
  bits[0] += exponent;
  return f(f(floats[0] + ROUND) - ROUND);
}

// The value at which a sum over the largest ones exceeds a share: by halves, without sorting all.
function crossing(values, weights, share) {
  let places = values.map((_, n) => n), ahead = 0;
  for (;;) {
    const pivot = values[places[places.length >> 1]];
    let larger = 0, equal = 0;
    for (const n of places) if (values[n] > pivot) larger += weights[n]; else if (values[n] === pivot) equal += weights[n];
    if (ahead + larger > share) places = places.filter((n) => values[n] > pivot);
    else if (ahead + larger + equal > share) return pivot;
    else {
      ahead += larger + equal;
      places = places.filter((n) => values[n] < pivot);
    }
  }
}

// The next larger float32.
function above(value) {
  if (value === 0) return 2 ** -149;
  floats[0] = value;
  bits[0] += value > 0 ? 1 : -1;
  return floats[0];
}

// The least logit that top-k and top-p keep; of the weights, those below it are gone.
function floorOf(logits, weights, { topK, topP, keepCrossing }, top) {
  let floor = -Infinity;
  if (topK > 0 && topK < logits.length) floor = crossing(logits, logits.map(() => 1), topK - 0.5);
  if (f(topP) === 1) return floor;
  let total = 0;
  logits.forEach((logit, n) => {
    if (logit < floor) weights[n] = 0;
    total += weights[n];
  });
  const least = crossing(logits, weights, total * f(topP));
  return Math.max(floor, keepCrossing ? least : Math.min(above(least), top));
}

// One id in [low, high) of a row of logits, for the cell at a position of the stream.
export function draw(row, [low, high], position, rules) {
  const logits = row.subarray(low, high);
  const top = logits.reduce((one, other) => Math.max(one, other)); // NaN where one of them is
  let best = logits.indexOf(top);
  if (!Number.isFinite(top)) throw new Error(`the largest logit is ${top}; the weights or the precision of this world are broken`);
  if (rules.temperature === 0) return low + best;
  const scale = f(1 / (Math.LN2 * f(rules.temperature)));
  const weights = logits.map((logit) => power(Math.max(f(f(logit - top) * scale), -100)));
  const floor = floorOf(logits, weights, rules, top);
  let most = -1, block = -1, noise;
  for (let n = 0; n < logits.length; n++) {
    if (!(logits[n] >= floor) || !weights[n]) continue;
    const id = low + n;
    if (id >> 2 !== block) noise = words(rules.seed, position, (block = id >> 2));
    const score = f(weights[n] / exponential(noise[id & 3]));
    if (score > most) [most, best] = [score, n];
  }
  return low + best;
}
