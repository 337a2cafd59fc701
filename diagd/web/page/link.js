// The worker that decodes in this page: told and heard as the server of diagd-play is.

export class Link extends EventTarget {
  async open() {
    const threads = Number(new URLSearchParams(location.search).get("threads") ?? 1);
    if (threads > 1 && !crossOriginIsolated && (await isolated())) return location.reload();
    this.worker = new Worker(new URL(`./worker.js${location.search}`, import.meta.url), { type: "module" });
    this.worker.onmessage = ({ data }) => this.dispatchEvent(new CustomEvent(data.type, { detail: data }));
    this.worker.onerror = ({ message }) => this.dispatchEvent(new CustomEvent("lost", { detail: { reason: message } }));
  }

  send(message) { this.worker?.postMessage(message); }
}

// Threads share memory, which browsers allow only in pages that are isolated by headers. Where the host does not send
// them, a service worker adds them; true once, when the page has to be loaded again for it. A browser that lets sites
// keep nothing may have no storage and refuse the worker: the state of the history outlives loading, and one thread plays.
async function isolated() {
  if (!navigator.serviceWorker || history.state === "isolated") return false;
  history.replaceState("isolated", "");
  try {
    await navigator.serviceWorker.register(new URL("./isolate.js", import.meta.url));
    await navigator.serviceWorker.ready;
  } catch { return false; }
  return true;
}
