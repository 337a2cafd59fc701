// How many rows a pass verifies, by what passes cost and by how often guesses come out right, as
// diagd/runtime/decoders/jacobi.py chooses it, which says why.

const KEPT = 0.99, FIRST = 32, SPREAD = 8, REJECTED = 0.05, AHEAD = 0.7, OFTEN = 8, SLOWER = 1.1;
const STEADY = 16, BETWEEN = 3, SHARE = 0.01, BETTER = 0.93;

const total = (values) => values.reduce((sum, value) => sum + value, 0);

export class WindowPolicy {
  constructor(kinds = 1) {
    Object.assign(this, { kinds, count: 0, decided: 0, passes: [], quickest: [] });
    Object.assign(this, { steady: false, tries: false, spent: 0, usual: 0, total: 0, ratio: 1, debt: 0, since: 0, fitted: { cost: 0, row: 0 } });
    [this.wrong, this.guesses] = [new Array(2 * kinds).fill(0), new Array(2 * kinds).fill(0)];
  }

  // Rows of the next window, at most so many, behind those that are only fed, over guesses of these kinds.
  choose(most, unfed, kinds) {
    if (!this.count) return Math.min(FIRST, most);
    if (this.count <= OFTEN || this.count % OFTEN === 0) this.fitted = { ...this.costs(), ...this.hazards() };
    if (this.steady !== this.tries) return Math.min(STEADY, most);
    const { cost, row, hazard, ahead } = this.fitted;
    let best = 1, rate = 0, reached = 1, worth = 0;
    for (let n = 0; n < most; n++) {
      worth += reached + (1 - reached) * ahead[kinds[n]];
      const each = worth / (cost + row * (unfed + n + 1));
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
    this.decided = this.decided * KEPT + kept;
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

  // Chance that a guess is wrong, and what it is worth to draw it, by kind.
  hazards() {
    const { wrong, guesses, kinds } = this, usual = (total(wrong) + REJECTED) / (total(guesses) + 1);
    const hazard = wrong.map((count, kind) => (count + usual) / (guesses[kind] + 1));
    const saved = hazard.slice(0, kinds).map((fresh, kind) => {
      const doubt = 1 / (guesses[kind] + 1) + 1 / (guesses[kinds + kind] + 1);
      const less = fresh - hazard[kinds + kind] - Math.sqrt(usual * (1 - usual) * doubt);
      return (Math.max(less, 0) * AHEAD * this.decided) / total(this.passes);
    });
    return { hazard, ahead: [...saved, ...saved.map(() => 0)] };
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
