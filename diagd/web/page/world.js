// A bundle as `diagd web` packed it: files to a session and to pictures.

import { PixelGraph, Runtime } from "./engine.js";
import { GpuRuntime } from "./gpu.js";
import { LookupDraft, WindowPolicy, jacobi } from "./jacobi.js";
import { Schedule } from "./schedule.js";
import { Session, scheduled } from "./session.js";

// What was kept of a page before may be of another world: the host is asked whether it still holds.
const FRESH = { cache: "no-cache" };

// A file of the folder, compressed so that any host sends it small; `advance` is told of bytes that came.
async function unpacked(base, name, advance) {
  const answer = await fetch(new URL(`${name}.packed`, base), FRESH);
  if (!answer.ok) throw new Error(`${name} cannot be had: ${answer.status} ${answer.statusText}`);
  const counted = new TransformStream({
    transform(chunk, controller) {
      advance(chunk.length);
      controller.enqueue(chunk);
    },
  });
  const stream = answer.body.pipeThrough(counted).pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

export class World {
  // Load what lies beside `base`; `progress(done, total)` is in bytes.
  static async open(base, { threads = 1, progress = () => {} } = {}) {
    const spec = await (await fetch(new URL("world.json", base), FRESH)).json(), { files } = spec, address = (name) => new URL(name, base).href;
    const gpu = spec.gpu && (await GpuRuntime.isHere());
    const names = [`ort-wasm-simd-threaded.${gpu ? "jspi." : ""}wasm`, "step.onnx", "step.bin", "decoder.onnx", "decoder.bin"];
    const total = names.reduce((sum, name) => sum + files[`${name}.packed`], 0);
    let done = 0;
    const advance = (bytes) => progress((done += bytes), total);
    const [code, step, weights, decoder, codebook] = await Promise.all(names.map((name) => unpacked(base, name, advance)));
    const opening = gpu ? GpuRuntime.open(address("ort.jspi.min.mjs"), code) : Runtime.open(address("ort-wasm-simd-threaded.mjs"), code, threads);
    const runtime = await opening, engine = await runtime.steps(step, "step.bin", weights, spec);
    const world = new World();
    Object.assign(world, { base, spec, runtime, session: new Session(spec, engine), policy: new WindowPolicy(), lookup: new LookupDraft(spec.layout) });
    world.decoder = world.pixels(await runtime.graph(decoder, "decoder.bin", codebook));
    return world;
  }

  pixels(graph) {
    const { layout, size } = this.spec;
    return new PixelGraph(this.runtime, graph, [layout.rows, layout.columns], size);
  }

  // What decodes, by its spelling.
  strategy(spelling) {
    const { order } = this.spec, window = spelling.trim().match(/^jacobi(?:[ ,]+window=([0-9]+))?$/);
    if (window) return jacobi(this.policy, this.lookup, window[1] ? Number(window[1]) : null);
    return scheduled(Schedule.parse(spelling === "diagonal" ? "" : spelling, this.session.layout, order));
  }

  // Tokens of a picture's bytes; the encoder is fetched when it is first needed.
  async encode(pixels) {
    if (!this.encoder) {
      const [graph, weights] = await Promise.all(["encoder.onnx", "encoder.bin"].map((name) => unpacked(this.base, name, () => {})));
      this.encoder = this.pixels(await this.runtime.graph(graph, "encoder.bin", weights));
    }
    return this.encoder.encode(pixels);
  }
}
