// The live page: one row for each run, verdicts, samples and settings; and when each part is drawn.

import {
  $, colour, dark, duration, element, integer, number,
  setChoices, showControls, SIGN, tableRow,
} from "./words.js";
import { follow, knownRuns, selectedRun } from "./runs.js";
import { drawCharts } from "./charts.js";
import { drawSlider, setSlider } from "./slider.js";
import { drawPlayground, setPrompt } from "./playground.js";

// ---- one row for each run

function stateOf({ facts, pace }) {
  const ago = pace.changed_at ? Date.now() / 1000 - pace.changed_at : null;
  if (facts.is_model) return "a model without a record, for the playground";
  if (!facts.has_record) return "waiting for a run in this folder";
  if (pace.read < 1) return `reading its record, ${Math.floor(100 * pace.read)} %`;
  if (facts.max_steps && pace.step >= facts.max_steps) return "finished";
  if (facts.ended) return facts.ended;
  return ago < 120 ? "training" : `quiet for ${duration(ago)}`;
}
function nameOf(run) {
  if (knownRuns().length < 2) return run.facts.name;
  return `${SIGN[knownRuns().indexOf(run) % SIGN.length]} ${run.facts.name}`;
}
function drawRuns() {
  $("runs").replaceChildren(...knownRuns().map((run, i) => {
    const { facts, pace } = run, box = element("div", undefined, "run"), head = element("div"), state = stateOf(run);
    head.append(element("div", nameOf(run), "name"), element("div", state, "state"));
    head.firstChild.style.color = colour(i);
    if (facts.is_model) {
      box.append(head);
      return box;
    }
    const low = facts.lowest;
    const lines = [
      ["step", `${integer(pace.step)} of ${integer(facts.max_steps)}`],
      ["best validation loss", low ? `${number(low[0])} at ${integer(facts.best)}` : "–"],
      ...(facts.lowest_is_average ? [["of these weights", "their average"]] : []),
      ["bits per byte there", low ? number(low[1]) : "–"],
      ["tokens per second", integer(pace.tokens_per_second)],
      state === "training" ? ["time left", duration(pace.seconds_left)] : ["trained for", duration(pace.seconds)],
    ].map(([what, value]) => {
      const line = element("dl");
      line.append(element("dt", what), element("dd", value));
      return line;
    });
    const bar = element("progress");
    bar.max = facts.max_steps || 1;
    bar.value = pace.step || 0;
    bar.setAttribute("aria-label", `progress of ${showControls(facts.name)}`);
    box.append(head, ...lines, bar);
    if (facts.error) box.append(element("div", facts.error, "error"));
    return box;
  }));
  // what a record fills stays hidden beside models only
  document.body.classList.toggle("only-models", knownRuns().every((run) => run.facts.is_model));
  document.title = knownRuns().length === 1 ? `${showControls(knownRuns()[0].facts.name)} – losscurve` : "losscurve";
}

// ---- verdicts

function drawVerdicts() {
  const lines = knownRuns().flatMap((run) => run.facts.verdicts.map((line) => {
    const item = element("li"), at = line.indexOf(":"), cut = at < 0 ? line.length : at;
    if (knownRuns().length > 1) item.append(element("small", `${run.facts.name} — `));
    item.append(element("strong", line.slice(0, cut)), showControls(line.slice(cut)));
    return item;
  }));
  $("verdicts").replaceChildren(...(lines.length ? lines : [element("li", "no verdict so far", "none")]));
}
function drawEvaluations() { // exact values, as a table
  if (!$("evaluations").open) return;
  const all = knownRuns().flatMap(({ facts }) => facts.val.map((row) => [facts.name, ...row]));
  const averages = all.some((row) => row[6] !== null); // of the weights, in at least one run
  const heads = ["run", "step", "tokens", "time", "validation loss", "bits per byte"];
  if (averages) heads.push("loss of the average", "its bits per byte");
  const rows = all.map(([name, step, tokens, seconds, ...losses]) => tableRow([
    name, integer(step), integer(tokens), duration(seconds),
    ...losses.slice(0, averages ? 4 : 2).map((value) => number(value, 4)),
  ]));
  $("evaluations-table").tHead.replaceChildren(tableRow(heads, heads.length));
  $("evaluations-table").tBodies[0].replaceChildren(...rows);
}

async function drawComparison() { // of several runs; only where somebody looks, since it takes the server a second
  $("comparison").hidden = knownRuns().length < 2;
  if ($("comparison").hidden || !$("comparison").open) return;
  try {
    const { words, picture } = await (await fetch("comparison")).json();
    $("comparison-words").textContent = words.split("\n").map(showControls).join("\n");
    $("comparison-picture").src = picture;
    $("comparison-picture").hidden = !picture;
  } catch {
    return; // the connection line says that the server is gone
  }
}

// ---- tries: the server reads and draws them anew only if one of their files has changed

let drawnTries = ""; // the answer that is drawn: a table that is made anew has lost its place of scrolling
async function drawTries() {
  let answer = drawnTries;
  try {
    answer = await (await fetch("tries")).text();
  } catch {
    // the connection line says that the server is gone; it may come back
  } finally {
    if (answer !== "[]") setTimeout(() => drawSoon(drawTries), 10000);
  }
  if (answer === drawnTries) return;
  const tries = JSON.parse(answer);
  drawnTries = answer;
  $("tries").hidden = !tries.length;
  $("tries").replaceChildren(...tries.flatMap(({ name, error, rows, picture, words }) => {
    const title = element("h2", name);
    if (error) return [title, element("p", error, "words")];
    const table = element("table"), scroll = element("div", undefined, "scroll tall"), image = element("img");
    const [heads, ...cells] = rows;
    table.append(element("thead"), element("tbody"));
    table.tHead.append(tableRow(heads, heads.length));
    table.tBodies[0].append(...cells.map((row) => tableRow(row, 1)));
    scroll.append(table);
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", `settings of ${showControls(name)}`);
    image.src = picture;
    image.alt = showControls(words);
    return [title, scroll, image];
  }));
}

// ---- samples over time

let atEnd = true; // whether the slider is at its end and follows the newest sample
let wanted = ""; // the sample requested last
async function drawSample() {
  const run = selectedRun($("sample-run")), slider = $("sample-place");
  if (!run) return;
  const steps = run.facts.samples;
  slider.max = Math.max(0, steps.length - 1);
  slider.disabled = steps.length < 2;
  if (atEnd) slider.value = slider.max;
  const step = steps[Number(slider.value)], row = run.facts.val.find((found) => found[0] === step);
  const words = step === undefined ? "" : `step ${integer(step)}${row ? `, loss ${number(row[3])}` : ""}`;
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
  if (wanted === place && $("sample").textContent !== showControls(text)) $("sample").textContent = showControls(text);
}
$("sample-place").oninput = () => {
  atEnd = $("sample-place").value === $("sample-place").max;
  drawSample();
};
$("sample-run").onchange = drawSample;

// ---- settings

function drawSettings() {
  const all = knownRuns(), names = [...new Set(all.flatMap((run) => Object.keys(run.facts.settings)))];
  const there = all.filter((run) => Object.keys(run.facts.settings).length); // the others have none yet
  const differs = (name) => new Set(there.map((run) => run.facts.settings[name])).size > 1;
  const rowFor = (name) => tableRow([name, ...all.map((run) => run.facts.settings[name] ?? "–")], 1);
  const heads = () => tableRow(["setting", ...all.map((run) => nameOf(run))], all.length + 1);
  const differing = names.filter(differs);
  for (const [id, rows] of [["differences", differing], ["settings-table", names]]) {
    $(id).tHead.replaceChildren(heads());
    $(id).tBodies[0].replaceChildren(...rows.map(rowFor));
  }
  $("differences-box").hidden = !differing.length;
  $("settings-words").textContent = all.length > 1 ? `${differing.length} of ${names.length} settings differ` : "";
}

// ---- drawing: once for all messages of the last 30 ms, and not while the page is hidden

const waiting = new Map();
let timer = null;
function drawSoon(...parts) {
  for (const part of parts) waiting.set(part.name, part);
  timer ??= document.hidden ? null : setTimeout(drawWaiting, 30);
}
function drawWaiting() {
  const parts = [...waiting.values()];
  waiting.clear();
  timer = null;
  parts.forEach((part) => part());
}
document.addEventListener("visibilitychange", () => drawSoon());

function drawChoices() {
  setChoices($("sample-run"), knownRuns().map((run) => [run.number, run.facts.name]));
  for (const label of document.querySelectorAll(".run-choice")) label.hidden = knownRuns().length < 2;
}
let initialised = false; // whether prompt and schedule were set to the first run's; the user may have changed them since
function changed(run, facts) {
  if (run.number === 0 && run.facts.knobs && !initialised) {
    initialised = true;
    if (run.facts.prompt) setPrompt(run.facts.prompt);
    setSlider(run.facts.knobs);
  }
  drawSoon(drawRuns, drawCharts);
  if (facts) drawSoon(drawChoices, drawPlayground, drawVerdicts, drawEvaluations, drawComparison, drawSample, drawSettings);
}
function setConnection(words, live) {
  $("connection").textContent = words;
  $("connection").className = live ? "live" : "";
}

for (const id of ["measure", "axis", "scale", "xscale"]) $(id).onchange = drawCharts;
$("smoothing").oninput = () => {
  $("smoothing-value").textContent = Number($("smoothing").value).toFixed(2);
  drawCharts();
};
$("evaluations").ontoggle = drawEvaluations;
$("comparison").ontoggle = drawComparison;
dark.addEventListener("change", () => drawSoon(drawRuns, drawCharts, drawSlider));
setInterval(() => drawSoon(drawRuns), 10000); // to update how long a run has been quiet
drawSlider();
drawTries();
follow(changed, setConnection);
