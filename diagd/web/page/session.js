// A stream of frames over an engine, decoded pass by pass: diagd/runtime/session.py and stream.py in one.

import { draw } from "./sampler.js";
import { Layout, feed, range } from "./schedule.js";
import { SlidingAbsolute, SlidingRotary, SlotRing, VOID } from "./slots.js";

export class Session {
  constructor(spec, engine) {
    const layout = new Layout(spec.layout), ring = new SlotRing(spec.capacity, spec.in_sight);
    Object.assign(this, { spec, engine, layout, ring, width: spec.max_width, keepSeeds: false, draws: true, forced: null, left: [] });
    this.context = new (spec.context.kind === "rotary" ? SlidingRotary : SlidingAbsolute)(spec, layout, ring, engine);
    this.go([], 0);
  }

  // Be where some frames are known, of which so many were given; K/V rows are built again when a run begins.
  go(frames, prompt) {
    Object.assign(this, { frames, known: frames.length, begun: frames.length, prompt, origin: 0, fed: 0, rejected: null, moved: true });
  }

  // Take back all but so many frames.
  rewind(known) {
    this.frames = this.frames.slice(0, known);
    this.known = this.begun = known;
    this.prompt = Math.min(this.prompt, known);
    this.fed = Math.min(this.fed, this.lastCell(known - 1));
  }

  // Take a prompt: ids of the cells of each frame, and of the known tokens that lead to it.
  start(frames, actions) {
    const { before, gap } = this.layout;
    this.go(frames.map((tokens, n) => this.made(tokens, actions?.[n]?.slice(-(n ? gap : before)) ?? [])), frames.length);
  }

  made(tokens, led) { return { tokens: Int32Array.from(tokens), led: Int32Array.from(led), order: null, origin: 0 }; }

  lastCell(frame) { return this.layout.firstCell(frame) + this.layout.cells - 1; }

  // Begin a run: `act(frame)` gives the ids that lead to a frame when it begins, or null where there are no more;
  // `newer(frame)`, asked between passes of a decoder that can begin a frame anew, others for it, or null.
  async follow(act, rules, newer = async () => null) {
    const { minimum_temperature: least, keep_crossing: keepCrossing } = this.spec;
    const temperature = rules.temperature && Math.max(rules.temperature, least);
    Object.assign(this, { act, newer, renewed: null, rules: { temperature, topK: rules.top_k, topP: rules.top_p, seed: rules.seed, keepCrossing } });
    this.begun = this.prepared = this.known;
    this.frames.length = this.known;
    Object.assign(this, { rejected: null, left: [] });
    const { order } = this.frames[this.known - 1];
    if (this.moved || !this.context.holds(this.known, order && order.d < order.steps)) await this.rebuild();
    else this.ring.rewind(this.fed);
    this.moved = false;
  }

  begin() {
    const led = this.act(this.begun);
    if (led === null) return false;
    this.frames[this.begun] = this.made(this.forced?.[this.begun]?.tokens ?? new Int32Array(this.layout.cells), this.leads(led));
    if (this.begun === this.known) this.origin = this.begun;
    this.begun++;
    return true;
  }

  leads(led) { return this.layout.gap ? led.slice(-this.layout.gap) : []; }

  // Whether a newer action is there for the frame that began last, once a frame; its rows are given back then.
  async renew() {
    const frame = this.begun - 1, led = this.renewed === frame ? null : await this.newer(frame);
    if (!led) return false;
    this.frames[frame].led = Int32Array.from(this.leads(led));
    [this.renewed, this.rejected] = [frame, this.fed];
    return true;
  }

  complete(order) {
    Object.assign(this.frames[this.known], { order, origin: this.origin });
    this.fed = this.lastCell(this.known++);
  }

  // The id at a position of the stream.
  id(position) {
    const { prefix, before, cells, frameLength, prefix_tokens: tokens } = this.layout;
    if (position < prefix) return tokens[position] ?? 0;
    const frame = Math.floor((position - prefix) / frameLength), cell = ((position - prefix) % frameLength) - before;
    if (cell >= cells) return this.frames[frame + 1].led[cell - cells];
    const { led, tokens: ids } = this.frames[frame];
    return cell < 0 ? led[led.length + cell] : ids[cell];
  }

  write(position, id) {
    const { prefix, before, frameLength } = this.layout, at = position - prefix;
    this.frames[Math.floor(at / frameLength)].tokens[(at % frameLength) - before] = id;
  }

  rangeOf(sink) {
    const { ranges } = this.spec, { prefix, before, frameLength } = this.layout;
    return ranges[((sink - prefix - before) % frameLength) % ranges.length];
  }

  // Run passes and draw what they predict; the ids are the stream's unless `commit` is false. Slots are taken for all
  // of them at once; those behind the first `pause` run once there is more to do.
  async run(passes, commit = true, pause = passes.length) {
    if (this.rejected !== null) this.ring.rewind(this.rejected);
    this.rejected = null;
    while (this.prepared < this.begun) {
      const first = Math.min(...passes.flat().map((row) => row[1]));
      const refill = await this.context.advance(this.prepared++, first);
      if (refill) await this.refill(refill);
    }
    const starts = this.ring.take(passes.map((rows) => rows.length)), drawn = [];
    for (let n = 0; n < pause; n++) drawn.push(...(await this.pass(passes[n], starts[n], commit)));
    this.left = passes.map((rows, n) => [rows, starts[n]]).slice(pause);
    return drawn;
  }

  // Run what is left of some passes; gives their number.
  async finish() {
    const left = this.left;
    this.left = [];
    for (const [rows, start] of left) await this.pass(rows, start, true);
    return left.length;
  }

  async pass(rows, start, commit) {
    const { ring } = this, decoded = [], sinks = [];
    const positions = rows.map((row) => row[1] - ring.base), ids = rows.map((row) => this.id(row[0]));
    rows.forEach((row, n) => {
      if (row[2] >= 0 && this.draws) sinks.push(row[2]) && decoded.push(n);
      ring.positions[start + n] = positions[n];
    });
    ring.wrote(start, rows.length);
    await this.engine.step({ ids, positions, decoded, slots: ring.positions, live: ring.live, start });
    rows.forEach(([source, position, sink], n) => { // a seed, which stood in for another token, is never seen again
      if (sink >= 0 && source !== position && !this.keepSeeds) ring.positions[start + n] = VOID;
    });
    const drawn = sinks.map((sink, n) => draw(this.engine.logits(n), this.rangeOf(sink), sink, this.rules));
    if (commit) drawn.forEach((id, n) => this.write(sinks[n], id));
    return drawn;
  }

  async refill({ sources, positions }) {
    await this.run(feed(sources, positions, this.width));
  }

  // Decode again what is known, its tokens given, as far back as rows in the window depend on it.
  async rebuild() {
    const past = this.frames.slice(), { known, act, layout } = this;
    const { first, behind } = this.context.replay(known, this.prompt);
    if (known === this.prompt) return void (this.fed = 0);
    Object.assign(this, { forced: past, draws: false, moved: true }); // until all rows are there
    try {
      const prefix = range(0, layout.prefix), { base } = this.ring;
      if (first && prefix.length) await this.refill({ sources: prefix, positions: prefix.map((p) => p + base) });
      await this.context.resume(first);
      this.frames.length = this.known = this.begun = this.prepared = behind;
      this.fed = first ? layout.frameStart(first) : 0;
      while (this.known < known) {
        const { order, origin } = past[this.known];
        let end = this.known;
        while (end < known && past[end].order === order && past[end].origin === origin) end++;
        this.act = (frame) => (frame < end ? past[frame].led : null);
        while (this.known < end) await (order ? scheduled(order) : raster)(this);
      }
    } finally { // also where a pass failed; frames with the flights they were decoded in, whose beginnings may be gone
      Object.assign(this, { act, forced: null, draws: true, frames: past, known, begun: known });
    }
  }
}

// Passes over a frame whose tokens are given; what is drawn at its cells is not the stream's.
export async function raster(session) {
  if (!session.begin()) return [];
  const start = session.layout.firstCell(session.begun - 1), rows = [];
  for (let p = session.fed; p < session.lastCell(session.begun - 1); p++) rows.push([p, p, p < start - 1 ? -1 : p + 1]);
  const passes = range(0, Math.ceil(rows.length / session.width)).map((n) => rows.slice(n * session.width, (n + 1) * session.width));
  const drawn = await session.run(passes, false);
  session.complete(null);
  return drawn;
}

// Decodes by a schedule until one more frame is known; false: the run has no more. Gives the number of passes.
export const scheduled = (schedule) => async (session) => {
  const { d, steps } = schedule;
  let count = await session.finish();
  if (session.begun === session.known && !session.begin()) return 0;
  session.keepSeeds = schedule.keepSeeds;
  const done = session.known - session.origin, last = done * d + steps, fed = done ? null : session.fed;
  let begins = (session.begun - session.origin) * d, first = done ? Math.max(begins, last - d) : 0; // where the next begins
  while (first < last) {
    if (begins === first && session.begin()) begins += d;
    const end = begins > first ? begins : last; // else the run has no further frame
    const passes = schedule.passes(session.origin, session.begun - session.origin, first, end, session.width, fed);
    const pause = passes.length - Math.max(0, end - last);
    await session.run(passes, true, pause);
    [first, count] = [end, count + pause];
  }
  session.complete(schedule);
  return count;
};
