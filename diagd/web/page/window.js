// How many rows a pass verifies, by what passes cost and by how many of their cells come out right, as
// diagd/runtime/decoders/window.py chooses it, which says why.

const KEPT = 0.98, FIRST = 32, SPREAD = 25, REJECTED = 0.05, AHEAD = 0.7, LEARNED = 0.999, OFTEN = 8, LARGE = 1e6, SLOWER = 1.1;

const total = (values) => values.reduce((sum, value) => sum + value, 0);

export class WindowPolicy {
  constructor(cells) {
    Object.assign(this, { unit: 1, count: 0, drawn: 0, decided: 0, wrong: [0, 0], guesses: [0, 0], passes: [], quickest: [] });
    [this.reached, this.failed] = [new Float64Array(cells), new Float64Array(cells)];
  }

  // Rows of the next window, at most so many, behind those that are only fed.
  choose(most, unfed) {
    if (!this.count) return Math.min(FIRST, most);
    if (this.count <= OFTEN || this.count % OFTEN === 0) this.fitted = this.fit();
    const { cost, row, decided, ahead } = this.fitted, drawn = this.drawn ? ahead[this.drawn - 1] : 0;
    let best = 1, rate = 0;
    for (let n = 0; n < most; n++) {
      const each = (decided[n] + Math.max(ahead[n] - drawn, 0)) / (cost + row * (unfed + n + 1));
      if (each > rate) [best, rate] = [n + 1, each];
    }
    return best;
  }

  // Learn of a pass over `rows`, and `fed` in all, that decided the first `kept` cells.
  add(rows, kept, fed, time) {
    this.count++;
    this.unit /= KEPT;
    if (this.unit > LARGE) {
      for (const sums of [this.reached, this.failed, this.passes]) sums.forEach((sum, n) => (sums[n] = sum / this.unit));
      [this.decided, this.unit] = [this.decided / this.unit, 1];
    }
    for (let n = 1; n < kept + (kept < rows); n++) this.reached[n] += this.unit;
    if (kept < rows) this.failed[kept] += this.unit;
    this.decided += kept * this.unit;
    this.learnGuesses(rows, kept);
    while (this.passes.length <= fed) this.quickest.push(Infinity) && this.passes.push(0);
    this.passes[fed] += this.unit;
    this.quickest[fed] = Math.min(time, SLOWER * this.quickest[fed]);
  }

  learnGuesses(rows, kept) {
    const last = Math.min(kept, rows - 1), drawn = Math.min(last, this.drawn);
    [last - drawn, drawn].forEach((guesses, kind) => {
      this.guesses[kind] = LEARNED * this.guesses[kind] + guesses;
      this.wrong[kind] *= LEARNED;
    });
    if (kept < rows) this.wrong[Number(kept <= this.drawn)]++;
    this.drawn = rows - kept;
  }

  // What a pass costs, and sums over windows of what their cells are worth, drawn or not.
  fit() {
    const { unit, reached, failed } = this, usual = (total(failed) + REJECTED * unit) / (total(reached) + unit);
    const worth = this.ahead(), decided = [], ahead = [];
    let survival = 1;
    for (let n = 0; n < reached.length; n++) {
      survival *= 1 - (failed[n] + usual * unit) / (reached[n] + unit);
      decided.push((decided[n - 1] ?? 0) + survival);
      ahead.push((ahead[n - 1] ?? 0) + worth * (1 - survival));
    }
    return { ...this.costs(), decided, ahead };
  }

  ahead() {
    const { wrong, guesses } = this, usual = (total(wrong) + REJECTED) / (total(guesses) + 1);
    const [fresh, drawn] = wrong.map((count, kind) => (count + usual) / (guesses[kind] + 1));
    const error = Math.sqrt(usual * (1 - usual) * total(guesses.map((count) => 1 / (count + 1))));
    return (Math.max(0, AHEAD * (fresh - drawn - error)) * this.decided) / total(this.passes);
  }

  costs() {
    const { passes, quickest } = this, seen = [...passes.keys()].filter((rows) => passes[rows]), count = total(passes), times = [];
    let each = Infinity, least = Infinity;
    for (const rows of seen) times.push((each = Math.min(each, quickest[rows] / rows)) * rows);
    for (let n = times.length - 1; n >= 0; n--) times[n] = least = Math.min(least, times[n]);
    const mean = (value) => total(seen.map((rows, n) => (passes[rows] / count) * value(rows, times[n])));
    const middle = mean((rows) => rows), time = mean((_, taken) => taken), doubt = (SPREAD * this.unit) / count;
    const slope = mean((rows, taken) => (rows - middle) * taken) + (doubt * time) / (middle + FIRST);
    const row = Math.min(Math.max(slope / (mean((rows) => (rows - middle) ** 2) + doubt), 0), time / middle);
    return { cost: time - row * middle, row };
  }
}
