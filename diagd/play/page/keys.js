// What is held: keyboard by code, mouse, gamepad and touch, sent whole on every change and five times a second.

const DEAD = 0.15, PUSHED = 0.5, EVERY = 200, GAP = 16;
const BITS = [1, 4, 2, 8, 16]; // of `buttons`, by `button`
const PAD = { left: ["ArrowLeft", "KeyA"], right: ["ArrowRight", "KeyD"], up: ["ArrowUp", "KeyW"], down: ["ArrowDown", "KeyS"] };

function gamepads() {
  try { return [...navigator.getGamepads()]; } catch { return []; } // a browser has none, or whoever frames the page forbids it
}

export class Keys extends EventTarget {
  constructor(canvas, link) {
    super();
    Object.assign(this, { canvas, link, controls: { keys: {}, sticks: [], mouse: null }, held: new Map(), dx: 0, dy: 0, axes: [], sent: 0 });
    canvas.addEventListener("keydown", (event) => this.key(event, true));
    canvas.addEventListener("keyup", (event) => this.key(event, false));
    for (const name of ["pointerdown", "pointermove", "pointerup"]) canvas.addEventListener(name, (event) => this.mouse(event));
    canvas.addEventListener("lostpointercapture", () => this.release((source) => source === "mouse"));
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    document.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["visibilitychange", "pointerlockchange"]) document.addEventListener(name, () => this.release());
    window.addEventListener("blur", () => this.release());
    canvas.addEventListener("blur", () => this.release((source) => source === "key"));
    setInterval(() => performance.now() - this.sent >= EVERY - 5 && this.send(), EVERY / 4);
    const poll = () => { this.gamepad(); requestAnimationFrame(poll); };
    requestAnimationFrame(poll);
  }

  use(controls) { this.controls = controls; }

  mapped(code) { return code in this.controls.keys; }

  hold(code, source = "key") {
    if (this.held.get(code) === source) return;
    this.held.delete(code);
    this.held.set(code, source);
    this.changed();
  }

  drop(code, source = "key") {
    if (this.held.get(code) === source && this.held.delete(code)) this.changed();
  }

  release(which = () => true) {
    const before = this.held.size;
    for (const [code, source] of this.held) if (which(source)) this.held.delete(code);
    this.dx = this.dy = 0;
    if (this.held.size < before) this.changed();
  }

  changed() {
    this.dispatchEvent(new Event("change"));
    this.send();
  }

  send() {
    const { dx, dy, axes } = this;
    this.dx = this.dy = 0;
    this.sent = performance.now();
    this.link.send({ type: "input", t: this.sent, keys: [...this.held.keys()].slice(0, 32), dx, dy, axes });
  }

  // Beside Ctrl and Alt, unless the world uses them, and Meta a key is the browser's. Of one that is held then macOS tells
  // no release; one that was let go of here by something else, and is held, says so by repeating.
  key(event, down) {
    const used = (name) => this.mapped(`${name}Left`) || this.mapped(`${name}Right`);
    const foreign = event.metaKey || ["Control", "Alt"].some((name) => event.getModifierState(name) && !used(name));
    if (event.key === "Meta") this.release((source) => source === "key");
    else if (this.mapped(event.code) && !(down && foreign)) {
      event.preventDefault();
      this[down ? "hold" : "drop"](event.code);
    } else if (down && !event.repeat && !foreign && !event.ctrlKey) {
      this.dispatchEvent(new CustomEvent("shortcut", { detail: event }));
    }
  }

  // Only the first button that goes down and the last one that comes up have events of their own, others are moves.
  mouse(event) {
    const { type, button, buttons, pointerId, pointerType } = event, code = `Mouse${button}`, down = buttons & BITS[button];
    if (type === "pointerdown") this.canvas.focus();
    if (!this.mapped(code)) return;
    event.preventDefault();
    if (this.controls.mouse && down && !document.pointerLockElement && pointerType === "mouse") return this.lock();
    if (type === "pointerdown" && !document.pointerLockElement) this.canvas.setPointerCapture(pointerId);
    this[down ? "hold" : "drop"](code, "mouse");
  }

  lock() { this.canvas.requestPointerLock?.({ unadjustedMovement: true })?.catch?.(() => this.canvas.requestPointerLock()); }

  move(event) {
    if (!this.controls.mouse || document.pointerLockElement !== this.canvas) return;
    this.dx += event.movementX;
    this.dy += event.movementY;
  }

  gamepad() {
    const pad = gamepads().find((one) => one?.mapping === "standard");
    const axes = (pad?.axes ?? []).slice(0, 4).map((value) => (Math.abs(value) < DEAD ? 0 : Math.round(value * 50) / 50));
    pad?.buttons.forEach((button, n) => this.toggle(`Pad${n}`, button.pressed));
    axes.forEach((value, n) => {
      this.toggle(`Axis${n}-`, value < -PUSHED);
      this.toggle(`Axis${n}+`, value > PUSHED);
    });
    if (!pad && this.axes.length) this.release((source) => source === "pad"); // it was unplugged
    this.moved = this.moved || axes.join() !== this.axes.join();
    this.axes = axes;
    if ((this.dx || this.dy || this.moved) && performance.now() - this.sent >= GAP) {
      this.moved = false;
      this.send();
    }
  }

  toggle(code, down) {
    if (this.mapped(code)) this[down ? "hold" : "drop"](code, "pad");
  }

  // A thumb slides over the pad; other keys are buttons.
  touch(pad, buttons, label) {
    const knob = pad.firstElementChild;
    const codes = Object.fromEntries(Object.entries(PAD).map(([side, names]) => [side, names.find((name) => this.mapped(name))]));
    const steer = (event) => {
      const box = pad.getBoundingClientRect(), reach = box.width / 2;
      const x = (event.clientX - box.left) / reach - 1, y = (event.clientY - box.top) / reach - 1;
      const far = Math.max(1, Math.hypot(x, y) / 0.6);
      knob.style.transform = `translate(${(x / far) * reach}px, ${(y / far) * reach}px)`;
      const sides = { left: x < -0.3, right: x > 0.3, up: y < -0.3, down: y > 0.3 };
      for (const [side, on] of Object.entries(sides)) if (codes[side]) this[on ? "hold" : "drop"](codes[side], "touch");
    };
    const leave = () => {
      knob.style.transform = "";
      for (const code of Object.values(codes)) if (code) this.drop(code, "touch");
    };
    pad.onpointerdown = (event) => { pad.setPointerCapture(event.pointerId); steer(event); };
    pad.onpointermove = (event) => { if (pad.hasPointerCapture(event.pointerId)) steer(event); };
    pad.onpointerup = pad.onpointercancel = pad.onlostpointercapture = leave;
    const seen = new Set(Object.values(codes).filter(Boolean).map((code) => label(this.controls.keys[code])));
    buttons.replaceChildren();
    for (const [code, part] of Object.entries(this.controls.keys)) {
      const text = label(part);
      if (seen.has(text) || !seen.add(text)) continue;
      const button = Object.assign(document.createElement("button"), { textContent: text });
      button.onpointerdown = (event) => { button.setPointerCapture(event.pointerId); button.classList.add("held"); this.hold(code, "touch"); };
      button.onpointerup = button.onpointercancel = () => { button.classList.remove("held"); this.drop(code, "touch"); };
      button.onkeydown = (event) => { if (event.code === "Enter" && !event.repeat) this.hold(code, "touch"); };
      button.onkeyup = () => this.drop(code, "touch");
      buttons.append(button);
    }
  }
}
