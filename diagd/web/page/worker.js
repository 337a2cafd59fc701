// The thread that plays: commands, then a frame when it is due, with the newest input. It hears and says what the
// server of diagd-play does (docs/play.md, Protocol), pictures as pixels.

import { Game } from "./game.js";
import { Inputs } from "./inputs.js";
import { World } from "./world.js";

const AUDITED = 16, KEPT = 120, SHARE = 0.9, IDLE = 250, MOST_UNSEEN = 2;
const commands = [], channel = new MessageChannel();
let wake = () => {}, game, inputs, pacer, mode = "live", number = 0, seen = 0, prompt;

const say = (type, rest) => postMessage({ type, ...rest });

// Ticks at the rate that was asked for, or at one that can be kept; what is missed is not made up for.
class Pacer {
  constructor(asked) { Object.assign(this, { asked, late: 0, work: [], shown: [], next: performance.now() }); }

  share(of) { return this.work.length ? [...this.work].sort((a, b) => a - b)[Math.floor(of * (this.work.length - 1))] : 0; }

  get rate() { return Math.min(this.asked, this.work.length ? (1000 * SHARE) / this.share(0.95) : Infinity); }

  get fps() { return this.shown.length > 1 ? (1000 * (this.shown.length - 1)) / (this.shown.at(-1) - this.shown[0]) : 0; }

  delay() { return Math.max(0, this.next - performance.now()); }

  tick() {
    const now = performance.now(), period = 1000 / this.rate;
    if (now - this.next > period) [this.late, this.next] = [this.late + 1, now];
    this.next = Math.min(this.next, now) + period;
  }

  rest() { Object.assign(this, { next: performance.now(), shown: [] }); }

  add(time) {
    this.work = [...this.work, time].slice(-KEPT);
    this.shown = [...this.shown, performance.now()].slice(-KEPT);
  }
}

const OBEY = {
  reset: ({ prompt: chosen }) => reset(chosen === undefined ? prompt : game.spec.prompts[chosen]),
  rewind: async ({ frames }) => look(await game.rewind(frames)),
  visit: async ({ number: mark }) => look(await game.visit(mark)),
  branch: () => game.branch(),
  choose: ({ settings }) => game.choose(settings),
  audit: async () => say("audit", await game.audit(AUDITED)),
  save: () => say("record", { parts: [`${game.lines.join("\n")}\n`] }),
  pace: (message) => {
    mode = message.mode ?? mode;
    pacer.asked = message.rate ?? pacer.asked;
  },
  picture: async ({ pixels }) => reset([await game.world.encode(pixels.filter((_, n) => n % 4 < 3))]),
};

async function reset(tokens) {
  look(await game.reset((prompt = tokens)));
}

function look(pictures) {
  say("frame", { id: ++number, known: game.known, parts: pictures });
  pacer.rest();
}

function state() {
  const marks = [...game.marks.values()].map(({ number: mark, parent, known }) => ({ number: mark, parent, known }));
  say("state", { mode, rate: pacer.asked, settings: game.settings, marks, here: game.here, known: game.known });
}

async function guarded(work) {
  try {
    await work();
  } catch (error) {
    say("error", { text: error.message });
    mode = work === play ? "pause" : mode;
  }
}

// Let keys in that were pressed meanwhile.
async function newer() {
  await pause(0);
  return inputs.newer();
}

async function play() {
  const began = performance.now();
  pacer.tick();
  const { taken, passes, pictures, decode, pixels } = await game.advance(() => inputs.take(), newer);
  const round = (value, digits) => Number(value.toFixed(digits));
  const ms = { wait: round(taken.waited, 2), decode: round(decode, 2), pixels: round(pixels, 2), encode: 0 };
  const figures = { fps: round(pacer.fps, 1), rate: round(pacer.rate, 1), p50: round(pacer.share(0.5), 1), p95: round(pacer.share(0.95), 1) };
  const { echo, action } = taken;
  say("frame", { id: ++number, known: game.known, parts: pictures, echo, action, ms, passes, late: pacer.late, ...figures });
  pacer.add(performance.now() - began);
}

// Let messages in, for so many milliseconds or until one comes.
function pause(time) {
  return new Promise((done) => {
    wake = done;
    if (time) return void setTimeout(done, time);
    channel.port1.onmessage = done;
    channel.port2.postMessage(null);
  });
}

async function run() {
  for (;;) {
    while (commands.length) {
      await guarded(commands.shift());
      state();
    }
    const moves = mode === "live" || (mode === "step" && inputs.active);
    if (!moves) pacer.rest();
    if (mode === "pause") inputs.pause();
    const due = inputs.changed ? 0 : pacer.delay(), delay = moves && number - seen < MOST_UNSEEN ? due : IDLE; // unseen, it stands still
    if (!delay) {
      await guarded(play);
      if (mode === "pause") state();
    }
    await pause(delay);
  }
}

onmessage = ({ data }) => {
  if (data instanceof Uint8Array) data = { type: "picture", pixels: data };
  if (data.type === "ack") seen = Math.max(seen, data.id);
  else if (data.type === "input") inputs?.update(data);
  else commands.push(() => OBEY[data.type](data));
  wake();
};

async function open() {
  const threads = Number(new URLSearchParams(location.search).get("threads") ?? 1);
  const base = new URL("./", location.href).href, progress = (done, total) => say("loading", { done, total });
  const world = await World.open(base, { threads: self.crossOriginIsolated && self.SharedArrayBuffer ? threads : 1, progress });
  const { spec } = world, { name, licence, size, cover, controls, fps, prompts } = spec;
  [game, inputs, pacer] = [new Game(world), new Inputs(controls, spec.actions), new Pacer(fps)];
  say("welcome", { name, licence, size, cover, controls, autopilot: false });
  const gallery = [];
  for (const frames of prompts) gallery.push((await game.still(frames.at(-1)))[0]);
  say("gallery", { parts: gallery });
  await reset(prompts[0]);
  state();
  await run();
}

open().catch((error) => say("lost", { reason: `This world cannot be played here: ${error.message}` }));
