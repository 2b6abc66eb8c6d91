// The live page. What comes from a run is put in as text, never as HTML; plotly, which reads some HTML in names,
// gets them escaped (see `plain`).
"use strict";

const $ = (id) => document.getElementById(id);
const COLUMNS = ["step", "tokens", "seconds", "loss", "grad_norm", "tokens_per_second", "lr"];
const COLUMN = Object.fromEntries(COLUMNS.map((name, i) => [name, i]));
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const MARKERS = ["circle", "square", "triangle-up", "diamond", "cross", "x"];
const LIGHT = ["#00508f", "#b04a0c", "#007a5a", "#a03070", "#6a5acd", "#7a5d10"];
const DARK = ["#7cbcf0", "#f0a060", "#5fd0a8", "#f08fc0", "#b3a8ff", "#e0c060"];
const dark = matchMedia("(prefers-color-scheme: dark)");
const runs = [];

// ---- words and numbers

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = visible(text);
  if (className) made.className = className;
  return made;
}
// control characters and those that turn the direction of text, shown as pictures of themselves
function visible(text) {
  return String(text)
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g, "\ufffd");
}
function plain(text) {
  return visible(text).replace(/[\n\t]/g, " ").slice(0, 60).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\$/g, "&#36;").replace(/%/g, "&#37;");
}
const whole = (x) => (x == null ? "–" : Math.round(x).toLocaleString("en"));
const number = (x, digits = 3) => (x == null ? "–" : Number(x).toFixed(digits));
const rate = (x) => (x === 0 ? "0" : x >= 0.001 ? String(Number(x.toPrecision(3))) : x.toExponential(2).replace(/\.?0+e/, "e"));
function duration(s) {
  if (s == null) return "–";
  if (s < 60) return `${Math.round(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}
const colour = (i) => (dark.matches ? DARK : LIGHT)[i % LIGHT.length];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// ---- what the server sends

function connect() {
  const source = new EventSource("/events");
  source.addEventListener("hello", () => say("live", true));
  source.addEventListener("run", (event) => take(JSON.parse(event.data)));
  source.onerror = () => {
    say("connection lost, trying again", false);
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 2000);
  };
}
function say(words, live) {
  $("connection").textContent = words;
  $("connection").className = live ? "live" : "";
}
function take(message) {
  const run = (runs[message.run] ||= { number: message.run, curves: {}, slow: null });
  run.pace = message.pace;
  if (message.all) run.curves = message.all;
  if (message.more) {
    for (const name of Object.keys(run.curves)) {
      const kept = message.more[0].map((_, i) => i).filter((i) => message.more[COLUMN[name]][i] !== null);
      run.curves[name].forEach((column, c) => column.push(...kept.map((i) => message.more[c][i])));
    }
  }
  if (message.slow) {
    const first = run.slow === null;
    run.slow = message.slow;
    if (first && run.number === 0) firstSettings(run);
    later("settings", drawSettings);
    later("verdicts", drawVerdicts);
    later("choices", drawChoices);
    later("samples", () => drawSample(true));
  }
  later("runs", drawRuns);
  later("charts", drawCharts);
}
const waiting = new Map();
function later(name, work) { // once for all messages of a moment
  if (!waiting.size) setTimeout(() => { const all = [...waiting.values()]; waiting.clear(); all.forEach((f) => f()); }, 30);
  waiting.set(name, work);
}
const known = () => runs.filter((run) => run && run.slow);

// ---- each run in a line

function stateOf(run) {
  const { slow, pace } = run;
  const ago = pace.changed_at ? Date.now() / 1000 - pace.changed_at : null;
  if (!slow.there) return "waiting for a run in this folder";
  if (slow.max_steps && pace.step >= slow.max_steps) return "finished";
  return ago < 120 ? "training" : `quiet for ${duration(ago)}`;
}
function drawRuns() {
  $("runs").replaceChildren(...known().map((run, i) => {
    const { slow, pace } = run, box = element("div", undefined, "run"), head = element("div");
    head.append(element("div", `${known().length > 1 ? ["━━", "╍╍", "┅┅", "┉┉", "━ ━"][i % 5] + " " : ""}${slow.name}`, "name"), element("div", stateOf(run), "state"));
    head.firstChild.style.color = colour(i);
    const low = slow.val.find((row) => row[0] === slow.best);
    const facts = [
      ["step", `${whole(pace.step)} of ${whole(slow.max_steps)}`],
      ["best validation loss", low ? `${number(low[3])} at ${whole(low[0])}` : "–"],
      ["bits per byte there", low ? number(low[4]) : "–"],
      ["tokens per second", whole(pace.tokens_per_second)],
      stateOf(run) === "finished" ? ["took", duration(pace.seconds)] : ["time left", duration(pace.seconds_left)],
    ].map(([what, value]) => { const dl = element("dl"); dl.append(element("dt", what), element("dd", value)); return dl; });
    const bar = element("progress");
    bar.max = slow.max_steps || 1; bar.value = pace.step || 0;
    bar.setAttribute("aria-label", `progress of ${visible(slow.name)}`);
    box.append(head, ...facts, bar);
    if (slow.error) box.append(element("div", slow.error, "error"));
    return box;
  }));
}

// ---- charts

function layout(more = {}) {
  const axis = { gridcolor: css("--grid"), linecolor: css("--line"), zerolinecolor: css("--grid"), automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--ink"), size: 12 },
    margin: { l: 52, r: 14, t: 10, b: 40 }, hovermode: "closest", showlegend: false, uirevision: $("axis").value + $("xscale").value + $("scale").value + $("measure").value,
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
    ...more,
    xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis },
  };
}
const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "toImage"], plotlyServerURL: "", topojsonURL: "" };

function smooth(values, weight) { // a mean that forgets, corrected for its start
  let sum = 0, share = 0;
  return values.map((v) => { sum = weight * sum + (1 - weight) * v; share = weight * share + 1 - weight; return sum / share; });
}
function xOf(columns) { // of rows [step, tokens, seconds, …]
  return columns[{ step: 0, tokens: 1, time: 2 }[$("axis").value]].map((x) => ($("axis").value === "time" && x !== null ? x / 60 : x));
}
const turned = (rows, width) => Array.from({ length: width }, (_, i) => rows.map((row) => row[i]));
const X_TITLE = { step: "step", tokens: "tokens", time: "minutes trained" };

function place(run, step) { // a step on the chosen axis; beyond the record, at the run's pace
  const { slow, pace } = run;
  if ($("axis").value === "step") return step;
  if ($("axis").value === "tokens") return slow.tokens_per_step ? step * slow.tokens_per_step : null;
  const row = slow.val.find((r) => r[0] === step);
  if (row) return row[2] / 60;
  if (!pace.step || pace.seconds == null) return null;
  const perStep = pace.seconds_left && slow.max_steps > pace.step ? pace.seconds_left / (slow.max_steps - pace.step) : pace.seconds / pace.step;
  return (pace.seconds + (step - pace.step) * perStep) / 60;
}
function drawCharts() {
  if (!known().length) return;
  const xaxis = { title: { text: X_TITLE[$("axis").value] }, type: $("xscale").value };
  drawLoss(xaxis);
  drawSmall("norm-chart", "grad_norm", xaxis, "gradient norm %{y:.4g}");
  drawSmall("speed-chart", "tokens_per_second", xaxis, "%{y:,.0f} tokens/s");
  drawRate(xaxis);
}
function drawLoss(xaxis) {
  const traces = [], shapes = [], annotations = [], several = known().length > 1, bits = $("measure").value === "bits";
  const weight = Number($("smoothing").value), what = { step: "step", tokens: "token", time: "minute" }[$("axis").value];
  const logY = $("scale").value === "log", words = [];
  let top = 0, bottom = Infinity, right = 0;
  known().forEach((run, i) => {
    const { slow } = run, name = plain(slow.name), label = several ? `${name}: ` : "", c = colour(i), dash = DASHES[i % DASHES.length];
    const train = run.curves.loss, val = turned(slow.val, 5);
    if (!bits && train && train[0].length) {
      const x = xOf(train), y = train[COLUMN.loss];
      if (weight > 0) traces.push({ x, y, mode: "lines", line: { color: c, width: 1 }, opacity: 0.22, hoverinfo: "skip", showlegend: false });
      traces.push({ x, y: smooth(y, weight), customdata: y, mode: "lines", line: { color: several ? c : colour(1), width: 1.6, dash: several ? dash : "solid" }, opacity: several ? 0.75 : 1,
        name: `${label}training`, showlegend: true, hovertemplate: `${label}training<br>${what} %{x:,}<br>loss %{customdata:.4f} (smoothed %{y:.4f})<extra></extra>` });
      if (!several && weight > 0) traces[traces.length - 2].line.color = colour(1);
      top = Math.max(top, y[0]); bottom = y.reduce((a, b) => Math.min(a, b), bottom);
    }
    const shown = val[bits ? 4 : 3];
    if (shown.length) {
      const x = xOf(val);
      traces.push({ x, y: shown, mode: shown.length > 150 ? "lines" : "lines+markers", line: { color: c, width: 2.4, dash: several ? dash : "solid" }, marker: { symbol: MARKERS[i % MARKERS.length], size: 7 },
        name: `${label}validation`, showlegend: true, hovertemplate: `${label}validation<br>${what} %{x:,}<br>${bits ? "bits per byte" : "loss"} %{y:.4f}<extra></extra>` });
      const at = slow.val.findIndex((row) => row[0] === slow.best);
      if (at >= 0 && shown[at] !== null) {
        traces.push({ x: [x[at]], y: [shown[at]], mode: "markers+text", showlegend: false, marker: { symbol: "star", size: 17, color: c, line: { color: css("--card"), width: 1.5 } },
          text: [`best ${number(shown[at])}`], textposition: "bottom center", textfont: { color: c }, cliponaxis: false, hovertemplate: `${label}best<br>step ${whole(slow.best)}<br>%{y:.4f}<extra></extra>` });
        words.push(`${several ? slow.name + ": " : ""}lowest validation ${bits ? "bits per byte" : "loss"} ${number(shown[at])} at step ${whole(slow.best)}`);
      }
      shown.forEach((y) => { if (y !== null) { top = Math.max(top, y); bottom = Math.min(bottom, y); } });
      right = Math.max(right, ...x.slice(-1).filter((v) => v !== null));
    }
    if (slow.overfits_since !== null && !several) {
      const from = place(run, slow.overfits_since), to = place(run, run.pace.step);
      shapes.push({ type: "rect", xref: "x", yref: "paper", x0: from, x1: to, y0: 0, y1: 1, fillcolor: css("--warm"), opacity: 0.09, line: { width: 0 }, layer: "below" });
      annotations.push({ x: $("xscale").value === "log" ? Math.log10(Math.max(from, 1e-9)) : from, y: 1, xref: "x", yref: "paper", text: "overfitting", showarrow: false, xanchor: "left", yanchor: "top", xshift: 6, yshift: -4, font: { color: css("--warm") } });
    }
    if (slow.band && !bits && !several && $("axis").value === "step") {
      const [steps, mean, half] = slow.band;
      traces.unshift({ x: [...steps, ...[...steps].reverse()], y: [...mean.map((m, k) => m + half[k]), ...mean.map((m, k) => m - half[k]).reverse()], fill: "toself", mode: "lines", line: { width: 0 }, fillcolor: dark.matches ? "rgba(124,188,240,.16)" : "rgba(0,80,143,.12)", hoverinfo: "skip", name: "where such runs lie", showlegend: true });
    }
  });
  if (!bits) {
    const seen = new Set();
    for (const run of known()) for (const mark of run.slow.landmarks) {
      if (seen.has(mark.loss)) continue;
      seen.add(mark.loss);
      shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: mark.loss, y1: mark.loss, line: { color: css("--soft"), width: 1, dash: "dot" }, layer: "below" });
      annotations.push({ xref: "paper", x: 1, y: logY ? Math.log10(mark.loss) : mark.loss, text: `${mark.name} = ${mark.loss.toFixed(2)}${innerWidth > 800 ? ` (${mark.meaning})` : ""}`, showarrow: false, xanchor: "right", yanchor: mark === run.slow.landmarks.at(-1) ? "top" : "bottom", font: { color: css("--soft"), size: 11 } });
      top = Math.max(top, mark.loss); bottom = Math.min(bottom, mark.loss);
    }
  }
  $("loss-words").textContent = visible(words.join("; "));
  const low = bottom === Infinity ? 0 : bottom, space = (top - low) * 0.08 || 1;
  const range = logY ? [Math.log10(Math.max(low, 1e-3) * 0.92), Math.log10((top || 1) * 1.08)] : [Math.max(0, low - space), top + space];
  Plotly.react("loss-chart", traces, layout({ xaxis, yaxis: { title: { text: bits ? "bits per byte" : "loss (nats per token)" }, type: $("scale").value, range }, shapes, annotations,
    showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, margin: { l: 56, r: 14, t: 34, b: 44 } }), CONFIG);
}
function drawSmall(id, key, xaxis, hover) {
  const traces = known().filter((run) => run.curves[key]).map((run) => {
    const i = known().indexOf(run), columns = run.curves[key];
    return { x: xOf(columns), y: columns[COLUMN[key]], mode: "lines", line: { color: colour(i), width: 1.4, dash: DASHES[i % 5] }, hovertemplate: `${plain(run.slow.name)}<br>%{x:,}<br>${hover}<extra></extra>` };
  });
  const yaxis = key === "grad_norm" ? { type: $("scale").value } : { rangemode: "tozero" };
  Plotly.react(id, traces, layout({ xaxis, yaxis }), CONFIG);
}
function drawRate(xaxis) {
  const traces = [];
  known().forEach((run, i) => {
    const { slow, pace } = run, past = run.curves.loss, name = plain(slow.name);
    const hover = `${name}<br>%{x:,}<br>learning rate %{y:.3e}<extra></extra>`;
    if (past) traces.push({ x: xOf(past), y: past[COLUMN.lr], mode: "lines", line: { color: colour(i), width: 2.2 }, hovertemplate: hover });
    const ahead = slow.schedule.filter(([step]) => step >= (pace.step || 0));
    traces.push({ x: ahead.map(([step]) => place(run, step)), y: ahead.map(([, lr]) => lr), mode: "lines", line: { color: colour(i), width: 1.4, dash: "dash" }, hovertemplate: hover });
  });
  Plotly.react("lr-chart", traces, layout({ xaxis, yaxis: { exponentformat: "e", rangemode: "tozero" } }), CONFIG);
}

// ---- verdicts, samples, settings

function drawVerdicts() {
  const lines = known().flatMap((run) => run.slow.verdicts.map((line) => {
    const item = element("li"), at = line.indexOf(":");
    if (known().length > 1) item.append(element("small", `${run.slow.name} — `));
    item.append(element("strong", at < 0 ? line : line.slice(0, at)), document.createTextNode(visible(at < 0 ? "" : line.slice(at))));
    return item;
  }));
  $("verdicts").replaceChildren(...(lines.length ? lines : [element("li", "nothing worth knowing so far", "none")]));
}
function options(select, pairs) {
  const before = select.value;
  select.replaceChildren(...pairs.map(([value, words]) => { const o = element("option", words); o.value = value; return o; }));
  if (pairs.some(([value]) => String(value) === before)) select.value = before;
}
function drawChoices() {
  const names = known().map((run) => [run.number, run.slow.name]);
  options($("sample-run"), names); options($("play-run"), names);
  document.querySelectorAll(".run-choice").forEach((label) => { label.hidden = names.length < 2; label.style.display = names.length < 2 ? "none" : ""; });
  const run = runs[$("play-run").value];
  const names2 = { best: "best (best.pt)", last: "last (model.pt)" };
  options($("weights"), (run?.slow.weights || []).map((w) => [w, names2[w]]));
  if (run?.slow.weights.length && !written.shown) { written.shown = true; ask(); }
}
let atEnd = true;
function drawSample(renewed) {
  const run = runs[$("sample-run").value] || known()[0], slider = $("sample-place");
  if (!run) return;
  const all = run.slow.samples;
  slider.max = Math.max(0, all.length - 1);
  slider.disabled = all.length < 2;
  if (renewed && atEnd) slider.value = slider.max;
  const sample = all[Number(slider.value)];
  const row = sample && run.slow.val.find((r) => r[0] === sample.step);
  const words = sample ? `step ${whole(sample.step)}${row ? `, loss ${number(row[3])}` : ""}` : "";
  $("sample-step").textContent = words;
  slider.setAttribute("aria-valuetext", words);
  const text = sample ? visible(sample.text) : "no sample yet";
  if ($("sample").textContent !== text) $("sample").textContent = text;
}
function drawSettings() {
  const all = known(), names = [...new Set(all.flatMap((run) => Object.keys(run.slow.settings)))];
  const rows = names.map((name) => {
    const values = all.map((run) => run.slow.settings[name] ?? "–"), row = element("tr");
    const head = element("th", name); head.scope = "row";
    if (new Set(values).size > 1) { row.className = "differs"; head.setAttribute("aria-label", `${name}, differs`); }
    row.append(head, ...values.map((value) => element("td", value)));
    return row;
  }).sort((a, b) => (b.className === "differs") - (a.className === "differs"));
  const head = element("tr");
  head.append(element("th", "setting"), ...all.map((run) => element("th", run.slow.name)));
  $("settings-table").tHead.replaceChildren(head);
  $("settings-table").tBodies[0].replaceChildren(...rows);
  const count = rows.filter((row) => row.className).length;
  $("settings-words").textContent = all.length > 1 ? `${count} settings differ, marked ≠ and first` : "";
}

// ---- the slider: positions are logarithmic where the quantity is

const TOTALS = [100, 1e6], PEAKS = [1e-6, 1e-1];
const along = ([low, high], t) => low * (high / low) ** (t / 100);
const back = ([low, high], v) => Math.round((100 * Math.log(Math.min(high, Math.max(low, v)) / low)) / Math.log(high / low));
const twoDigits = (x) => Number(x.toPrecision(2));
let exact = {}; // of the run's own values, which sliders would round
function chosen() {
  const total = exact.total ?? twoDigits(along(TOTALS, Number($("total").value)));
  const peak = exact.peak ?? twoDigits(along(PEAKS, Number($("peak").value)));
  return {
    max_steps: total, max_lr: peak, schedule: $("shape").value,
    warmup_steps: exact.warmup ?? Math.min(Math.round((total * Number($("warmup").value)) / 500), total - 1), // 0 to 20 %
    min_lr: exact.floor ?? twoDigits((peak * Number($("floor").value)) / 100),
  };
}
function firstSettings(run) {
  const s = run.slow.settings;
  if (run.slow.prompt) $("prompt").value = run.slow.prompt;
  if (s.max_steps) {
    const lrs = run.slow.schedule.map(([, lr]) => lr);
    exact = { total: Number(s.max_steps), peak: Number(s.max_lr), warmup: s.warmup_steps === undefined ? Math.floor(s.max_steps / 50) : Number(s.warmup_steps), floor: s.min_lr === undefined ? twoDigits(s.max_lr / 10) : Number(s.min_lr) };
    $("shape").value = s.schedule;
    $("total").value = back(TOTALS, exact.total); $("peak").value = back(PEAKS, exact.peak);
    $("warmup").value = Math.round((500 * exact.warmup) / exact.total); $("floor").value = Math.round((100 * exact.floor) / exact.peak);
  }
  drawSlider();
}
let asked = 0;
async function drawSlider() {
  const number = ++asked, values = chosen();
  const words = { warmup: `${whole(values.warmup_steps)} steps`, peak: rate(values.max_lr), floor: rate(values.min_lr), total: whole(values.max_steps) };
  for (const [id, text] of Object.entries(words)) { document.querySelector(`output[for=${id}]`).textContent = text; $(id).setAttribute("aria-valuetext", text); }
  let found;
  try { found = await (await fetch(`/schedule?${new URLSearchParams(values)}`)).json(); } catch { return; }
  if (number !== asked) return;
  $("schedule-warning").textContent = found.error || found.warning || "";
  if (found.error) return;
  $("flags").replaceChildren(...found.flags.split(" --").flatMap((flag, i) => (i ? [" ", element("span", `--${flag}`)] : [element("span", flag)])));
  $("schedule-table").tBodies[0].replaceChildren(...found.table.map(([step, lr]) => { const row = element("tr"); row.append(element("td", whole(step)), element("td", rate(lr))); return row; }));
  const [x, y] = turned(found.curve, 2);
  Plotly.react("schedule-chart", [{ x, y, mode: "lines", line: { color: colour(0), width: 2.4 }, hovertemplate: "step %{x:,}<br>%{y:.3e}<extra></extra>" }],
    { ...layout({ xaxis: { title: { text: "step" } }, yaxis: { exponentformat: "e", rangemode: "tozero" } }), uirevision: number }, { ...CONFIG, displayModeBar: false });
}

// ---- the playground

const written = { tokens: [], shown: false, pressed: null, stop: null };
function knobs() {
  const k = Number($("top_k").value);
  return { prompt: $("prompt").value, weights: $("weights").value || "last", temperature: Number($("temperature").value),
    top_k: k || null, top_p: Number($("top_p").value), seed: Math.max(0, Math.floor(Number($("seed").value) || 0)) };
}
function knobWords() {
  for (const id of ["temperature", "top_k", "top_p"]) document.querySelector(`output[for=${id}]`).textContent = id === "top_k" && $(id).value === "0" ? "off" : Number($(id).value).toString();
}
function playWords(text, bad) { $("play-words").textContent = visible(text); $("play-words").className = bad ? "bad" : ""; }
const post = (what, body, signal) => fetch(`/runs/${$("play-run").value || 0}/${what}`, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });

let asking = null;
async function ask() { // the distribution of the next token
  if (written.stop || written.pressed) return;
  asking?.abort();
  const mine = (asking = new AbortController());
  try {
    const answer = await (await post("next", { ...knobs(), ids: written.tokens.map((t) => t.id) }, mine.signal)).json();
    if (answer.error) return playWords(answer.error, true);
    playWords("");
    if (written.pressed) return;
    showLikely(answer.likely, null, "Next token");
    $("likely-words").textContent = `${whole(answer.possible)} of ${whole(answer.vocab_size)} tokens can be drawn; entropy ${number(answer.entropy[0], 2)} nats before, ${number(answer.entropy[1], 2)} after`;
  } catch (error) { if (error.name !== "AbortError") playWords("the server does not answer", true); }
}
function showLikely(likely, drawn, title) {
  const most = Math.max(...likely.flatMap((t) => [t.before, t.after]), 1e-9);
  $("likely-title").textContent = title;
  $("likely").tBodies[0].replaceChildren(...likely.map((token) => {
    const row = element("tr", undefined, token.id === drawn ? "drawn" : "");
    row.append(element("td", JSON.stringify(visible(token.text))), ...["before", "temperature", "top_k", "after"].map((stage) => {
      const cell = element("td"), bar = element("span", undefined, `bar ${stage}${token[stage] === 0 ? " out" : ""}`), fill = element("i");
      fill.style.width = `${Math.min(100, (100 * token[stage]) / most)}%`;
      bar.append(fill, element("b", token[stage] === 0 ? "–" : `${(100 * token[stage]).toFixed(2)} %`));
      cell.append(bar);
      return cell;
    }));
    return row;
  }));
}
function startOver() {
  written.stop?.abort();
  written.tokens = []; written.pressed = null;
  $("written").replaceChildren(element("span", $("prompt").value, "prompt"));
}
function addToken(token) {
  const place = written.tokens.push(token) - 1, button = element("span", token.text || "·", "token"); // a <button> breaks no line
  button.tabIndex = 0;
  button.setAttribute("role", "button");
  button.setAttribute("aria-pressed", "false");
  button.onclick = () => {
    release();
    written.pressed = button;
    button.setAttribute("aria-pressed", "true");
    showLikely(token.likely, token.id, `Likely at token ${place + 1}, where ${JSON.stringify(visible(token.text))} was drawn`);
    $("likely-words").textContent = "▸ marks what was drawn";
  };
  button.onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); button.onclick(); } };
  $("written").append(button);
  $("written").scrollTop = $("written").scrollHeight;
}
function release() { // the token whose alternatives are shown
  written.pressed?.setAttribute("aria-pressed", "false");
  written.pressed = null;
}
async function write(count) {
  asking?.abort();
  written.stop?.abort();
  release();
  if ($("written").firstChild?.textContent !== visible($("prompt").value)) startOver();
  const mine = (written.stop = new AbortController());
  $("stop").disabled = false;
  playWords("writing");
  try {
    const response = await post("stream", { ...knobs(), ids: written.tokens.map((t) => t.id), count }, mine.signal);
    if (!response.ok) throw new Error((await response.json()).error);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = JSON.parse(event.slice(event.indexOf("data: ") + 6));
        if (event.startsWith("event: failed")) throw new Error(data.error);
        if (event.startsWith("data: ") && written.stop === mine) addToken(data);
      }
    }
    playWords(`${written.tokens.length} tokens`);
  } catch (error) {
    playWords(error.name === "AbortError" ? "stopped" : error.message, error.name !== "AbortError");
    if (error.name !== "AbortError") { written.stop = null; $("stop").disabled = true; return; }
  }
  if (written.stop === mine) { written.stop = null; $("stop").disabled = true; ask(); }
}

// ---- what a person moves

for (const id of ["measure", "axis", "scale", "xscale"]) $(id).onchange = drawCharts;
$("smoothing").oninput = () => { $("smoothing-value").textContent = Number($("smoothing").value).toFixed(2); drawCharts(); };
$("sample-place").oninput = () => { atEnd = $("sample-place").value === $("sample-place").max; drawSample(false); };
$("sample-run").onchange = () => drawSample(true);
for (const id of ["warmup", "peak", "floor", "total"]) $(id).oninput = () => {
  delete exact[id];
  if (id === "total") delete exact.warmup;
  if (id === "peak") delete exact.floor;
  drawSlider();
};
$("shape").onchange = drawSlider;
$("copy").onclick = async () => {
  try { await navigator.clipboard.writeText($("flags").textContent); $("copy").textContent = "Copied"; }
  catch { getSelection().selectAllChildren($("flags")); $("copy").textContent = "Selected"; }
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
};
let soon;
const askSoon = () => { release(); clearTimeout(soon); soon = setTimeout(ask, 150); };
for (const id of ["temperature", "top_k", "top_p"]) $(id).oninput = () => { knobWords(); askSoon(); };
$("prompt").oninput = () => { startOver(); askSoon(); };
for (const id of ["weights", "play-run"]) $(id).onchange = () => { drawChoices(); startOver(); askSoon(); };
$("step-one").onclick = () => write(1);
$("stream").onclick = () => write(Math.min(500, Math.max(1, Math.floor(Number($("count").value) || 1))));
$("stop").onclick = () => written.stop?.abort();
$("again").onclick = () => { startOver(); askSoon(); };
dark.addEventListener("change", () => { drawRuns(); drawCharts(); drawSlider(); });
setInterval(() => { if (known().length) drawRuns(); }, 10000);
knobWords();
startOver();
drawSlider();
connect();
