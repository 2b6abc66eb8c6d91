// For Node: open the file of an export as a browser does, and answer questions, one JSON object a line: {encode: text}
// with {ids}; {decode: ids} with {text}; {feed: ids, whole: whether together or one by one} with {logits}: those after each id, in base64; {greedy:
// ids, count} with {ids}; {write: ids, stops: lines} with {text, count}: up to a stop text; {candidates: [logits, temperature, top_k, top_p, min_p], seen: ids, penalty} with {ids, probabilities}.

const fs = require("fs");
const vm = require("vm");

const page = fs.readFileSync(process.argv[2], "utf8");
const scripts = (of) => [...page.matchAll(new RegExp(`<script [^>]*class="${of}">([^<]*)</script>`, "g"))].map((found) => found[1]);
const engine = page.match(/<script id="engine">([^]*?)<\/script>/)[1];
vm.runInThisContext(engine);

function logitsAfter(model, ids) {
  const feeding = model.feed(ids);
  for (;;) {
    const { done, value } = feeding.next();
    if (done) return value;
  }
}

const bytesOf = (logits) => Buffer.from(Float32Array.from(logits).buffer); // a copy

function textOf(tokenizer, ids) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return ids.map((id) => decoder.decode(tokenizer.bytes(id), { stream: true })).join("") + decoder.decode();
}

function* eachOfChunks(model, ids) { // at most a window, in chunks as the page feeds a prompt
  const size = vm.runInThisContext("CHUNK");
  for (let first = 0; first < ids.length; first += size) {
    const chunk = ids.slice(first, first + size);
    model.forward(chunk);
    for (let t = 1; t <= chunk.length; t++) yield bytesOf(model.head(t));
  }
}

function written(tokenizer, ids, lines) {
  const writing = new (vm.runInThisContext("Writing"))(tokenizer), stops = vm.runInThisContext("stopsIn")(lines);
  let all = "";
  for (let i = 0; i < ids.length; i++) {
    const { text, cut } = writing.add(ids[i], stops);
    all += text;
    if (cut) return { text: all.slice(0, -cut), count: i + 1 };
  }
  return { text: all, count: ids.length };
}

function answer({ model, tokenizer }, asked) {
  if (asked.encode !== undefined) return { ids: tokenizer.encode(asked.encode) };
  if (asked.decode) return { text: textOf(tokenizer, asked.decode) };
  if (asked.write) return written(tokenizer, asked.write, asked.stops);
  if (asked.candidates) {
    const [logits, ...knobs] = asked.candidates;
    return vm.runInThisContext("candidates")(vm.runInThisContext("penalised")(logits, asked.seen, asked.penalty), ...knobs);
  }
  model.reset();
  if (asked.feed) {
    const found = asked.whole ? [...eachOfChunks(model, asked.feed)] : asked.feed.map((id) => bytesOf(logitsAfter(model, [id])));
    return { logits: Buffer.concat(found).toString("base64") };
  }
  const largest = vm.runInThisContext("largest"), ids = [];
  for (let next = asked.greedy; ids.length < asked.count; next = ids.slice(-1)) ids.push(...largest(logitsAfter(model, next), 1));
  return { ids };
}

async function main() {
  const loaded = await vm.runInThisContext("load")(scripts("about"), scripts("weights"), process.argv[3] !== "slow");
  for await (const line of require("readline").createInterface({ input: process.stdin })) {
    let said;
    try {
      said = answer(loaded, JSON.parse(line));
    } catch (error) {
      said = { error: String(error.message) };
    }
    process.stdout.write(`${JSON.stringify(said)}\n`);
  }
}
main();
