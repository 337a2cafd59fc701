// What is measured: on this page's clock from key to picture, and by the server in between.

const PARTS = ["wait", "decode", "pixels", "encode", "rest"];
const at = (id) => document.getElementById(id);

export function label(part) {
  return Object.entries(part)
    .map(([name, value]) => (typeof value === "string" ? value : value === true ? name : `${name} ${value.map((n) => Math.round(n * 10) / 10).join(", ")}`))
    .join(" + ").replaceAll("_", " ");
}

const share = (sorted, of) => sorted[Math.min(sorted.length - 1, Math.floor(of * sorted.length))];

export class Figures {
  constructor() { this.times = []; this.next = 0; }

  drawn(update) {
    at("hud-known").textContent = update.known;
    if (!update.ms) return;
    const now = performance.now();
    if (update.echo !== null) this.latency(now - update.echo, update.ms);
    if (now < this.next) return;
    this.next = now + 200;
    at("hud-fps").textContent = `${update.fps.toFixed(1)} of ${update.rate.toFixed(1)}`;
    at("hud-frame").textContent = `${update.p50} / ${update.p95} ms`;
    at("hud-passes").textContent = update.passes;
    at("hud-late").textContent = update.late;
    at("hud-action").textContent = label(update.action) || "none";
  }

  latency(total, ms) {
    this.times = [...this.times.slice(-99), total];
    const sorted = [...this.times].sort((a, b) => a - b);
    at("hud-latency").textContent = `${share(sorted, 0.5).toFixed(0)} / ${share(sorted, 0.95).toFixed(0)} ms`;
    const spent = { ...ms, rest: Math.max(0, total - ms.wait - ms.decode - ms.pixels - ms.encode) };
    const bars = [], texts = [];
    for (const part of PARTS) {
      const bar = Object.assign(document.createElement("div"), { className: part });
      bar.style.width = `${(100 * spent[part]) / total}%`;
      bars.push(bar);
      const value = Object.assign(document.createElement("b"), { textContent: `${spent[part].toFixed(1)} ms` });
      const said = document.createElement("span");
      said.append(Object.assign(document.createElement("i"), { className: part }), `${part === "rest" ? "network and browser" : part} `, value);
      texts.push(said);
    }
    at("split").replaceChildren(...bars);
    at("split-text").replaceChildren(...texts);
  }
}
