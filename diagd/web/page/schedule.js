// Which token is fed at which step: the tables of diagd/schedule, a step at a time. A row is [source, position, sink]:
// the stream position of the id, where it is fed, and the cell that its prediction fills (-1: none).

export class Layout {
  constructor(spec) {
    Object.assign(this, spec);
    this.cells = this.rows * this.columns;
    this.gap = this.before + this.after;
    this.frameLength = this.cells + this.gap;
  }

  frameStart(frame) { return this.prefix + frame * this.frameLength; }

  firstCell(frame) { return this.frameStart(frame) + this.before; }
}

export class Schedule {
  constructor(layout, { k, d, seeds, refeed, keepSeeds }) {
    Object.assign(this, { layout, k, d, seeds, refeed, keepSeeds });
    const { rows, columns } = layout;
    this.steps = columns + (rows - 1) * k; // of a frame
    const low = k * rows;
    if (!(k >= 1 && k <= columns)) throw new Error(`row lag k=${k} is outside 1..${columns}`);
    if (!(d >= low && d <= this.steps)) throw new Error(`frame lag d=${d} is outside ${low} (chained) .. ${this.steps} (serial)`);
    this.isNext = k === columns;
    this.inFlight = Math.floor(this.steps / d) + 1;
  }

  // As `Schedule.parse`; what is not spelled is the default's.
  static parse(spelling, layout, base) {
    const found = { ...base }, { rows, columns } = layout;
    let lag = null;
    for (const word of spelling.replace(/next token|\bntp\b/, `k=${columns}`).replaceAll(",", " ").split(/\s+/).filter(Boolean)) {
      const [, name, value] = word.match(/^(k|d|seeds)=(\w+)$/) ?? [];
      if (name === "k") [found.k, lag] = [Number(value), lag ?? "serial"];
      else if (name === "d" || word === "serial" || word === "chained") lag = value ?? word;
      else if (name === "seeds") found.seeds = value;
      else if (word === "no-refeed") found.refeed = false;
      else if (word === "keep-seeds") found.keepSeeds = true;
      else throw new Error(`'${spelling}' is no order of decoding: expected 'next token', 'k=1 chained', 'k=2 d=30' or 'jacobi'`);
    }
    if (lag) found.d = { serial: columns + (rows - 1) * found.k, chained: found.k * rows }[lag] ?? Number(lag);
    return new Schedule(layout, found);
  }

  // The passes [first, last) of a flight of `begun` frames from `origin` on, counted from its first decoding step.
  // With `fed`, the first position that is not in the cache, known tokens are fed ahead, in passes of `width` at most.
  passes(origin, begun, first, last, width, fed = null) {
    const all = [];
    for (let step = first; step < last; step++) {
      const rows = this.step(origin, begun, step);
      for (let p = this.layout.firstCell(origin) - 2; step === 0 && fed !== null && p >= fed; p--) rows.push([p, p, -1]);
      rows.sort((one, other) => one[1] - other[1]);
      const ahead = [];
      while (step === 0 && rows.length - width * ahead.length > width) ahead.push(ahead.length + 1);
      const cuts = [0, ...ahead.map((n) => rows.length - n * width).reverse(), rows.length];
      for (let n = 1; n < cuts.length; n++) all.push(rows.slice(cuts[n - 1], cuts[n]));
    }
    return all;
  }

  step(origin, begun, step) {
    const { layout, k, d, steps } = this, { rows, columns, gap } = layout, found = [];
    const known = (position) => found.push([position, position, -1]);
    for (let frame = Math.max(0, Math.floor((step - steps) / d)); frame < begun && frame * d <= step; frame++) {
      const at = step - frame * d, start = layout.firstCell(origin + frame);
      if (at === 0 && frame > 0) for (let back = -gap; back < -1; back++) known(start + back);
      for (let row = 0; row < rows; row++) {
        const column = at - row * k, cell = row * columns + column;
        if (column >= 0 && column < columns) found.push([this.source(start, frame, cell), start + cell - 1, start + cell]);
        if (column === columns && this.feedsEnd(row)) known(start + cell - 1);
      }
    }
    return found;
  }

  // Whether the last token of a row is fed by itself, where no query feeds it.
  feedsEnd(row) {
    if (row < this.layout.rows - 1) return this.refeed && !this.isNext;
    return this.d === this.steps ? this.layout.gap > 0 : this.refeed;
  }

  // What is fed ahead of a cell: its predecessor, or a stand-in where that is not decoded yet.
  source(start, frame, cell) {
    const { layout, k, d, steps, seeds } = this, { rows, columns, cells, frameLength } = layout;
    const isSeed = cell === 0 ? frame > 0 && layout.gap === 0 && d < steps : cell % columns === 0 && !this.isNext;
    if (!isSeed) return start + cell - 1;
    const above = cell === 0 ? start - frameLength + cells - columns : start + cell - columns;
    if (seeds === "above") return above;
    if (seeds === "duplicate") return above + Math.min(columns, cell === 0 ? d - (rows - 1) * k : k) - 1;
    const end = (cell - 1 + cells) % cells;
    if (seeds === "prompt") return layout.firstCell(0) + end;
    const wait = cell === 0 ? steps - 1 : columns - 1 - k;
    return start - Math.min(Math.max(1, Math.floor(wait / d) + 1), frame + 1) * frameLength + end;
  }
}

// Passes that only feed known tokens, of `width` at most.
export function feed(sources, positions, width) {
  const passes = [];
  for (let n = 0; n < positions.length; n += width) passes.push(positions.slice(n, n + width).map((p, m) => [sources[n + m], p, -1]));
  return passes;
}

export const range = (first, last) => Array.from({ length: Math.max(0, last - first) }, (_, n) => first + n);
