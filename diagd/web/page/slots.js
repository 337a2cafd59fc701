// Which rotary position each slot of the K/V buffers holds, as diagd/runtime/slots.py keeps it; and how a full window
// slides, as diagd/runtime/context.py does it.

import { range } from "./schedule.js";

export const VOID = 2 ** 31 - 1;

export class SlotRing {
  constructor(capacity, inSight) {
    Object.assign(this, { positions: new Int32Array(capacity), turn: inSight });
    this.restart(0);
  }

  restart(base) {
    Object.assign(this, { base, live: 0, next: 0, evicted: false });
    this.positions.fill(VOID);
  }

  // The first slot of each of some passes: behind what was written last, in what was evicted, or behind all in use.
  take(widths) {
    const places = [this.next, this.live], total = widths.reduce((sum, width) => sum + width, 0);
    if (this.evicted && this.next >= this.turn) places.unshift(Math.max(0, this.positions.indexOf(VOID)));
    this.evicted = false;
    const first = places.find((place) => this.isVoid(place, place + total));
    let at = first;
    return first === undefined ? this.scatter(widths) : widths.map((width) => (at += width) - width);
  }

  // Each pass in the next void run that holds it, from what was written last on.
  scatter(widths) {
    const runs = [], starts = [], { positions, next } = this;
    positions.forEach((position, slot) => {
      if (position !== VOID) return;
      if (runs.at(-1)?.[1] === slot) runs.at(-1)[1]++;
      else runs.push([slot, slot + 1]);
    });
    const later = runs.map(([first, last]) => [Math.max(first, next), last]), earlier = runs.map(([first, last]) => [first, Math.min(last, next)]);
    for (let [place, last] of [...later, ...earlier]) {
      while (starts.length < widths.length && place + widths[starts.length] <= last) {
        starts.push(place);
        place += widths[starts.length - 1];
      }
    }
    if (starts.length < widths.length) throw new Error("the window does not fit the buffers");
    return starts;
  }

  isVoid(first, last) {
    return last <= this.positions.length && this.positions.subarray(first, last).every((position) => position === VOID);
  }

  wrote(start, width) {
    this.next = start + width;
    this.live = Math.max(this.live, this.next);
  }

  // Hide the rows at stream positions [first, last).
  forget(first, last) {
    let live = 0;
    for (let slot = 0; slot < this.live; slot++) {
      const position = this.positions[slot];
      if (position === VOID) continue;
      if (position >= first - this.base && position < last - this.base) this.positions[slot] = VOID;
      else live = slot + 1;
    }
    this.live = live;
  }

  evict(first, last) {
    this.forget(first, last);
    this.evicted = true;
  }

  // Hide the rows from a stream position on, and write over those written last.
  rewind(first) {
    this.forget(first, Infinity);
    const capacity = this.positions.length;
    let best = -1, behind = Infinity;
    for (let slot = 0; slot < this.live; slot++) {
      const far = (this.next - 1 - slot + capacity) % capacity;
      if (this.positions[slot] !== VOID && far < behind) [best, behind] = [slot, far];
    }
    this.next = best + 1;
  }

  rebase(shift) {
    for (let slot = 0; slot < this.live; slot++) if (this.positions[slot] !== VOID) this.positions[slot] -= shift;
    this.base += shift;
  }
}

// Voids what leaves the window; turns cached keys back when the rotary table ends.
export class SlidingRotary {
  constructor(spec, layout, ring, engine) {
    Object.assign(this, { layout, ring, engine, window: spec.window, context: spec.context, oldest: 0, built: 0 });
    this.reach = spec.cache.layers * (spec.window - 1); // frames beyond which nothing reaches the rows still seen
  }

  async advance(frame) {
    const { layout, ring } = this;
    this.oldest = Math.max(0, frame - this.window + 1);
    if (this.oldest) ring.evict(layout.prefix, layout.frameStart(this.oldest));
    if (layout.frameStart(frame + 2) - ring.base > this.context.positions) await this.rebase(this.oldest);
    return null;
  }

  holds(known, overlapped) { return known >= this.built && this.oldest <= Math.max(0, known - this.window + (overlapped ? 0 : 1)); }

  replay(known, prompt) {
    this.oldest = 0;
    this.ring.restart(0);
    const first = Math.max(0, known - this.reach - 1);
    this.built = first ? known : 0; // what goes on from further back sees rows that depend on others
    return { first, behind: Math.min(known, first ? first + 1 : prompt) };
  }

  async resume(frame) { if (frame) await this.rebase(frame); }

  async rebase(oldest) {
    const frames = oldest - this.ring.base / this.layout.frameLength;
    await this.engine.rotate(this.context.frame_angles.map((angle) => -frames * angle), this.ring.live);
    this.ring.rebase(frames * this.layout.frameLength);
  }
}

// Drops `roll` frames at once and has the rest fed again at their new positions.
export class SlidingAbsolute {
  constructor(spec, layout, ring) {
    Object.assign(this, { layout, ring, window: spec.window, roll: Math.min(spec.context.roll, spec.window - 1) });
  }

  get frame() { return this.ring.base / this.layout.frameLength; }

  async advance(frame, fed) {
    const { layout, roll } = this, surplus = frame - this.frame - this.window + 1;
    if (surplus <= 0) return null;
    const base = (this.frame + Math.ceil(surplus / roll) * roll) * layout.frameLength;
    this.ring.restart(base);
    const prefix = range(0, layout.prefix), rest = range(layout.prefix + base, fed);
    return { sources: [...prefix, ...rest], positions: [...prefix.map((p) => p + base), ...rest] };
  }

  holds(known) { return this.frame === this.baseOf(known - 1); }

  replay(known, prompt) {
    const base = this.baseOf(known - 1);
    this.ring.restart(base * this.layout.frameLength);
    return { first: base, behind: Math.min(known, base ? base - this.roll + this.window : prompt) };
  }

  async resume() {} // positions are counted from the window's start already

  baseOf(frame) { return Math.max(0, Math.ceil((frame - this.window + 1) / this.roll) * this.roll); }
}
