// The page: what the link says becomes what is seen, what is clicked becomes what it is told. Behind the link is a
// server or a worker of this page; nothing else differs between the two.

import { Figures, label } from "./figures.js";
import { Keys } from "./keys.js";
import { Link } from "./link.js";
import { Screen } from "./screen.js";

const at = (id) => document.getElementById(id);
const link = new Link(), figures = new Figures();
const screen = new Screen(at("screen"), link, (update) => {
  figures.drawn(update);
  remember(update.known);
});
const keys = new Keys(at("screen"), link);
const pictures = (() => { try { return sessionStorage; } catch { return {}; } })(); // of marks, over a reload
const marks = new Map(); // number -> thumbnail, empty until the place was seen
let state = null, errorTimer = 0;
let chosen = {};  // of the settings, and not yet part of the state

function status(kind, text, cover = "") {
  at("status").className = kind;
  at("status-text").textContent = text;
  at("cover").hidden = !cover;
  at("cover").firstElementChild.textContent = cover;
}

function complain(text) {
  at("error").textContent = text;
  at("error").hidden = false;
  clearTimeout(errorTimer);
  errorTimer = setTimeout(() => { at("error").hidden = true; }, 8000);
}

function showKeys(controls) {
  const rows = new Map();
  for (const [code, part] of Object.entries(controls.keys)) rows.set(label(part), [...(rows.get(label(part)) ?? []), code]);
  const cells = [];
  for (const [text, codes] of rows) {
    const cell = document.createElement("div");
    for (const code of codes.filter((one) => !/^(Pad|Axis)/.test(one))) {
      cell.append(Object.assign(document.createElement("kbd"), { textContent: code.replace(/^(Key|Digit|Arrow)/, ""), title: code }));
      cell.lastChild.dataset.code = code;
    }
    cells.push(cell, Object.assign(document.createElement("span"), { textContent: text }));
  }
  if (controls.mouse) cells.push(Object.assign(document.createElement("kbd"), { textContent: "Mouse" }), controls.mouse.field);
  if (!cells.length) cells.push(Object.assign(document.createElement("p"), { className: "note", textContent: "This world takes no actions: it goes on by itself. P pauses it." }));
  at("keys").replaceChildren(...cells);
}

async function showGallery({ parts }) {
  const pictures = await Promise.all(parts.map((part) => createImageBitmap(part)));
  at("gallery").replaceChildren(...pictures.map((picture, number) => {
    const canvas = Object.assign(document.createElement("canvas"), { width: picture.width, height: picture.height });
    canvas.getContext("2d").drawImage(picture, 0, 0);
    const button = document.createElement("button");
    button.setAttribute("aria-label", `Start from picture ${number + 1}`);
    button.append(canvas);
    button.onclick = () => { link.send({ type: "reset", prompt: number }); at("screen").focus(); };
    return button;
  }));
}

// A world that is gone on with after a reload has the pictures of its places again, in the tab that saw them.
function thumbnail({ number, known }) {
  const canvas = document.createElement("canvas"), { ticket } = link, place = `${ticket} ${number} ${known}`;
  if (ticket) canvas.dataset.place = place;
  const picture = ticket && pictures[place];
  if (picture) {
    canvas.dataset.seen = known;
    const bytes = Uint8Array.from(atob(picture.split(",")[1]), (one) => one.charCodeAt(0));
    createImageBitmap(new Blob([bytes])).then((seen) => {
      Object.assign(canvas, { width: seen.width, height: seen.height });
      canvas.getContext("2d").drawImage(seen, 0, 0);
    });
  }
  return canvas;
}

function showTree({ marks: listed, here }) {
  for (const [number, { dataset }] of [...marks]) {
    if (!listed.some((mark) => mark.number === number)) marks.delete(number) && delete pictures[dataset.place];
  }
  const build = (parent) => {
    const list = document.createElement("ul");
    for (const mark of listed.filter((one) => one.parent === parent)) {
      if (!marks.has(mark.number)) marks.set(mark.number, thumbnail(mark));
      const button = document.createElement("button"), item = document.createElement("li");
      button.append(marks.get(mark.number), mark.number ? `Branch ${mark.number} · frame ${mark.known}` : "Start");
      if (mark.number === here) button.setAttribute("aria-current", "true");
      button.onclick = () => { link.send({ type: "visit", number: mark.number }); at("screen").focus(); };
      item.append(button, build(mark.number));
      list.append(item);
    }
    return list.childElementCount ? list : "";
  };
  at("tree").replaceChildren(build(null));
}

// What is on the screen, of so many frames, is the picture of a mark: of the start whenever it is seen, as worlds begin
// anew from other pictures; of a place when it is marked, or of the next frame where the browser left its own out.
function remember(known, exactly = false) {
  for (const mark of state?.marks ?? []) {
    const canvas = marks.get(mark.number), fresh = mark.number === state.here && !canvas.dataset.seen;
    const same = known === mark.known && (fresh || !mark.number);
    if (!same && !(fresh && !exactly && known > mark.known)) continue;
    screen.copy(canvas);
    try {
      if (canvas.dataset.place) pictures[canvas.dataset.place] = canvas.toDataURL();
    } catch { /* there is no place for more: after a reload the picture is missing */ }
  }
}

function showSettings({ settings, rate, mode, autopilot }) {
  const form = at("settings").elements;
  const lags = settings.decoder.match(/^k=(\d+) (serial|chained|d=\d+)/);
  const shown = { ...settings, rate, decoder: lags ? "diagonal" : settings.decoder };
  if (lags) Object.assign(shown, { k: lags[1], d: lags[2].replace("d=", "") });
  for (const [name, value] of Object.entries(shown)) if (form[name] && form[name] !== document.activeElement) form[name].value = value;
  form.k.disabled = form.d.disabled = !lags;
  for (const button of document.querySelectorAll("[name=mode]")) button.checked = button.value === mode;
  at("autopilot").checked = Boolean(autopilot);
}

link.addEventListener("welcome", ({ detail }) => {
  at("name").textContent = document.title = detail.name;
  at("licence").textContent = `Weights: ${detail.licence}`;
  screen.resize(detail.size);
  keys.use(detail.controls);
  showKeys(detail.controls);
  keys.touch(at("pad"), at("buttons"), label);
  at("lock").hidden = !detail.controls.mouse;
  at("film").hidden = !detail.film;
  at("autopilot").disabled = !detail.autopilot;
  at("autopilot-note").textContent = detail.autopilot ? "The model plays, until you press a key." : "Not available: this model does not decode its own actions.";
  at("save-keys").onclick = () => save("controls.json", JSON.stringify(detail.controls, null, 2));
  link.picture = detail;
  status("live", "connected");
  at("screen").focus();
});
link.addEventListener("loading", ({ detail }) => {
  const megabytes = `${(detail.done / 1e6).toFixed(1)} of ${(detail.total / 1e6).toFixed(1)} MB`;
  status("", "loading", detail.done < detail.total ? `Loading the world: ${megabytes}` : "Starting the world…");
});
link.addEventListener("waiting", ({ detail }) => status("", "waiting", `Others are playing. You are number ${detail.place} in the queue.`));
link.addEventListener("ends", ({ detail }) => status("live", "ending", `This game ends in ${detail.seconds} s: ${detail.why}.`));
link.addEventListener("lost", ({ detail }) => status("lost", "disconnected", detail.reason ?? "The connection was lost. Trying again…"));
link.addEventListener("error", ({ detail }) => {
  chosen = {};
  complain(detail.text);
});
link.addEventListener("gallery", ({ detail }) => showGallery(detail));
link.addEventListener("audit", ({ detail }) => {
  at("hud-audit").firstElementChild.textContent = `${(100 * detail.share).toFixed(1)} % of ${detail.frames} frames`;
});
link.addEventListener("record", ({ detail }) => save("play.ndjson", detail.parts[0]));
link.addEventListener("film", ({ detail: { parts: [film] } }) => save(film[0] === 0x47 ? "play.gif" : "play.mp4", film));
link.addEventListener("state", ({ detail }) => {
  state = detail;
  chosen = {};
  showSettings(detail);
  showTree(detail);
  remember(screen.known, true);
});

keys.addEventListener("change", () => {
  for (const key of document.querySelectorAll("kbd[data-code]")) key.classList.toggle("held", keys.held.has(key.dataset.code));
});
keys.addEventListener("shortcut", ({ detail: event }) => {
  const shortcuts = {
    KeyP: () => link.send({ type: "pace", mode: state?.mode === "pause" ? "live" : "pause" }),
    Backspace: () => link.send({ type: "rewind", frames: 10 }),
    KeyB: () => link.send({ type: "branch" }),
  };
  if (event.code in shortcuts) { event.preventDefault(); shortcuts[event.code](); }
});

function save(name, content) {
  const address = URL.createObjectURL(new Blob([content]));
  Object.assign(document.createElement("a"), { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

for (const button of document.querySelectorAll("[data-do]")) {
  button.onclick = () => {
    const { do: type, frames } = button.dataset;
    link.send(frames ? { type, frames: Number(frames) } : { type });
    if (!["save", "film"].includes(type)) at("screen").focus();
  };
}
for (const button of document.querySelectorAll("[name=mode]")) {
  button.onchange = () => link.send({ type: "pace", mode: button.value });
}
at("settings").onsubmit = (event) => event.preventDefault();
at("settings").onchange = ({ target }) => {
  const form = at("settings").elements, { name } = target, number = Number(target.value);
  if (!state || target.value === "" || !target.checkValidity()) return;
  if (name === "rate") return link.send({ type: "pace", rate: number });
  const lag = /^\d/.test(form.d.value) ? `d=${form.d.value}` : form.d.value;
  const decoder = form.decoder.value === "diagonal" ? `k=${form.k.value} ${lag}` : form.decoder.value;
  Object.assign(chosen, ["decoder", "k", "d"].includes(name) ? { decoder } : { [name]: number });
  link.send({ type: "choose", settings: { ...state.settings, ...chosen } });
};
at("autopilot").onchange = ({ target }) => { link.send({ type: "autopilot", on: target.checked }); at("screen").focus(); };
at("lock").onclick = () => { at("screen").focus(); keys.lock(); };

function toggle(button, target, on) {
  const set = (shown) => { button.setAttribute("aria-pressed", shown); target.hidden = !shown; };
  button.onclick = () => set(target.hidden);
  set(on);
}
toggle(at("touch-toggle"), at("touch"), matchMedia("(pointer: coarse)").matches || innerWidth <= 600);
toggle(at("hud-toggle"), at("hud"), true);

at("upload").onchange = async ({ target }) => {
  const [file] = target.files;
  if (!file || !link.picture) return;
  target.value = "";
  const [height, width] = link.picture.size;
  try {
    const picture = await createImageBitmap(file);
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const scale = Math.max(width / picture.width, height / picture.height);
    const [across, down] = link.picture.cover ? [picture.width * scale, picture.height * scale] : [width, height];
    const pen = canvas.getContext("2d");
    pen.drawImage(picture, (width - across) / 2, (height - down) / 2, across, down);
    link.send(new Uint8Array(pen.getImageData(0, 0, width, height).data));
  } catch { complain("This file is no picture that the browser can read."); }
};

link.open();
