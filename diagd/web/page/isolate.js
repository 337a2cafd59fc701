// Adds the headers that isolate a page, for hosts that cannot send them; see docs/web.md.

const HEADERS = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp", "Cross-Origin-Resource-Policy": "same-origin" };

addEventListener("install", () => skipWaiting());
addEventListener("activate", (event) => event.waitUntil(clients.claim()));
addEventListener("fetch", (event) => {
  event.respondWith(
    fetch(event.request).then(({ body, status, statusText, headers }) => {
      const isolated = new Headers(headers);
      for (const [name, value] of Object.entries(HEADERS)) isolated.set(name, value);
      return new Response(body, { status, statusText, headers: isolated });
    }),
  );
});
