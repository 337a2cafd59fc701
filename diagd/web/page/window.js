// How many rows a pass verifies, chosen by what passes cost and how many cells come out right: see
// diagd/runtime/decoders/window.py, whose figures these are.

const KEPT = 0.98, FIRST = 32, SPREAD = 25, REJECTED = 0.05, OUTLIER = 3;

export class WindowPolicy {
  constructor(cells) {
    this.reached = new Float64Array(cells);
    this.failed = new Float64Array(cells);
    this.sums = [0, 0, 0, 0, 0]; // of 1, rows, time, rows^2, rows * time
  }

  choose(most, unfed) {
    if (!this.sums[0]) return Math.min(FIRST, most);
    const [cost, row] = this.costs(), total = (values) => values.reduce((sum, value) => sum + value, 0);
    const usual = (total(this.failed) + REJECTED) / (total(this.reached) + 1);
    let best = 1, rate = 0, survival = 1, decided = 0;
    for (let n = 0; n < most; n++) {
      survival *= 1 - (this.failed[n] + usual) / (this.reached[n] + 1);
      decided += survival;
      const each = decided / (cost + row * (unfed + n + 1));
      if (each > rate) [best, rate] = [n + 1, each];
    }
    return best;
  }

  add(rows, kept, fed, time) {
    for (let n = 0; n < this.reached.length; n++) {
      this.reached[n] *= KEPT;
      this.failed[n] *= KEPT;
      if (n >= 1 && n < kept + (kept < rows)) this.reached[n]++;
    }
    if (kept < rows) this.failed[kept]++;
    if (this.sums[0]) {
      const [cost, row] = this.costs();
      time = Math.min(time, OUTLIER * (cost + row * fed));
    }
    this.sums = [1, fed, time, fed ** 2, fed * time].map((value, n) => KEPT * this.sums[n] + value);
  }

  costs() {
    const [rows, time, squares, products] = this.sums.slice(1).map((sum) => sum / this.sums[0]);
    const usual = time / (rows + FIRST), doubt = SPREAD / this.sums[0];
    const row = Math.min(Math.max((products - rows * time + doubt * usual) / (squares - rows ** 2 + doubt), 0), time / rows);
    return [time - row * rows, row];
  }
}
