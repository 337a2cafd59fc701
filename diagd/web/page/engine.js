// ONNX Runtime's WASM module by its C API, which its package's own scripts call: tensors lie in the module's heap and a
// pass writes its K/V rows in place, where the public API would copy the whole cache in and out.

const TYPES = { float32: [1, 4], uint8: [2, 1], int32: [6, 4], int64: [7, 8] }; // number in ONNX, bytes
const VERBOSITY = 3, ALL = 99, CPU = 1, ALIGNMENT = 64, GRANULE = 32;

export class Runtime {
  // `script` is the address of the module's script, `binary` the bytes of its code.
  static async open(script, binary, threads) {
    const { default: factory } = await import(script), runtime = new Runtime();
    runtime.module = await factory({ numThreads: threads, wasmBinary: binary, locateFile: (name) => new URL(name, script).href });
    runtime.names = new Map();
    runtime.check(runtime.module._OrtInit(threads, VERBOSITY));
    runtime.options = runtime.module._OrtCreateRunOptions(VERBOSITY, 0, 0, 0);
    return runtime;
  }

  check(code) {
    if (!code) return;
    const { module } = this, stack = module.stackSave(), at = module.stackAlloc(8);
    module._OrtGetLastError(at, at + 4);
    const text = module.HEAPU32[at / 4 + 1] ? module.UTF8ToString(module.HEAPU32[at / 4 + 1]) : `error ${code}`;
    module.stackRestore(stack);
    throw new Error(`ONNX Runtime: ${text}`);
  }

  // Zeros in the heap, from a cache line on.
  allocate(bytes) {
    const raw = this.module._malloc(bytes + ALIGNMENT);
    if (!raw) throw new Error(`the browser gives no ${bytes} bytes more to this world`);
    const pointer = Math.ceil(raw / ALIGNMENT) * ALIGNMENT;
    this.module.HEAPU8.fill(0, pointer, pointer + bytes);
    return pointer;
  }

  // Views hold until the heap grows: ask for one at each use.
  view(type, pointer, length) {
    const kind = { float32: Float32Array, uint8: Uint8Array, int32: Int32Array }[type];
    return new kind(this.module.HEAPU8.buffer, pointer, length);
  }

  tensor(type, pointer, dims) {
    const { module } = this, [number, size] = TYPES[type], stack = module.stackSave(), at = module.stackAlloc(4 * dims.length);
    module.HEAP32.set(dims, at / 4);
    const bytes = dims.reduce((product, one) => product * one, size);
    const handle = module._OrtCreateTensor(number, pointer, bytes, at, dims.length, CPU);
    module.stackRestore(stack);
    this.check(handle ? 0 : -1);
    return handle;
  }

  release(handles) { for (const handle of handles) this.module._OrtReleaseTensor(handle); }

  name(text) {
    if (!this.names.has(text)) {
      const bytes = new TextEncoder().encode(`${text}\0`), pointer = this.module._malloc(bytes.length);
      this.module.HEAPU8.set(bytes, pointer);
      this.names.set(text, pointer);
    }
    return this.names.get(text);
  }

  // A graph and the file of its weights, which it names.
  async graph(bytes, weights, content) {
    const { module } = this, pointer = module._malloc(bytes.length);
    module.mountExternalData(weights, content);
    const options = module._OrtCreateSessionOptions(ALL, 1, 1, 0, 0, 0, this.name("diagd"), VERBOSITY, 0, 0);
    module.HEAPU8.set(bytes, pointer);
    const handle = await module._OrtCreateSession(pointer, bytes.length, options);
    module._OrtReleaseSessionOptions(options);
    module._free(pointer);
    module.unmountExternalData();
    this.check(handle ? 0 : -1);
    return handle;
  }

  // Tensors by name; outputs are written where they are.
  async run(graph, inputs, outputs) {
    const { module } = this, ins = Object.entries(inputs), outs = Object.entries(outputs), stack = module.stackSave();
    const list = (numbers) => {
      const at = module.stackAlloc(4 * numbers.length);
      module.HEAPU32.set(numbers, at / 4);
      return at;
    };
    const names = (entries) => list(entries.map(([name]) => this.name(name))), values = (entries) => list(entries.map(([, value]) => value));
    const code = await module._OrtRun(graph, names(ins), values(ins), ins.length, names(outs), outs.length, values(outs), this.options);
    module.stackRestore(stack);
    this.check(code);
  }

  // The values of one output for those of one input.
  async call(graph, [from, type, dims, values], [to, kind, shape]) {
    const { module } = this, count = shape.reduce((product, one) => product * one);
    const ins = module._malloc(TYPES[type][1] * values.length), outs = module._malloc(TYPES[kind][1] * count);
    this.view(type, ins, values.length).set(values);
    const handles = [this.tensor(type, ins, dims), this.tensor(kind, outs, shape)];
    try {
      await this.run(graph, { [from]: handles[0] }, { [to]: handles[1] });
      return this.view(kind, outs, count).slice();
    } finally {
      this.release(handles);
      module._free(ins);
      module._free(outs);
    }
  }

  async steps(bytes, weights, content, spec) { return new StepEngine(this, await this.graph(bytes, weights, content), spec); }
}

// The step graph over K/V rows [capacity, 1, G, D] of one stream; a pass binds those in use, in and out.
class StepEngine {
  constructor(runtime, graph, spec) {
    const { layers, kv_heads: heads, head_size: size } = spec.cache, rows = Math.ceil(spec.capacity / GRANULE) * GRANULE;
    Object.assign(this, { runtime, graph, heads, size, vocabulary: spec.vocabulary, bound: -1, cache: {} });
    const names = Array.from({ length: layers }, (_, layer) => [`key_${layer}`, `value_${layer}`]).flat();
    this.buffers = Object.fromEntries(names.map((name) => [name, runtime.allocate(4 * rows * heads * size)]));
    this.fed = {};
    for (const name of ["token_buffer", "sources", "positions", "logit_rows"]) this.fed[name] = runtime.allocate(4 * spec.max_width);
    this.fed.slot_position = runtime.allocate(4 * rows);
    this.index = runtime.allocate(8 * spec.max_width);
    this.out = runtime.allocate(4 * spec.max_width * this.vocabulary);
    runtime.view("int32", this.fed.sources, spec.max_width).set(Array.from({ length: spec.max_width }, (_, n) => n));
  }

  bind(rows) {
    if (rows === this.bound) return;
    this.runtime.release(Object.values(this.cache));
    const dims = [rows, 1, this.heads, this.size];
    this.cache = Object.fromEntries(Object.entries(this.buffers).map(([name, at]) => [name, this.runtime.tensor("float32", at, dims)]));
    this.bound = rows;
  }

  // Feed ids at positions, the first at slot `start`, with `live` slots in use; logits are of the rows `decoded`.
  async step({ ids, positions, decoded, slots, live, start }) {
    const { runtime, fed } = this, rows = Math.ceil(live / GRANULE) * GRANULE;
    this.bind(rows);
    const given = { token_buffer: ids, positions, logit_rows: decoded, slot_position: slots.subarray(0, rows) };
    for (const [name, numbers] of Object.entries(given)) runtime.view("int32", fed[name], numbers.length).set(numbers);
    runtime.view("int32", this.index, 2 * ids.length).set(ids.flatMap((_, n) => [start + n, 0]));
    const grid = [1, ids.length], shapes = { positions: grid, slot_position: [rows, 1] };
    const inputs = { sources: runtime.tensor("int32", fed.sources, grid), write_index: runtime.tensor("int64", this.index, grid) };
    for (const [name, numbers] of Object.entries(given)) {
      inputs[name] = runtime.tensor("int32", fed[name], shapes[name] ?? [numbers.length]);
    }
    const outputs = { logits: runtime.tensor("float32", this.out, [decoded.length, this.vocabulary]) };
    const once = [...Object.values(inputs), outputs.logits];
    for (const [name, value] of Object.entries(this.cache)) [inputs[`past_${name}`], outputs[`present_${name}`]] = [value, value];
    await runtime.run(this.graph, inputs, outputs);
    runtime.release(once);
  }

  logits(row) { return this.runtime.view("float32", this.out + 4 * row * this.vocabulary, this.vocabulary); }

  // Turn cached keys in rotate-half layout.
  async rotate(angles, live) {
    for (const [name, at] of Object.entries(this.buffers)) {
      if (name.startsWith("key")) turn(this.runtime.view("float32", at, live * this.heads * this.size), angles);
    }
  }
}

// Turn keys [..., D] by angles [D / 2], every product and sum rounded to float32.
export function turn(keys, angles) {
  const f = Math.fround, half = angles.length, cosines = angles.map((a) => f(Math.cos(a))), sines = angles.map((a) => f(Math.sin(a)));
  for (let row = 0; row < keys.length; row += 2 * half) {
    for (let n = 0; n < half; n++) {
      const one = keys[row + n], two = keys[row + half + n];
      keys[row + n] = f(one * cosines[n]) - f(two * sines[n]);
      keys[row + half + n] = f(two * cosines[n]) + f(one * sines[n]);
    }
  }
}

// A tokenizer's graph: tokens [n, rows, columns] to pixels [m, height, width, 3], or back.
export class PixelGraph {
  constructor(runtime, graph, grid, size) { Object.assign(this, { runtime, graph, grid, size: [...size, 3] }); }

  // Bytes of the pictures of frames of tokens.
  decode(frames, pictures) {
    const tokens = ["tokens", "int32", [frames.length, ...this.grid], frames.flatMap((one) => [...one])];
    return this.runtime.call(this.graph, tokens, ["pixels", "uint8", [pictures, ...this.size]]);
  }

  // Tokens of one picture.
  encode(pixels) {
    return this.runtime.call(this.graph, ["pixels", "uint8", [1, ...this.size], pixels], ["tokens", "int32", [1, ...this.grid]]);
  }
}
