// Out of the file: a JSON text and the weights, each compressed (zlib) and written in base85, in parts.

const DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;.=>?@^_`{|}~";
const VALUES = Uint8Array.from({ length: 128 }, (_, code) => Math.max(0, DIGITS.indexOf(String.fromCharCode(code))));

function fromBase85(text) { // five digits are a number of four bytes; the last are n bytes in n + 1 digits
  const view = new DataView(new ArrayBuffer(4 * Math.ceil(text.length / 5)));
  for (let i = 0, at = 0; i < text.length; i += 5, at += 4) {
    let number = 0;
    for (let j = i; j < i + 5; j++) number = 85 * number + (j < text.length ? VALUES[text.charCodeAt(j)] : 84);
    view.setUint32(at, number);
  }
  return new Uint8Array(view.buffer, 0, Math.floor((4 * text.length) / 5));
}

async function inflate(parts) {
  const stream = new Blob(parts.map(fromBase85)).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// {model, tokenizer}. `about`: see llm/export/html.py. A program that gives `useKernel` false multiplies in JavaScript.
async function load(aboutParts, weightParts, useKernel = true) {
  const about = JSON.parse(new TextDecoder().decode(await inflate(aboutParts)));
  const kernel = Uint8Array.from(atob(about.kernel), (character) => character.charCodeAt(0));
  const model = new Model(about.config, about.shapes, useKernel && kernel);
  fillWeights(model.weights, about.dtype, await inflate(weightParts));
  return { model, tokenizer: new Tokenizer(about.tokenizer) };
}

// Vectors are float32 always. A matrix of int8 comes with a float32 scale for each row, before its numbers.
function fillWeights(weights, dtype, bytes) {
  const kinds = { float32: Float32Array, float16: Uint16Array, int8: Int8Array };
  let at = 0;
  function take(Kind, count) {
    const end = at + count * Kind.BYTES_PER_ELEMENT;
    const found = new Kind(bytes.slice(at, end).buffer); // a copy, since a view would have to be aligned
    at = end;
    return found;
  }
  for (const { rows, columns, step, values } of Object.values(weights)) {
    const kind = rows === 1 ? "float32" : dtype;
    const scales = kind === "int8" ? take(Float32Array, rows) : new Float32Array(rows).fill(1);
    const numbers = take(kinds[kind], rows * columns);
    for (let row = 0, i = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++, i++) {
        values[row * step + column] = kind === "float16" ? HALVES[numbers[i]] : numbers[i] * scales[row];
      }
    }
  }
  if (at !== bytes.length) throw new Error("The file is damaged: its weights have another size than its model.");
}

const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => { // the numbers of float16, by their bits
  const exponent = (bits >> 10) & 31, part = bits & 1023;
  return (bits >> 15 ? -1 : 1) * (exponent ? 2 ** (exponent - 25) * (1024 + part) : 2 ** -24 * part);
});
