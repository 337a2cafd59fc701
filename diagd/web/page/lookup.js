// First guesses of a frame, looked up in what was decoded before; see diagd/runtime/decoders/jacobi.py.

export const TRUST = 8;
const PLACES = 1 << 16;

export class LookupDraft {
  constructor({ rows, columns }) {
    Object.assign(this, { rows, columns, known: new Map() });
  }

  // Of the frame behind `before` to which the ids of an action lead: guesses and the level of trust in each.
  find(before, led) {
    const { rows, columns } = this, action = led.join(), id = (y, x) => (y < 0 || x < 0 || y >= rows || x >= columns ? -1 : before[y * columns + x]);
    const around = (y, x) => [id(y, x), id(y - 1, x), id(y + 1, x), id(y, x - 1), id(y, x + 1), action].join();
    const keys = Array.from(before, (_, cell) => around(Math.floor(cell / columns), cell % columns));
    const found = keys.map((key, cell) => this.known.get(key) ?? [before[cell], 0]);
    return { keys, tokens: found.map(([token]) => token), trust: found.map(([, trust]) => trust) };
  }

  // Take what a frame became.
  learn({ keys, tokens, trust }, became) {
    if (this.known.size > PLACES) this.known.clear();
    keys.forEach((key, cell) => {
      const came = trust[cell] && tokens[cell] === became[cell];
      this.known.set(key, [became[cell], came ? Math.min(trust[cell] + 1, TRUST - 1) : 1]);
    });
  }
}
