// For Node: open the file of an export as a browser does, and answer questions, one JSON object a line: {encode: text}
// with {ids}; {feed: ids} with {logits}: those after each id, in base64; {greedy: ids, count} with {ids}; {candidates:
// [logits, temperature, top_k, top_p]} with {ids, probabilities}.

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

function answer({ model, tokenizer }, asked) {
  if (asked.encode !== undefined) return { ids: tokenizer.encode(asked.encode) };
  if (asked.candidates) return vm.runInThisContext("candidates")(...asked.candidates);
  model.reset();
  if (asked.feed) { // one by one; the last once more, after a window that is fed as a whole
    const each = asked.feed.slice(0, -1).map((id) => bytesOf(logitsAfter(model, [id])));
    model.reset();
    return { logits: Buffer.concat([...each, bytesOf(logitsAfter(model, asked.feed))]).toString("base64") };
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
