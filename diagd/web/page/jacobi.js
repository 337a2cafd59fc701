// Next-token prediction in few passes, as diagd/runtime/decoders/jacobi.py does it, which says why: first guesses of a
// frame, how many of them a pass verifies, and the decoder.

import { feed, range } from "./schedule.js";

const PLACES = 1 << 16;
const KEPT = 0.99, FIRST = 32, SPREAD = 8, REJECTED = 0.05, OFTEN = 8, SLOWER = 1.1;
const STEADY = 16, BETWEEN = 3, SHARE = 0.01, BETTER = 0.93;
const TICK = 0.1; // ms of a browser's clock: a pass is not measured to take less

const total = (values) => values.reduce((sum, value) => sum + value, 0);

// Guesses looked up in what was decoded before.
export class LookupDraft {
  constructor({ rows, columns }) {
    Object.assign(this, { rows, columns, known: new Map() });
  }

  // Of the frame behind `before` to which the ids of an action lead: guesses, and 1 for each that is remembered.
  find(before, led) {
    const { rows, columns } = this, action = led.join(), id = (y, x) => (y < 0 || x < 0 || y >= rows || x >= columns ? -1 : before[y * columns + x]);
    const around = (y, x) => [id(y, x), id(y - 1, x), id(y + 1, x), id(y, x - 1), id(y, x + 1), action].join();
    const keys = Array.from(before, (_, cell) => around(Math.floor(cell / columns), cell % columns));
    const found = keys.map((key) => this.known.get(key));
    return { keys, tokens: found.map((token, cell) => token ?? before[cell]), kinds: found.map((token) => Number(token !== undefined)) };
  }

  // Take what a frame became.
  learn({ keys }, became) {
    if (this.known.size > PLACES) this.known.clear();
    keys.forEach((key, cell) => this.known.set(key, became[cell]));
  }
}

// How many rows a pass verifies, by what passes cost and by how often guesses come out right.
export class WindowPolicy {
  constructor() {
    Object.assign(this, { count: 0, passes: [], quickest: [] });
    Object.assign(this, { steady: false, tries: false, spent: 0, usual: 0, total: 0, ratio: 1, debt: 0, since: 0, fitted: { cost: 0, row: 0 } });
    [this.wrong, this.guesses] = [[0, 0], [0, 0]];
  }

  // Rows of the next window, at most so many, behind those that are only fed, over guesses of these kinds.
  choose(most, unfed, kinds) {
    if (!this.count) return Math.min(FIRST, most);
    if (this.count <= OFTEN || this.count % OFTEN === 0) this.fitted = { ...this.costs(), hazard: this.hazards() };
    if (this.steady !== this.tries) return Math.min(STEADY, most);
    const { cost, row, hazard } = this.fitted;
    let best = 1, rate = 0, reached = 1, decided = 0;
    for (let n = 0; n < most; n++) {
      decided += reached;
      const each = decided / (cost + row * (unfed + n + 1));
      if (each > rate) [best, rate] = [n + 1, each];
      reached *= 1 - hazard[kinds[n]];
    }
    return best;
  }

  // Learn of a pass over guesses of these kinds, `fed` rows in all, that decided the first `kept`.
  add(kinds, kept, fed, time) {
    this.count++;
    this.spent += this.fitted.cost + this.fitted.row * fed;
    const fade = (sums) => sums.forEach((sum, n) => (sums[n] = sum * KEPT));
    fade(this.passes);
    if (this.steady === this.tries) {
      const tested = kinds.slice(0, Math.min(kept, kinds.length - 1));
      [this.guesses, this.wrong].forEach(fade);
      for (const kind of tested) this.guesses[kind]++;
      if (kept < kinds.length) this.wrong[tested.at(-1)]++;
    }
    while (this.passes.length <= fed) this.quickest.push(Infinity) && this.passes.push(0);
    this.passes[fed]++;
    this.quickest[fed] = Math.min(time, SLOWER * this.quickest[fed]);
  }

  // A frame is decided; says whether the next one is tried the other way.
  end() {
    const spent = this.spent, usual = this.usual || spent;
    this.spent = 0;
    this.total += spent;
    if (this.tries) {
      this.ratio += (spent / usual - this.ratio) / 10;
      this.debt += Math.max(spent - usual, 0);
      this.since = 0;
      if (this.ratio < (this.steady ? 1 : BETTER)) Object.assign(this, { steady: !this.steady, usual: usual * this.ratio, ratio: 1 / this.ratio, debt: 0 });
    } else Object.assign(this, { usual: usual + (spent - usual) / 5, since: this.since + 1 });
    this.tries = this.since >= BETWEEN && this.debt <= SHARE * this.total;
  }

  // Chance that a guess is wrong, by kind.
  hazards() {
    const { wrong, guesses } = this, usual = (total(wrong) + REJECTED) / (total(guesses) + 1);
    return wrong.map((count, kind) => (count + usual) / (guesses[kind] + 1));
  }

  costs() {
    const { passes, quickest } = this, seen = [...passes.keys()].filter((rows) => passes[rows]), count = total(passes), times = [];
    let each = Infinity, least = Infinity;
    for (const rows of seen) times.push((each = Math.min(each, quickest[rows] / rows)) * rows);
    for (let n = times.length - 1; n >= 0; n--) times[n] = least = Math.min(least, times[n]);
    const mean = (value) => total(seen.map((rows, n) => (passes[rows] / count) * value(rows, times[n])));
    const middle = mean((rows) => rows), time = mean((_, taken) => taken), doubt = SPREAD / count;
    const slope = mean((rows, taken) => (rows - middle) * taken) + (doubt * time) / (middle + FIRST);
    const row = Math.min(Math.max(slope / (mean((rows) => (rows - middle) ** 2) + doubt), 0), time / middle);
    return { cost: time - row * middle, row };
  }
}

// Guesses are verified in a window, and kept up to the first that came out wrong.
export const jacobi = (policy, lookup, window = null) => async (session) => {
  if (!session.begin()) return 0;
  const frame = session.frames[session.begun - 1], { cells } = session.layout, start = session.layout.firstCell(session.begun - 1);
  const before = session.frames[session.known - 1].tokens;
  let found = lookup.find(before, frame.led);
  frame.tokens.set(found.tokens);
  session.keepSeeds = false;
  let unfed = start - 1 - session.fed, decided = 0, count = 0;
  if (unfed > Math.min(session.width - 1, session.layout.gap)) {
    const known = range(session.fed, start - 1), passes = feed(known, known, session.width);
    await session.run(passes);
    [session.fed, unfed, count] = [start - 1 - session.layout.gap, 0, passes.length];
  }
  while (decided < cells) {
    const began = performance.now(), most = Math.min(cells - decided, session.width - unfed);
    const rows = window ? Math.min(most, window) : policy.choose(most, unfed, found.kinds.slice(decided)), first = start + decided - 1;
    const guesses = frame.tokens.slice(decided, decided + rows);
    const drawn = await session.run([range(first - unfed, first + rows).map((p) => [p, p, p < first ? -1 : p + 1])]);
    const wrong = drawn.findIndex((id, n) => id !== guesses[n]), kept = wrong < 0 ? rows : wrong + 1;
    if (!window) policy.add(found.kinds.slice(decided, decided + rows), kept, unfed + rows, Math.max(TICK, performance.now() - began));
    [decided, unfed, count] = [decided + kept, 0, count + 1];
    if (kept < rows) session.rejected = start + decided - 1;
    if (decided < cells && (await session.renew())) {
      [decided, unfed] = [0, start - 1 - session.fed];
      found = lookup.find(before, frame.led);
      found.kinds.forEach((kind, cell) => kind && (frame.tokens[cell] = found.tokens[cell]));
    }
  }
  if (!window) policy.end();
  lookup.learn(found, frame.tokens);
  session.complete(null);
  return count;
};
