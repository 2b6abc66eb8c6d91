// The model: a key/value cache, and the logits after the tokens that it is fed. Float32; the losscurve package computes
// the same with PyTorch (llm/model.py and llm/llama.py).
//
// Shapes: T tokens, C channels, V vocabulary, H heads, K heads of keys and values, D size of a head, S positions seen.
// A matrix lies in the memory of the kernel, row by row; rows and columns are padded with zeros to multiples of four.

const CHUNK = 32; // tokens computed together
const ROOM = 64; // positions by which the cache of a llama is larger than its window, so that it moves rarely
const LAYER_NORM = 1e-5; // added to the variance

const padded = (size) => (size + 3) & ~3;

class Memory {
  // `floats`: the size. `kernel`: the bytes of kernel.wat, assembled; without them, or where the browser knows no SIMD,
  // JavaScript multiplies.
  constructor(floats, kernel) {
    this.used = 0;
    const usable = kernel && WebAssembly.validate(kernel);
    if (usable) {
      const memory = new WebAssembly.Memory({ initial: Math.ceil((4 * floats) / 65536) + 1 });
      this.kernel = new WebAssembly.Instance(new WebAssembly.Module(kernel), { page: { memory } }).exports.multiply;
      this.values = new Float32Array(memory.buffer);
    } else this.values = new Float32Array(floats);
  }
  matrix(rows, columns) {
    const step = padded(columns), at = this.used;
    this.used += padded(rows) * step;
    return { rows, columns, step, at, values: this.values.subarray(at, this.used) };
  }
  // y (T, R) = x (T, C) times the transpose of w (R, C). `part` is a part of w: {at, rows, columns}.
  multiply(x, w, y, T, part = w) {
    const R = padded(part.rows), C = padded(part.columns);
    if (this.kernel) this.kernel(4 * x.at, 4 * part.at, 4 * y.at, T, R, C, 4 * x.step, 4 * w.step, 4 * y.step);
    else multiplySlowly(this.values, x, w, y, T, R, C, part.at);
  }
}

function multiplySlowly(values, x, w, y, T, R, C, at) {
  for (let t = 0; t < T; t++) {
    for (let r = 0; r < R; r++) {
      let a = 0, b = 0, c = 0, d = 0; // separate sums do not wait for each other
      for (let i = x.at + t * x.step, j = at + r * w.step, end = i + C; i < end; i += 4, j += 4) {
        a += values[i] * values[j];
        b += values[i + 1] * values[j + 1];
        c += values[i + 2] * values[j + 2];
        d += values[i + 3] * values[j + 3];
      }
      y.values[t * y.step + r] = a + b + c + d;
    }
  }
}

class Model {
  // `config`: the settings of the model; `shapes`: {name: [rows, columns]} of its weights; `kernel`: see Memory.
  constructor(config, shapes, kernel) {
    this.config = config;
    this.llama = config.arch === "llama";
    const { block_size: limit, n_layer: L, n_head: H, kv_heads: K, head_size: D, n_embd: C } = config;
    this.capacity = limit + (this.llama ? ROOM : 0);
    const fused = shapes["h.0.attn.c_attn.weight"][0], wide = shapes["h.0.mlp.c_fc.weight"][0];
    const narrow = shapes["h.0.mlp.c_proj.weight"][1];
    const work = {
      x: [CHUNK, C], y: [CHUNK, C], qkv: [CHUNK, fused], q: [CHUNK, D], scores: [CHUNK, this.capacity + 4], heads: [CHUNK, D],
      joined: [CHUNK, H * D], wide: [CHUNK, wide], narrow: [CHUNK, narrow], logits: [1, config.vocab_size],
    };
    const keys = [this.capacity + 4, D], values = [D, this.capacity + 4]; // values are kept transposed, for the same product
    const area = ([rows, columns]) => padded(rows) * padded(columns);
    const floats = [...Object.values(shapes), ...Object.values(work)].reduce((sum, shape) => sum + area(shape), 0);
    this.memory = new Memory(floats + L * K * (area(keys) + area(values)), kernel);
    const make = ([rows, columns]) => this.memory.matrix(rows, columns);
    const makeAll = (all) => Object.fromEntries(Object.entries(all).map(([name, shape]) => [name, make(shape)]));
    this.weights = makeAll(shapes);
    this.work = makeAll(work);
    this.cache = Array.from({ length: L * K }, () => ({ keys: make(keys), values: make(values) }));
    this.gelu = config.gelu === "tanh" ? geluTanh : geluExact;
    this.reset();
  }

  reset() {
    this.context = []; // the last tokens, at most `block_size`
    this.start = 0; // of the window, in the cache
    this.length = 0; // positions in the window
    this.dropped = 0; // positions that left it
  }

  // Feed tokens after those fed so far, and return the logits (V) of the next: a generator, which yields now and then
  // so that a page can stay alive. The context is the last `block_size` tokens: a llama's cache then drops its oldest
  // positions; a gpt2, where every token has got another position, computes all of them again.
  *feed(ids) {
    const limit = this.config.block_size;
    ids = ids.slice(-limit);
    this.context = [...this.context, ...ids].slice(-limit);
    const excess = this.length + ids.length - limit;
    if (excess > 0 && !this.llama) {
      this.length = 0;
      ids = this.context;
    } else if (excess > 0) {
      this.start += excess;
      this.length -= excess;
      this.dropped += excess;
    }
    for (let first = 0; first < ids.length; first += CHUNK) {
      if (first) yield;
      const chunk = ids.slice(first, first + CHUNK);
      this.forward(chunk);
      if (first + CHUNK >= ids.length) return this.head(chunk.length);
    }
  }

  // The logits (V) after the last of T tokens, without padding of the vocabulary, which is never drawn. The array is the
  // model's own: the next feed overwrites it.
  head(T) {
    const { x, y, logits } = this.work;
    this.norm("ln_f", x, y, T);
    const last = { ...y, at: y.at + (T - 1) * y.step };
    this.memory.multiply(last, this.weights["lm_head.weight"] || this.weights["wte.weight"], logits, 1);
    return logits.values.subarray(0, this.config.drawable);
  }

  forward(ids) { // leaves the residual stream in work.x
    const { x, y, qkv, joined, wide, narrow } = this.work;
    const T = ids.length;
    const wte = this.weights["wte.weight"], wpe = this.weights["wpe.weight"];
    this.makeRoom(T);
    for (let t = 0; t < T; t++) {
      for (let c = 0; c < x.columns; c++) {
        x.values[t * x.step + c] = wte.values[ids[t] * wte.step + c] + (wpe ? wpe.values[(this.length + t) * wpe.step + c] : 0);
      }
    }
    for (let layer = 0; layer < this.config.n_layer; layer++) {
      const at = `h.${layer}.`;
      this.norm(`${at}ln_1`, x, y, T);
      this.linear(`${at}attn.c_attn`, y, qkv, T);
      this.attend(layer, T);
      this.linear(`${at}attn.c_proj`, joined, y, T);
      this.add(x, y, T);
      this.norm(`${at}ln_2`, x, y, T);
      this.linear(`${at}mlp.c_fc`, y, wide, T);
      if (this.llama) swiglu(wide, narrow, T);
      else activate(this.gelu, wide, narrow, T);
      this.linear(`${at}mlp.c_proj`, narrow, y, T);
      this.add(x, y, T);
    }
    this.length += T;
  }

  makeRoom(T) { // moves the window to the start of the cache where T more positions do not fit behind it
    if (this.start + this.length + T <= this.capacity) return;
    for (const { keys, values } of this.cache) {
      keys.values.copyWithin(0, this.start * keys.step, (this.start + this.length) * keys.step);
      for (let d = 0; d < values.rows; d++) {
        const row = d * values.step;
        values.values.copyWithin(row, row + this.start, row + this.start + this.length);
      }
    }
    this.start = 0;
  }

  linear(name, x, y, T) {
    const w = this.weights[`${name}.weight`], bias = this.weights[`${name}.bias`];
    this.memory.multiply(x, w, y, T);
    for (let t = 0; bias && t < T; t++) for (let c = 0; c < w.rows; c++) y.values[t * y.step + c] += bias.values[c];
  }

  add(x, y, T) {
    for (let i = 0; i < T * x.step; i++) x.values[i] += y.values[i];
  }

  norm(name, x, y, T) {
    const weight = this.weights[`${name}.weight`].values, bias = this.weights[`${name}.bias`]?.values;
    for (let t = 0; t < T; t++) {
      const from = x.values.subarray(t * x.step, t * x.step + x.columns);
      const to = y.values.subarray(t * y.step, t * y.step + x.columns);
      if (this.llama) rmsNorm(from, weight, to, this.config.norm_eps);
      else layerNorm(from, weight, bias, to);
    }
  }

  // Attention of T tokens, from work.qkv to work.joined. Their keys and values go to the cache.
  attend(layer, T) {
    const { n_head: H, kv_heads: K, head_size: D } = this.config;
    const { qkv, q, scores, heads, joined } = this.work;
    const begin = this.start + this.length, S = this.length + T;
    for (let k = 0; k < K; k++) {
      const { keys, values } = this.cache[layer * K + k];
      for (let t = 0; t < T; t++) {
        const row = t * qkv.step + (H + k) * D, value = row + K * D;
        const key = qkv.values.subarray(row, row + D);
        this.position(layer, "k", key, t);
        keys.values.set(key, (begin + t) * keys.step);
        for (let d = 0; d < D; d++) values.values[d * values.step + begin + t] = qkv.values[value + d];
      }
    }
    for (let h = 0; h < H; h++) {
      const { keys, values } = this.cache[layer * K + Math.floor((h * K) / H)];
      for (let t = 0; t < T; t++) {
        const query = qkv.values.subarray(t * qkv.step + h * D, t * qkv.step + (h + 1) * D);
        this.position(layer, "q", query, t);
        q.values.set(query, t * q.step);
      }
      this.memory.multiply(q, keys, scores, T, { at: keys.at + this.start * keys.step, rows: S, columns: D });
      for (let t = 0; t < T; t++) {
        softmax(scores.values.subarray(t * scores.step, t * scores.step + padded(S)), S - T + t + 1, 1 / Math.sqrt(D));
      }
      this.memory.multiply(scores, values, heads, T, { at: values.at + this.start, rows: D, columns: S });
      for (let t = 0; t < T; t++) {
        joined.values.set(heads.values.subarray(t * heads.step, t * heads.step + D), t * joined.step + h * D);
      }
    }
  }

  // Norm and rotate the query or key of a head, in place, at the t-th of the tokens now computed. A gpt2 does neither.
  position(layer, which, head, t) {
    if (!this.llama) return;
    const norm = this.weights[`h.${layer}.qk_norm.${which}.weight`];
    if (norm) rmsNorm(head, norm.values, head, this.config.norm_eps);
    const half = head.length / 2, position = this.dropped + this.length + t;
    for (let i = 0; i < half; i++) {
      const angle = Math.fround(position * this.config.frequencies[i]);
      const cos = Math.cos(angle), sin = Math.sin(angle), a = head[i], b = head[i + half];
      head[i] = a * cos - b * sin;
      head[i + half] = b * cos + a * sin;
    }
  }
}

function layerNorm(x, weight, bias, y) {
  let mean = 0, variance = 0;
  for (let c = 0; c < x.length; c++) mean += x[c];
  mean /= x.length;
  for (let c = 0; c < x.length; c++) variance += (x[c] - mean) ** 2;
  const scale = 1 / Math.sqrt(variance / x.length + LAYER_NORM);
  for (let c = 0; c < x.length; c++) y[c] = (x[c] - mean) * scale * weight[c] + bias[c];
}

function rmsNorm(x, weight, y, epsilon) {
  let square = 0;
  for (let c = 0; c < x.length; c++) square += x[c] * x[c];
  const scale = 1 / Math.sqrt(square / x.length + epsilon);
  for (let c = 0; c < x.length; c++) y[c] = x[c] * scale * weight[c];
}

function softmax(x, count, scale) { // of the first `count` numbers, scaled, in place; the others become 0
  let most = -Infinity, sum = 0;
  for (let i = 0; i < count; i++) if (x[i] > most) most = x[i];
  for (let i = 0; i < count; i++) sum += x[i] = Math.exp((x[i] - most) * scale);
  for (let i = 0; i < count; i++) x[i] /= sum;
  x.fill(0, count);
}

function swiglu(x, y, T) { // gates, then as many inputs, in a row of x
  for (let t = 0; t < T; t++) {
    for (let c = 0; c < y.columns; c++) {
      const gate = x.values[t * x.step + c], up = x.values[t * x.step + y.columns + c];
      y.values[t * y.step + c] = (gate / (1 + Math.exp(-gate))) * up;
    }
  }
}

function activate(gelu, x, y, T) {
  const from = x.values, to = y.values;
  for (let t = 0; t < T; t++) {
    for (let i = t * x.step, j = t * y.step, end = i + x.columns; i < end; i++, j++) to[j] = gelu(from[i]);
  }
}

const geluTanh = (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));

// x times the share of a normal distribution below x. The share is Taylor's polynomial around the nearest of PER steps
// in 1; those come from its series (Abramowitz & Stegun 1964, 26.2.10).
const FAR = 7, PER = 64;
const POINTS = Float64Array.from({ length: 2 * FAR * PER + 1 }, (_, i) => i / PER - FAR);
const DENSITIES = POINTS.map((x) => Math.exp((-x * x) / 2) / Math.sqrt(2 * Math.PI));
const SHARES = POINTS.map((x, i) => {
  let term = x, sum = x;
  for (let n = 1; Math.abs(term) > 1e-17; n++) sum += term = (term * x * x) / (2 * n + 1);
  return 0.5 + DENSITIES[i] * sum;
});
function geluExact(x) {
  if (x >= FAR || x <= -FAR) return x > 0 ? x : 0;
  const i = ((x + FAR) * PER + 0.5) | 0, a = i / PER - FAR, h = x - a;
  return x * (SHARES[i] + DENSITIES[i] * h * (1 - (h / 2) * (a - (h / 3) * (a * a - 1))));
}
