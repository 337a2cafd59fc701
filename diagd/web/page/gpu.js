// WebGPU, by ONNX Runtime's public API: K/V rows stay in buffers of the device, which a pass reads and writes in place.

import { turn } from "./engine.js";

const GRANULE = 32;

export class GpuRuntime {
  // Whether this browser can: a device, and WebAssembly that waits for it.
  static async isHere() { return "Suspending" in WebAssembly && Boolean(await navigator.gpu?.requestAdapter()); }

  // `script` is the address of the package's script, `binary` the bytes of its code.
  static async open(script, binary) {
    const runtime = new GpuRuntime(), { env } = (runtime.ort = await import(script));
    Object.assign(env.wasm, { wasmBinary: binary, numThreads: 1, wasmPaths: new URL("./", script).href });
    return runtime;
  }

  graph(bytes, weights, content, options = { executionProviders: ["wasm"] }) {
    return this.ort.InferenceSession.create(bytes, { externalData: [{ path: weights, data: content }], ...options });
  }

  async call(graph, [from, type, dims, values], [to]) {
    const given = new this.ort.Tensor(type, (type === "uint8" ? Uint8Array : Int32Array).from(values), dims);
    return (await graph.run({ [from]: given }))[to].data;
  }

  async steps(bytes, weights, content, spec) {
    const names = Array.from({ length: spec.cache.layers }, (_, layer) => [`key_${layer}`, `value_${layer}`]).flat();
    const places = Object.fromEntries(names.map((name) => [`present_${name}`, "gpu-buffer"]));
    const options = { executionProviders: ["webgpu"], preferredOutputLocation: { ...places, logits: "cpu" } };
    const graph = await this.graph(bytes, weights, content, options);
    return new GpuEngine(this.ort, graph, await this.ort.env.webgpu.device, names, spec);
  }
}

// As `StepEngine`, on the device.
class GpuEngine {
  constructor(ort, graph, device, names, spec) {
    const { kv_heads: heads, head_size: size } = spec.cache, rows = Math.ceil(spec.capacity / GRANULE) * GRANULE;
    Object.assign(this, { ort, graph, device, heads, size, vocabulary: spec.vocabulary });
    const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST;
    this.buffers = Object.fromEntries(names.map((name) => [name, device.createBuffer({ size: 4 * rows * heads * size, usage })]));
  }

  async step({ ids, positions, decoded, slots, live, start }) {
    const { Tensor } = this.ort, rows = Math.ceil(live / GRANULE) * GRANULE, fetched = { logits: null };
    const logits = decoded.length ? decoded : [0]; // a device has no empty tensors
    const given = { token_buffer: ids, sources: ids.map((_, n) => n), positions, logit_rows: logits, slot_position: slots.subarray(0, rows) };
    const grid = [1, ids.length], shapes = { sources: grid, positions: grid, slot_position: [rows, 1] };
    const feeds = Object.fromEntries(Object.entries(given).map(([name, numbers]) => [name, new Tensor("int32", Int32Array.from(numbers), shapes[name] ?? [numbers.length])]));
    feeds.write_index = new Tensor("int64", BigInt64Array.from(ids.map((_, n) => BigInt(start + n))), grid);
    for (const [name, buffer] of Object.entries(this.buffers)) {
      const bound = Tensor.fromGpuBuffer(buffer, { dataType: "float32", dims: [rows, 1, this.heads, this.size] });
      [feeds[`past_${name}`], fetched[`present_${name}`]] = [bound, bound];
    }
    this.out = (await this.graph.run(feeds, fetched)).logits.data;
  }

  logits(row) { return this.out.subarray(row * this.vocabulary, (row + 1) * this.vocabulary); }

  async rotate(angles, live) {
    const { device } = this, size = 4 * live * this.heads * this.size;
    const copy = device.createBuffer({ size, usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST });
    for (const [name, buffer] of Object.entries(this.buffers)) {
      if (!name.startsWith("key")) continue;
      const commands = device.createCommandEncoder();
      commands.copyBufferToBuffer(buffer, 0, copy, 0, size);
      device.queue.submit([commands.finish()]);
      await copy.mapAsync(GPUMapMode.READ);
      const keys = new Float32Array(copy.getMappedRange()).slice();
      copy.unmap();
      turn(keys, angles);
      device.queue.writeBuffer(buffer, 0, keys);
    }
    copy.destroy();
  }
}
