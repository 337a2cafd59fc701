// From what is held to the ids of an action, as diagd/play/controls.py and diagd/runtime/actions.py do it.

const SILENCE = 1000; // ms after which a player who says nothing has let go

export class Inputs {
  constructor(controls, codec) {
    Object.assign(this, { controls, codec, heard: 0, arrived: 0 });
    this.release();
  }

  release() {
    Object.assign(this, { held: [], axes: [], tapped: new Set(), turn: [0, 0], rest: [0, 0], echo: null, changed: false });
  }

  update({ keys, dx, dy, axes, t }) {
    this.heard = performance.now();
    if (keys.join() !== this.held.join() || axes.join() !== this.axes.join() || dx || dy) {
      const done = keys.length || axes.some(Boolean) || dx || dy; // letting go waits for no frame
      if (done && this.echo === null) [this.arrived, this.echo] = [this.heard, t];
      for (const key of keys) if (!this.held.includes(key)) this.tapped.add(key);
    }
    this.changed ||= keys.join() !== this.held.join();
    Object.assign(this, { held: keys, axes, turn: [this.turn[0] + dy, this.turn[1] + dx] });
  }

  // The world stands still: what was tapped and moved is for no frame, what is held may be.
  pause() {
    this.tapped.clear();
    Object.assign(this, { turn: [0, 0], rest: [0, 0], echo: null });
  }

  expire() { if (performance.now() - this.heard > SILENCE) this.release(); }

  get active() {
    this.expire();
    return this.held.length > 0 || this.tapped.size > 0 || this.turn.some(Boolean) || this.axes.some(Boolean);
  }

  // Another action for the frame that began last, where keys changed since and it loses nothing by it.
  newer() { return this.changed && !this.spent ? this.take() : null; }

  // The action of the frame that begins now.
  take() {
    this.expire();
    Object.assign(this, { changed: false, spent: this.tapped.size > 0 || this.turn.some(Boolean) });
    const action = this.action([...this.held, ...[...this.tapped].filter((key) => !this.held.includes(key))]);
    const { echo, codec } = this, waited = echo === null ? 0 : performance.now() - this.arrived;
    this.tapped.clear();
    Object.assign(this, { turn: [0, 0], rest: [0, 0], echo: null });
    if (!codec) return { ids: null, action: {}, echo, waited };
    const ids = codec.slots.map((slot) => token(slot, action));
    this.keep(action, ids);
    return { ids, action, echo, waited };
  }

  // All that is held, a later key over an earlier one; fields add up.
  action(codes) {
    const { keys, sticks, mouse } = this.controls, action = {};
    const merge = (name, value) => {
      const before = action[name], long = Math.max(before?.length, value.length);
      const sums = () => Array.from({ length: long }, (_, n) => (before[n] ?? 0) + (value[n] ?? 0));
      action[name] = Array.isArray(value) && Array.isArray(before) ? sums() : value;
    };
    for (const code of codes) for (const [name, value] of Object.entries(keys[code] ?? {})) merge(name, value);
    for (const { axis, field, component, scale } of sticks) {
      if (this.axes[axis]) merge(field, [...Array(component).fill(0), scale * this.axes[axis]]);
    }
    const turn = this.turn.map((pixels, n) => pixels + this.rest[n]);
    if (mouse && turn.some(Boolean)) merge(mouse.field, turn.map((pixels) => mouse.scale * pixels));
    return action;
  }

  // Mouse motion that the bins did not tell stays for the next frame, in pixels.
  keep(action, ids) {
    const { mouse } = this.controls, numbers = mouse && action[mouse.field];
    if (!numbers) return;
    this.rest = numbers.slice(0, 2).map((number, component) => {
      const n = this.codec.slots.findIndex((slot) => slot.field === mouse.field && (slot.component ?? 0) === component);
      return n < 0 ? 0 : (inside(this.codec.slots[n], number) - middle(this.codec.slots[n], ids[n])) / mouse.scale;
    });
  }
}

function inside(slot, number) {
  const [low, high] = slot.kind === "edges" ? [slot.edges[0], slot.edges.at(-1)] : [-slot.limit, slot.limit];
  return Math.min(Math.max(number, low), high);
}

// What a token says of a number: the middle of its bin.
function middle(slot, id) {
  if (slot.kind === "edges") return (slot.edges[id - slot.first] + slot.edges[id - slot.first + 1]) / 2;
  const level = (2 * (id - slot.first)) / (slot.bins - 1) - 1;
  return (Math.sign(level) * slot.limit * ((1 + slot.mu) ** Math.abs(level) - 1)) / slot.mu;
}

function even(number) {
  const below = Math.floor(number), rest = number - below;
  return below + (rest > 0.5 || (rest === 0.5 && below % 2) ? 1 : 0);
}

export function token(slot, action) {
  if (slot.kind === "constant") return slot.token;
  if (slot.kind === "choice") return slot.first + Math.max(0, slot.names.indexOf(action[slot.field]));
  if (slot.kind === "edges" || slot.kind === "mu_law") {
    const number = inside(slot, action[slot.field]?.[slot.component ?? 0] ?? 0);
    if (slot.kind === "edges") return slot.first + Math.min(slot.edges.length - 2, slot.edges.filter((edge) => edge <= number).length - 1);
    const share = number / slot.limit, level = Math.sign(share) * (Math.log(1 + slot.mu * Math.abs(share)) / Math.log(1 + slot.mu));
    return slot.first + even((slot.limit * level + slot.limit) / ((2 * slot.limit) / (slot.bins - 1)));
  }
  const pressed = slot.buttons.filter((button) => action[button.name]);
  return pressed.length === 1 || (slot.kind === "first_pressed" && pressed.length) ? pressed[0].token : slot.none;
}
