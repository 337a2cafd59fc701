// A world that is played, as diagd/play/game.py plays it: settings, marks to go back to, and the record that
// `diagd-play --replay` plays again.

import { raster } from "./session.js";

const MAX_BRANCHES = 64;

// Eight hexadecimal digits of a frame's tokens (CRC-32 of them as little-endian words).
export function digest(tokens) {
  let crc = -1;
  for (const byte of new Uint8Array(Int32Array.from(tokens).buffer)) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return (~crc >>> 0).toString(16).padStart(8, "0");
}

export class Game {
  constructor(world) {
    Object.assign(this, { world, session: world.session, spec: world.spec, settings: world.spec.settings, lines: [], led: new Map() });
    this.record(world.spec.record);
  }

  record(line) { this.lines.push(JSON.stringify(line)); }

  get known() { return this.session.known; }

  // Begin anew from frames of tokens; gives the pictures of the last one, as all that moves the world does.
  reset(prompt) {
    const { spec } = this, { columns } = spec.layout, actions = spec.rest && prompt.map(() => spec.rest);
    this.stop();
    this.session.start(prompt, actions);
    const grids = prompt.map((tokens) => Array.from({ length: spec.layout.rows }, (_, row) => [...tokens.slice(row * columns, (row + 1) * columns)]));
    this.record({ start: grids, actions });
    this.record({ settings: this.settings });
    Object.assign(this, { marks: new Map(), next: 1, chosen: this.known });
    this.mark(0, null);
    return this.look();
  }

  choose(settings) {
    const strategy = this.world.strategy(settings.decoder);
    this.stop();
    Object.assign(this, { settings, strategy, chosen: this.known });
    this.record({ settings });
  }

  rewind(frames) {
    frames = Math.min(frames, this.known - 1);
    this.stop();
    if (frames > 0) {
      this.chosen = Math.min(this.chosen, this.known - frames);
      this.session.rewind(this.known - frames);
      this.record({ rewind: frames });
      while (this.here && this.marks.get(this.here).known > this.known) this.here = this.marks.get(this.here).parent ?? 0;
    }
    return this.look();
  }

  branch() {
    if (this.marks.size > MAX_BRANCHES) throw new Error(`${MAX_BRANCHES} places are marked already; reset the world to begin anew`);
    this.stop();
    this.mark(this.next, this.here);
    this.record({ branch: this.next++ });
  }

  visit(number) {
    const mark = this.marks.get(number);
    if (!mark) throw new Error(`no place has the number ${number}`);
    this.stop();
    this.session.go(mark.frames.slice(), Math.min(this.session.prompt, mark.known));
    Object.assign(this, { here: number, chosen: this.known });
    this.record({ visit: number });
    return this.look();
  }

  mark(number, parent) {
    this.marks.set(number, { number, parent, known: this.known, frames: this.session.frames.slice(0, this.known) });
    this.here = number;
  }

  // The share of the last frames' cells that next-token prediction draws, with the same seed.
  async audit(most) {
    const count = Math.min(most, this.known - this.chosen), { session } = this;
    if (count < 1) throw new Error("no frame was decoded by these settings yet; play on and ask again");
    this.stop();
    const { prompt, known } = session, truth = session.frames.slice(0, known);
    let same = 0;
    try {
      session.go(truth.slice(0, known - count), prompt);
      await session.follow((frame) => truth[frame].led, this.settings);
      session.forced = truth;
      for (let frame = known - count; frame < known; frame++) {
        same += (await raster(session)).filter((id, cell) => id === truth[frame].tokens[cell]).length;
      }
    } finally {
      session.forced = null;
      session.go(truth, prompt);
    }
    this.record({ audit: count });
    return { frames: count, share: same / (count * session.layout.cells) };
  }

  // Decode one frame; `act()` gives its action when it begins, `newer()` perhaps another one while it is decoded.
  async advance(act, newer) {
    const { session } = this, began = performance.now(), known = this.known;
    Object.assign(this, { act, newer });
    this.strategy ??= this.world.strategy(this.settings.decoder);
    try {
      if (!this.running) await session.follow((frame) => this.pull(frame), this.settings, (frame) => this.renew(frame));
      this.running = true;
      const passes = await this.strategy(session), decoded = performance.now();
      if (this.known === known) return (this.running = false), null;
      const { tokens } = session.frames[known], taken = this.led.get(known), pictures = await this.show(tokens);
      this.led.delete(known);
      this.record({ frame: known, action: taken.ids, tokens: digest(tokens) });
      return { taken, passes, pictures, decode: decoded - began, pixels: performance.now() - decoded };
    } catch (error) {
      this.running = false;
      throw error;
    }
  }

  pull(frame) {
    const taken = this.act();
    if (taken) this.led.set(frame, taken);
    return taken && (taken.ids ?? []);
  }

  async renew(frame) {
    const taken = await this.newer();
    if (!taken?.ids) return null;
    this.led.set(frame, taken);
    return taken.ids;
  }

  // Give up frames in flight.
  stop() {
    if (this.led.size) this.record({ ahead: [...this.led.values()].map((taken) => taken.ids) });
    this.running = false;
    this.led.clear();
    this.session.frames.length = this.known;
  }

  // Pictures of the next frame; a tokenizer that compresses time draws them from some frames before it too.
  async show(tokens) {
    const { latents, factor } = this.spec.tokenizer, [height, width] = this.spec.size, first = !this.window.length;
    this.window = [...this.window, tokens].slice(-latents);
    const bytes = await this.world.decoder.decode(this.window, 1 + (this.window.length - 1) * factor), each = height * width * 3;
    const pictures = [];
    for (let at = first ? 0 : bytes.length - factor * each; at < bytes.length; at += each) pictures.push(image(bytes, at, height, width));
    return pictures;
  }

  // A picture of a frame alone.
  still(tokens) {
    this.window = [];
    return this.show(tokens);
  }

  async look() {
    let pictures;
    this.window = [];
    for (const { tokens } of this.session.frames.slice(-this.spec.tokenizer.latents)) pictures = await this.show(tokens);
    return pictures;
  }
}

function image(rgb, at, height, width) {
  const picture = new ImageData(width, height), { data } = picture;
  for (let n = 0; n < height * width; n++) {
    data[4 * n] = rgb[at + 3 * n];
    data[4 * n + 1] = rgb[at + 3 * n + 1];
    data[4 * n + 2] = rgb[at + 3 * n + 2];
    data[4 * n + 3] = 255;
  }
  return picture;
}
