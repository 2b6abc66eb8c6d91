// The playground: a prompt, the sampling parameters, the next-token distribution before and after each of them, and
// generation. Nothing is requested before the user does something here, because the server then loads the weights.

import { $, element, integer, number, setChoices, showControls } from "./words.js";
import { knownRuns, selectedRun } from "./runs.js";

const OFF = { top_k: "0", top_p: "1", min_p: "0", repetition_penalty: "1" };
const KNOBS = ["temperature", ...Object.keys(OFF)];
const STAGES = ["before", "temperature", "top_k", "after"];
const ESCAPES = { n: "\n", t: "\t", "\\": "\\" };
const NAMES = { best: "best (best.pt)", last: "last (model.pt)", model: "the model’s" };
let tokens = []; // generated so far: {id, text, likely, cut, button}
let pressed = null; // the selected token, whose alternatives are shown
let writing = null; // aborts the generation in progress
let asking = null; // aborts the request in progress

export function drawPlayground() { // updates the choices
  setChoices($("play-run"), knownRuns().map((run) => [run.number, run.facts.name]));
  const weights = selectedRun($("play-run"))?.facts.weights || [];
  setChoices($("weights"), weights.map((name) => [name, NAMES[name]]));
  for (const id of ["step-one", "stream"]) $(id).disabled = !weights.length;
  if (!weights.length) say("no weights yet: the run saves them at an evaluation");
  else if ($("play-words").textContent.startsWith("no weights yet")) say("");
}
export function setPrompt(text) { // sets the run's prompt, unless the user has typed one
  if ($("prompt").value !== $("prompt").defaultValue) return askSoon();
  $("prompt").value = text;
  startOver();
}

function say(text, bad) {
  $("play-words").textContent = showControls(text);
  $("play-words").className = bad ? "bad" : "";
}
function question(more) {
  const k = Number($("top_k").value), seed = Math.max(0, Math.floor(Number($("seed").value) || 0));
  return {
    prompt: $("prompt").value, ids: tokens.map((token) => token.id), weights: $("weights").value || "last",
    temperature: Number($("temperature").value), top_k: k || null, top_p: Number($("top_p").value),
    min_p: Number($("min_p").value), repetition_penalty: Number($("repetition_penalty").value), stop: stopTexts(), seed,
    ...more,
  };
}
const stopTexts = () => $("stops").value.split("\n").filter(Boolean).map(
  (line) => line.replace(/\\([nt\\])/g, (_, kind) => ESCAPES[kind]),
);
const isCut = () => Boolean(tokens.at(-1)?.cut); // whether the shown text ends before a stop text
const post = (what, body, signal) => fetch(`runs/${$("play-run").value || 0}/${what}`, {
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
});

async function ask() { // requests the next-token distribution
  if (writing || pressed || !$("weights").value) return;
  asking?.abort();
  const mine = (asking = new AbortController());
  try {
    const answer = await (await post("next", question(), mine.signal)).json();
    if (pressed) return;
    if (answer.error) {
      $("likely").hidden = true; // it belongs to an earlier request
      $("likely-words").textContent = "";
      return say(answer.error, true);
    }
    say("");
    showLikely(answer.likely, null, isCut() ? "Next token, after what was cut off" : "Next token");
    const [before, after] = answer.entropy.map((nats) => number(nats, 2));
    const can = `${integer(answer.possible)} of ${integer(answer.vocab_size)} tokens can be drawn`;
    $("likely-words").textContent = `${can}; entropy ${before} nats before the parameters, ${after} after`;
  } catch (error) {
    if (error.name !== "AbortError") say("no answer from the server", true);
  }
}
let soon;
function askSoon() {
  release();
  clearTimeout(soon);
  soon = setTimeout(ask, 150);
}

function showLikely(likely, drawn, title) {
  const most = Math.max(...likely.flatMap((token) => [token.before, token.after]), 1e-9);
  $("likely-title").textContent = title;
  $("likely").hidden = false;
  $("likely").tBodies[0].replaceChildren(...likely.map((token) => {
    const row = element("tr", undefined, token.id === drawn ? "drawn" : "");
    const head = element("th", JSON.stringify(showControls(token.text)));
    head.scope = "row";
    row.append(head, ...STAGES.map((stage) => cell(token[stage], most, stage)));
    return row;
  }));
}
function cell(probability, most, stage) {
  const out = probability === 0, made = element("td"), fill = element("i");
  const bar = element("span", undefined, `bar ${stage}${out ? " out" : ""}`);
  fill.style.width = `${Math.min(100, (100 * probability) / most)}%`;
  bar.append(fill, element("b", out ? "–" : `${(100 * probability).toFixed(2)} %`));
  made.append(bar);
  return made;
}

function startOver() {
  writing?.abort();
  tokens = [];
  pressed = null;
  $("written").replaceChildren(element("span", $("prompt").value, "prompt"));
}
function addToken(token) {
  const place = tokens.push(token) - 1;
  const button = (token.button = element("span", token.text || "·", "token")); // a <button> cannot break across lines
  if (token.text === "\n") button.classList.add("newline");
  button.tabIndex = place ? -1 : 0; // one tab stop; arrow keys move from there
  button.setAttribute("role", "button");
  button.setAttribute("aria-pressed", "false");
  button.onclick = () => {
    release();
    pressed = button;
    button.setAttribute("aria-pressed", "true");
    const drawn = JSON.stringify(showControls(token.text));
    showLikely(token.likely, token.id, `Likely at token ${place + 1}, where ${drawn} was drawn`);
    $("likely-words").textContent = "▸ marks the token that was drawn, from the last column";
  };
  $("written").append(button);
  $("written").scrollTop = $("written").scrollHeight;
}
function cutOff(length) { // takes the last characters off the shown text; the tokens stay, for what is generated next
  for (const { text, button } of [...tokens].reverse()) {
    if (!length && text) return;
    const kept = Math.max(0, text.length - length);
    length -= text.length - kept;
    if (kept) return (button.textContent = showControls(text.slice(0, kept)));
    button.remove();
  }
}
function showAll() { // again, what was cut off
  for (const { text, button } of tokens) {
    button.textContent = showControls(text) || "·";
    $("written").append(button);
  }
}
function release() {
  pressed?.setAttribute("aria-pressed", "false");
  pressed = null;
}
$("written").onkeydown = (event) => {
  const from = event.target;
  if (!from.classList.contains("token")) return;
  const next = { ArrowRight: from.nextElementSibling, ArrowLeft: from.previousElementSibling }[event.key];
  if (event.key === "Enter" || event.key === " ") from.click();
  else if (!next?.classList.contains("token")) return;
  else {
    from.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
  event.preventDefault();
};

async function write(count) {
  asking?.abort();
  writing?.abort();
  release();
  if ($("written").firstChild.textContent !== showControls($("prompt").value)) startOver();
  if (isCut()) showAll();
  const mine = (writing = new AbortController());
  $("stop").disabled = false;
  say("generating");
  try {
    const response = await post("stream", question({ count }), mine.signal);
    if (!response.ok) throw new Error((await response.json()).error);
    for await (const token of events(response.body)) if (writing === mine) addToken(token);
    if (isCut()) cutOff(tokens.at(-1).cut.length);
    say(`${integer(tokens.length)} tokens${isCut() ? "; ended before a stop text" : ""}`);
  } catch (error) {
    const stopped = error.name === "AbortError";
    say(stopped ? "stopped" : error.message, !stopped);
  }
  if (writing !== mine) return;
  writing = null;
  $("stop").disabled = true;
  if ($("play-words").className !== "bad") ask();
}
async function* events(body) { // yields the data of server-sent events; throws the error of a "failed" event
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const complete = (rest + value).split("\n\n");
    rest = complete.pop();
    for (const event of complete) {
      const data = JSON.parse(event.slice(event.indexOf("data: ") + 6));
      if (event.startsWith("event: failed")) throw new Error(data.error);
      if (event.startsWith("data: ")) yield data;
    }
  }
}

function knobWords() {
  for (const id of KNOBS) {
    const off = OFF[id] === $(id).value;
    document.querySelector(`output[for=${id}]`).textContent = off ? "off" : String(Number($(id).value));
  }
}
for (const id of KNOBS) {
  $(id).oninput = () => {
    knobWords();
    askSoon();
  };
}
$("prompt").oninput = () => {
  startOver();
  askSoon();
};
for (const id of ["weights", "play-run"]) {
  $(id).onchange = () => {
    drawPlayground();
    startOver();
    askSoon();
  };
}
$("step-one").onclick = () => write(1);
$("stream").onclick = () => write(Math.min(500, Math.max(1, Math.floor(Number($("count").value) || 1))));
$("stop").onclick = () => writing?.abort();
$("again").onclick = () => {
  startOver();
  askSoon();
};
knobWords();
startOver();
