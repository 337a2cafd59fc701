// The socket: says hello, comes back when it is lost, and tells texts from pictures.

const VERSION = 1;
const FINAL = { 4008: "This game is over. Load the page again to play another one.", 4001: "This world was opened in another tab.", 4003: "The address has no valid token. Open the one that diagd-play printed.",
  4029: "The server is busy. Try again later." };

const kept = (() => { try { return localStorage; } catch { return {}; } })(); // a browser may forbid to keep anything

const BLOCKED = "There is no connection: a proxy that leads here has to pass upgrades to WebSocket on. Trying again…";

export class Link extends EventTarget {
  constructor() {
    super();
    this.token = location.hash.slice(1);
    this.tries = 0;
  }

  get ticket() { return kept.ticket; }

  open() {
    const socket = new WebSocket(new URL("./socket", location.href.replace(/^http/, "ws")));
    this.socket = socket;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      this.tries = 0;
      this.opened = true;
      this.send({ type: "hello", version: VERSION, token: this.token, ticket: this.ticket ?? "" });
    };
    socket.onmessage = ({ data }) => {
      if (typeof data === "string") this.text(JSON.parse(data));
      else this.binary(data);
    };
    socket.onclose = ({ code }) => {
      this.emit("lost", { reason: FINAL[code] ?? (this.opened ? undefined : BLOCKED), again: !FINAL[code] });
      if (!FINAL[code]) setTimeout(() => this.open(), Math.min(4000, 250 * 2 ** this.tries++));
    };
  }

  text(message) {
    if (message.ticket) kept.ticket = message.ticket;
    this.emit(message.type, message);
  }

  binary(data) {
    const length = new DataView(data).getUint32(0);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
    let start = 4 + length;
    header.parts = header.sizes.map((size) => {
      start += size;
      const bytes = new Uint8Array(data, start - size, size);
      return header.type ? new Blob([bytes], { type: header.type }) : bytes;
    });
    this.emit(header.kind, header);
  }

  emit(name, detail) { this.dispatchEvent(new CustomEvent(name, { detail })); }

  send(message) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(message instanceof Uint8Array ? message : JSON.stringify(message));
  }
}
