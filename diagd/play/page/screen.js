// The canvas: draws updates as they come, the newest one where the browser is slow, scaled by whole pixels.

export class Screen {
  constructor(canvas, link, drawn) {
    Object.assign(this, { canvas, link, drawn, pen: canvas.getContext("2d", { alpha: false }), queue: [], last: 0, known: 0, turns: 0, newest: 0 });
    link.addEventListener("frame", ({ detail }) => this.take(detail));
    new ResizeObserver(() => this.fit()).observe(canvas.parentElement);
  }

  resize([height, width]) {
    if (this.canvas.width === width && this.canvas.height === height) return;
    Object.assign(this.canvas, { width, height });
    this.fit();
  }

  fit() {
    const { canvas } = this, box = canvas.parentElement, ratio = devicePixelRatio || 1;
    const across = (box.clientWidth - 2 * parseFloat(getComputedStyle(box).paddingLeft)) * ratio, down = Math.max(240, innerHeight * 0.62) * ratio;
    const exact = Math.min(across / canvas.width, down / canvas.height);
    const scale = exact >= 1 ? Math.floor(exact) : exact;
    canvas.style.width = `${(scale * canvas.width) / ratio}px`;
    canvas.style.height = `${(scale * canvas.height) / ratio}px`;
  }

  async take(update) {
    const turn = ++this.turns;
    const pictures = await Promise.all(update.parts.map((part) => createImageBitmap(part)));
    if (turn < this.newest) return pictures.forEach((picture) => picture.close());
    this.newest = turn;
    const now = performance.now(), span = Math.min(1000, now - this.last);
    this.last = now;
    for (const { picture } of this.queue) picture.close();
    this.queue = pictures.map((picture, n) => ({
      picture, due: now + (span * n) / pictures.length, update: n === pictures.length - 1 ? update : null,
    }));
    this.request();
  }

  request() {
    if (!this.asked) this.asked = requestAnimationFrame(() => { this.asked = 0; this.draw(); });
  }

  draw() {
    while (this.queue.length && this.queue[0].due <= performance.now()) {
      const { picture, update } = this.queue.shift();
      this.pen.drawImage(picture, 0, 0);
      picture.close();
      if (update) {
        this.known = update.known;
        this.link.send({ type: "ack", id: update.id });
        this.drawn(update);
      }
    }
    if (this.queue.length) this.request();
  }

  copy(small, height = 39) {
    Object.assign(small, { height, width: Math.round((height * this.canvas.width) / this.canvas.height) });
    small.dataset.seen = this.known;
    const pen = small.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.drawImage(this.canvas, 0, 0, small.width, small.height);
  }
}
