// First guesses of a frame, looked up in what was decoded before; see diagd/runtime/decoders/lookup.py.

export const TRUST = 8;
const PLACES = 1 << 16;

export class LookupDraft {
  constructor({ rows, columns }) {
    Object.assign(this, { rows, columns, known: new Map() });
  }

  // Tokens of the frame behind `before` to which the ids of an action lead, and the level of trust in each.
  guess(before, led) {
    const { rows, columns } = this, action = led.join(), id = (y, x) => (y < 0 || x < 0 || y >= rows || x >= columns ? -1 : before[y * columns + x]);
    const around = (y, x) => [id(y, x), id(y - 1, x), id(y + 1, x), id(y, x - 1), id(y, x + 1), action].join();
    this.keys = Array.from(before, (_, cell) => around(Math.floor(cell / columns), cell % columns));
    this.guesses = this.keys.map((key, cell) => this.known.get(key) ?? [before[cell], 0]);
    return { tokens: Int32Array.from(this.guesses, ([token]) => token), trust: this.guesses.map(([, trust]) => trust) };
  }

  // Take what the frame became that was guessed last.
  learn(tokens) {
    if (this.known.size > PLACES) this.known.clear();
    this.keys.forEach((key, cell) => {
      const [guess, trust] = this.guesses[cell];
      this.known.set(key, [tokens[cell], trust && guess === tokens[cell] ? Math.min(trust + 1, TRUST - 1) : 1]);
    });
  }
}
