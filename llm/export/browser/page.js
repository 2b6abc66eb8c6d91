// The page: it writes with the model, and shows what was likely at each token. The other scripts of this folder come first.

const $ = (id) => document.getElementById(id);
const LIKELY = 10; // tokens shown
const PAINT = 30; // milliseconds after which the browser may draw what was written
const OFF = { top_k: "0", top_p: "1", min_p: "0", penalty: "1" };
const KNOBS = ["temperature", ...Object.keys(OFF), "count"];
const SHOWN = { "\n": "↵", "\t": "⇥", " ": "␣" };

let model = null, tokenizer = null;
let tokens = []; // written after the prompt: {id, text, likely, button, cut}
let fed = []; // the ids after which `logits` are the next token's; null while the model is between two
let logits = null;
let job = 0; // the newest: an older one ends at its next pause
let pressed = null; // the token whose alternatives are shown
let soon; // the timer of a look

function element(name, text, style) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (style) made.className = style;
  return made;
}
function say(text, bad) {
  $("words").textContent = text;
  $("words").className = bad ? "bad" : "";
}
const thousands = (count) => count.toLocaleString("en");
const pause = (() => { // until the browser has drawn; unlike setTimeout, it is not slowed down
  const channel = new MessageChannel();
  return () => new Promise((done) => {
    channel.port1.onmessage = done;
    channel.port2.postMessage(0);
  });
})();

// ---- the model

const knob = (id) => Number($(id).value);
function drawable() {
  const weighed = penalised(logits, fed, knob("penalty"));
  return candidates(weighed, knob("temperature"), knob("top_k"), knob("top_p"), knob("min_p"));
}

// Feed the model what it has not seen of prompt and tokens. Return whether `mine` is still the newest job.
async function catchUp(mine) {
  const wanted = tokenizer.encode($("prompt").value).concat(tokens.map((token) => token.id));
  if (wanted.length === tokens.length) throw new Error("Type at least one character.");
  if (!fed || fed.length > wanted.length || fed.some((id, i) => id !== wanted[i])) {
    model.reset();
    fed = [];
  }
  if (fed.length === wanted.length) return true;
  const feeding = model.feed(wanted.slice(fed.length));
  fed = null;
  for (;;) {
    const { done, value } = feeding.next();
    if (done) {
      fed = wanted;
      logits = value.slice();
      return mine === job;
    }
    await pause();
    if (mine !== job) return false;
  }
}

function likelyNow(can, drawn) { // the likeliest tokens, and the one that was drawn
  const before = softmaxOf(logits), ids = largest(before, LIKELY);
  if (drawn !== undefined && !ids.includes(drawn)) ids.push(drawn);
  const after = can.ids ? new Map(can.ids.map((id, i) => [id, can.probabilities[i]])) : null;
  return ids.map((id) => ({ id, before: before[id], after: after ? after.get(id) || 0 : can.probabilities[id] }));
}

async function write(count) {
  const mine = ++job, first = tokens.length, stops = stopsIn($("stops").value);
  clearTimeout(soon); // a look would end this job
  release();
  setBusy(true);
  say("Reading …");
  if (isCut()) showAll();
  try {
    if (!(await catchUp(mine))) return;
    const start = performance.now();
    let painted = start, words = "";
    while (tokens.length < first + count && !words) {
      const can = drawable(), id = draw(can);
      addToken(id, likelyNow(can, id), stops);
      if (id === tokenizer.endOfText) words = "The model has ended its text. ";
      if (isCut()) words = "Stopped before a stop text. ";
      if (!(await catchUp(mine))) break;
      if (performance.now() - painted > PAINT) {
        say(`${thousands(tokens.length)} tokens`);
        await pause();
        if (mine !== job) break;
        painted = performance.now();
      }
    }
    const made = tokens.length - first, seconds = (performance.now() - start) / 1000;
    say(`${words}${thousands(tokens.length)} tokens${made > 1 ? `, ${(made / seconds).toFixed(0)} a second` : ""}`);
  } catch (error) {
    say(error.message, true);
  }
  if (mine === job) setBusy(false);
  await look();
}

async function look() { // shows what may come next
  const mine = ++job;
  setBusy(false);
  if (pressed) return;
  try {
    if (!(await catchUp(mine))) return;
    if ($("words").className === "bad") say("");
    const can = drawable(), possible = can.ids ? can.ids.length : tokenizer.size;
    showLikely(likelyNow(can), undefined, isCut() ? "Next token, after what was cut off" : "Next token");
    $("likely-words").textContent = `${thousands(possible)} of ${thousands(tokenizer.size)} tokens can be drawn`;
  } catch (error) {
    $("likely").hidden = true; // it belongs to an earlier prompt
    $("likely-words").textContent = "";
    say(error.message, true);
  }
}
function lookSoon() {
  release();
  clearTimeout(soon);
  soon = setTimeout(look, 150);
}

function setBusy(busy) {
  $("go").disabled = $("one").disabled = busy;
  $("stop").disabled = !busy;
  $("again").disabled = false;
}

// ---- the text

let writing; // the text of the tokens
function startOver() {
  job++;
  tokens = [];
  pressed = null;
  writing = new Writing(tokenizer);
  $("written").replaceChildren(element("span", $("prompt").value, "prompt"));
}

function addToken(id, likely, stops) {
  const isEnd = id === tokenizer.endOfText;
  if (isEnd) writing.begin();
  const { text, cut } = isEnd ? { text: "end of text", cut: 0 } : writing.add(id, stops);
  const button = element("span", text || "·", "token"); // a <button> cannot break across lines
  const place = tokens.push({ id, likely, text, button, cut });
  if (text === "\n") button.classList.add("newline");
  if (isEnd) button.classList.add("end");
  button.tabIndex = place === 1 ? 0 : -1; // one tab stop; arrow keys move from there
  button.setAttribute("role", "button");
  button.setAttribute("aria-pressed", "false");
  button.onclick = () => {
    release();
    pressed = button;
    button.setAttribute("aria-pressed", "true");
    showLikely(likely, id, `Likely at token ${thousands(place)}`);
    $("likely-words").textContent = "▸ marks the token that was drawn";
  };
  $("written").append(button);
  $("written").scrollTop = $("written").scrollHeight;
  if (cut) cutOff(cut);
}

const isCut = () => tokens.at(-1)?.cut > 0; // whether the shown text ends before a stop text
function cutOff(length) { // takes the last characters off the shown text; the tokens stay, for what is written next
  for (const { text, button } of [...tokens].reverse()) {
    if (!length && text) return;
    const kept = Math.max(0, text.length - length);
    length -= text.length - kept;
    if (kept) return (button.textContent = text.slice(0, kept));
    button.remove();
  }
}
function showAll() { // again, what was cut off
  for (const { text, button } of tokens) {
    button.textContent = text || "·";
    $("written").append(button);
  }
}

function release() {
  pressed?.setAttribute("aria-pressed", "false");
  pressed = null;
}

function named(id) { // a token as visible text; bytes that are no whole character in hexadecimal
  if (id === tokenizer.endOfText) return "end of text";
  const bytes = tokenizer.bytes(id);
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    return text.replace(/[\n\t ]/g, (space) => SHOWN[space]).replace(/\p{C}/gu, "\ufffd");
  } catch {
    return Array.from(bytes, (byte) => `0x${byte.toString(16).toUpperCase().padStart(2, "0")}`).join(" ");
  }
}

function showLikely(likely, drawn, title) {
  const most = Math.max(...likely.flatMap((token) => [token.before, token.after]), 1e-9);
  $("likely-title").textContent = title;
  $("likely").hidden = false;
  $("likely").tBodies[0].replaceChildren(...likely.map((token) => {
    const row = element("tr", undefined, token.id === drawn ? "drawn" : ""), head = element("th", named(token.id));
    head.scope = "row";
    row.append(head, bar(token.before, most, "before"), bar(token.after, most, "after"));
    return row;
  }));
}
function bar(probability, most, style) {
  const cell = element("td"), made = element("span", undefined, `bar ${style}`), fill = element("i");
  fill.style.width = `${(100 * probability) / most}%`;
  made.append(fill, element("b", probability ? `${(100 * probability).toFixed(1)} %` : "–"));
  cell.append(made);
  return cell;
}

// ---- what the user does

function showKnobs() {
  for (const id of KNOBS) {
    const isOff = OFF[id] === $(id).value;
    document.querySelector(`output[for=${id}]`).textContent = isOff ? "off" : String(knob(id));
  }
}
function listen() {
  for (const id of KNOBS) {
    $(id).oninput = () => {
      showKnobs();
      if ($("stop").disabled) lookSoon(); // else the next token follows the new setting
    };
  }
  $("prompt").oninput = $("again").onclick = () => {
    startOver();
    setBusy(false);
    lookSoon();
  };
  $("go").onclick = () => write(knob("count"));
  $("one").onclick = () => write(1);
  $("stop").onclick = () => job++;
  $("prompt").onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("go").disabled) $("go").click();
  };
  $("written").onkeydown = (event) => {
    const from = event.target, sibling = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    if (!from.classList.contains("token")) return;
    if (event.key === "Enter" || event.key === " ") from.click();
    else if (!from[sibling]?.classList.contains("token")) return;
    else {
      from.tabIndex = -1;
      from[sibling].tabIndex = 0;
      from[sibling].focus();
    }
    event.preventDefault();
  };
}

async function open() {
  showKnobs();
  startOver();
  await pause();
  const texts = (name) => Array.from(document.getElementsByClassName(name), (part) => part.textContent);
  try {
    ({ model, tokenizer } = await load(texts("about"), texts("weights")));
  } catch (error) {
    return say(`This browser cannot run the model: ${error.message}`, true);
  }
  say("");
  startOver(); // with the tokenizer
  listen();
  await look();
}
open();
