// The live page: each run in a line, what its record shows, its samples and settings; and when each part is drawn.

import { $, colour, dark, duration, element, number, offer, rowOf, SIGN, visible, whole } from "./words.js";
import { follow, known, runOf } from "./runs.js";
import { drawCharts } from "./charts.js";
import { drawSlider, setSlider } from "./slider.js";
import { drawPlayground, setPrompt } from "./playground.js";

// ---- each run in a line

function stateOf({ facts, pace }) {
  const ago = pace.changed_at ? Date.now() / 1000 - pace.changed_at : null;
  if (!facts.there) return "waiting for a run in this folder";
  if (pace.read < 1) return `reading its record, ${Math.floor(100 * pace.read)} %`;
  if (facts.max_steps && pace.step >= facts.max_steps) return "finished";
  if (facts.ended) return facts.ended;
  return ago < 120 ? "training" : `quiet for ${duration(ago)}`;
}
const nameOf = (run) => (known().length > 1 ? `${SIGN[known().indexOf(run) % SIGN.length]} ` : "") + run.facts.name;
function drawRuns() {
  $("runs").replaceChildren(...known().map((run, i) => {
    const { facts, pace } = run, box = element("div", undefined, "run"), head = element("div"), state = stateOf(run);
    head.append(element("div", nameOf(run), "name"), element("div", state, "state"));
    head.firstChild.style.color = colour(i);
    const low = facts.val.find((row) => row[0] === facts.best);
    const lines = [
      ["step", `${whole(pace.step)} of ${whole(facts.max_steps)}`],
      ["best validation loss", low ? `${number(low[3])} at ${whole(low[0])}` : "–"],
      ["bits per byte there", low ? number(low[4]) : "–"],
      ["tokens per second", whole(pace.tokens_per_second)],
      state === "training" ? ["time left", duration(pace.seconds_left)] : ["trained for", duration(pace.seconds)],
    ].map(([what, value]) => {
      const line = element("dl");
      line.append(element("dt", what), element("dd", value));
      return line;
    });
    const bar = element("progress");
    bar.max = facts.max_steps || 1;
    bar.value = pace.step || 0;
    bar.setAttribute("aria-label", `progress of ${visible(facts.name)}`);
    box.append(head, ...lines, bar);
    if (facts.error) box.append(element("div", facts.error, "error"));
    return box;
  }));
  document.title = known().length === 1 ? `${visible(known()[0].facts.name)} – losscurve` : "losscurve";
}

// ---- what the record shows

function drawVerdicts() {
  const lines = known().flatMap((run) => run.facts.verdicts.map((line) => {
    const item = element("li"), at = line.indexOf(":"), cut = at < 0 ? line.length : at;
    if (known().length > 1) item.append(element("small", `${run.facts.name} — `));
    item.append(element("strong", line.slice(0, cut)), visible(line.slice(cut)));
    return item;
  }));
  $("verdicts").replaceChildren(...(lines.length ? lines : [element("li", "nothing worth knowing so far", "none")]));
}
function drawEvaluations() { // exact values, for who reads tables
  if (!$("evaluations").open) return;
  const rows = known().flatMap((run) => run.facts.val.map(([step, tokens, seconds, loss, bits]) =>
    rowOf([run.facts.name, whole(step), whole(tokens), duration(seconds), number(loss, 4), number(bits, 4)])));
  $("evaluations-table").tBodies[0].replaceChildren(...rows);
}

// ---- samples along a time line

let atEnd = true; // where the newest sample is shown as it comes
let wanted = "";
async function drawSample() {
  const run = runOf($("sample-run")), slider = $("sample-place");
  if (!run) return;
  const steps = run.facts.samples;
  slider.max = Math.max(0, steps.length - 1);
  slider.disabled = steps.length < 2;
  if (atEnd) slider.value = slider.max;
  const step = steps[Number(slider.value)], row = run.facts.val.find((found) => found[0] === step);
  const words = step === undefined ? "" : `step ${whole(step)}${row ? `, loss ${number(row[3])}` : ""}`;
  $("sample-step").textContent = words;
  slider.setAttribute("aria-valuetext", words);
  const place = `runs/${run.number}/samples/${step}`;
  wanted = place;
  let text = "no sample yet";
  if (step !== undefined) {
    try {
      const answer = await (await fetch(place)).json();
      text = answer.text ?? answer.error;
    } catch {
      return;
    }
  }
  if (wanted === place && $("sample").textContent !== visible(text)) $("sample").textContent = visible(text);
}
$("sample-place").oninput = () => {
  atEnd = $("sample-place").value === $("sample-place").max;
  drawSample();
};
$("sample-run").onchange = drawSample;

// ---- settings

function drawSettings() {
  const all = known(), names = [...new Set(all.flatMap((run) => Object.keys(run.facts.settings)))];
  const there = all.filter((run) => Object.keys(run.facts.settings).length); // the others have none as yet
  const differs = (name) => new Set(there.map((run) => run.facts.settings[name])).size > 1;
  const rowFor = (name) => rowOf([name, ...all.map((run) => run.facts.settings[name] ?? "–")], 1);
  const heads = () => rowOf(["setting", ...all.map((run) => nameOf(run))], all.length + 1);
  const differing = names.filter(differs);
  for (const [id, rows] of [["differences", differing], ["settings-table", names]]) {
    $(id).tHead.replaceChildren(heads());
    $(id).tBodies[0].replaceChildren(...rows.map(rowFor));
  }
  $("differences-box").hidden = !differing.length;
  $("settings-words").textContent = all.length > 1 ? `${differing.length} of ${names.length} settings differ` : "";
}

// ---- when what is drawn: once for all messages of a moment, and not while nobody looks

const waiting = new Map();
let timer = null;
function later(...parts) {
  for (const part of parts) waiting.set(part.name, part);
  timer ??= document.hidden ? null : setTimeout(drawWaiting, 30);
}
function drawWaiting() {
  const parts = [...waiting.values()];
  waiting.clear();
  timer = null;
  parts.forEach((part) => part());
}
document.addEventListener("visibilitychange", () => later());

function drawChoices() {
  offer($("sample-run"), known().map((run) => [run.number, run.facts.name]));
  for (const label of document.querySelectorAll(".run-choice")) label.hidden = known().length < 2;
}
let begun = false; // whether the first run's prompt and schedule were put in, which a person may since have changed
function changed(run, facts) {
  if (run.number === 0 && run.facts.knobs && !begun) {
    begun = true;
    if (run.facts.prompt) setPrompt(run.facts.prompt);
    setSlider(run.facts.knobs);
  }
  later(drawRuns, drawCharts);
  if (facts) later(drawChoices, drawPlayground, drawVerdicts, drawEvaluations, drawSample, drawSettings);
}
function said(words, live) {
  $("connection").textContent = words;
  $("connection").className = live ? "live" : "";
}

for (const id of ["measure", "axis", "scale", "xscale"]) $(id).onchange = drawCharts;
$("smoothing").oninput = () => {
  $("smoothing-value").textContent = Number($("smoothing").value).toFixed(2);
  drawCharts();
};
$("evaluations").ontoggle = drawEvaluations;
dark.addEventListener("change", () => later(drawRuns, drawCharts, drawSlider));
setInterval(() => later(drawRuns), 10000); // how long a run has been quiet
drawSlider();
follow(changed, said);
