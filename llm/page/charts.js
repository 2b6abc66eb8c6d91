// The charts of the runs: losses, learning rate, gradient norm, throughput.

import { $, colour, css, dark, DASHES, escapeForPlotly, integer, MARKERS, number, showControls } from "./words.js";
import { COLUMN, knownRuns } from "./runs.js";

const CONFIG = {
  displaylogo: false, responsive: true, plotlyServerURL: "", topojsonURL: "",
  modeBarButtonsToRemove: ["select2d", "lasso2d", "toImage", "autoScale2d"],
};
const PLACE = { step: 0, tokens: 1, time: 2 }; // column of a row, by axis
const TITLE = { step: "step", tokens: "tokens", time: "minutes trained" };
const wide = () => innerWidth > 800;
const KEYS = "plus and minus zoom, arrows move, 0 shows all";

export function draw(id, traces, layout, label, config = {}) {
  const axis = { gridcolor: css("--grid"), linecolor: css("--line"), zerolinecolor: css("--grid"), automargin: true };
  const chart = $(id);
  Plotly.react(chart, traces, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: css("--ink"), size: 12, family: "system-ui, sans-serif" },
    margin: { l: 52, r: 14, t: 10, b: 40 }, hovermode: "closest", showlegend: false,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--accent") },
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
    ...layout,
    xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
  }, { ...CONFIG, ...config });
  chart.setAttribute("aria-label", showControls(`${label}; ${KEYS}`));
  chart.tabIndex = 0;
  chart.onkeydown = move;
}

const MOVES = {
  "+": [0.25, -0.25], "=": [0.25, -0.25], "-": [-0.5, 0.5], ArrowLeft: [-0.2, -0.2], ArrowRight: [0.2, 0.2],
};
function move(event) { // zooms and moves along the steps by keys
  const full = event.currentTarget._fullLayout, [from, to] = full.xaxis.range, wide = to - from;
  const by = MOVES[event.key]; // by which shares of the visible range the ends move
  if (!by && event.key !== "0") return;
  event.preventDefault();
  const range = by ? { "xaxis.range": [from + by[0] * wide, to + by[1] * wide] } : { "xaxis.autorange": true };
  Plotly.relayout(event.currentTarget, range);
}

export const turned = (rows, width) => Array.from({ length: width }, (_, i) => rows.map((row) => row[i]));

function smooth(values, weight) { // exponential moving average with bias correction
  let sum = 0, share = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    share = weight * share + 1 - weight;
    return sum / share;
  });
}
function along(columns) { // returns the selected axis, of columns [step, tokens, seconds, …]
  const axis = $("axis").value, found = columns[PLACE[axis]];
  return axis === "time" ? found.map((x) => (x === null ? null : x / 60)) : found;
}
function place(run, step) { // returns a step's place on the selected axis; for future steps at the run's pace
  const { facts, pace } = run, axis = $("axis").value;
  if (axis === "step") return step;
  const row = facts.val.find((found) => found[0] === step);
  if (axis === "tokens") {
    if (row && row[1] !== null) return row[1];
    if (!facts.tokens_per_step) return null;
    const ahead = pace.tokens == null ? step : step - pace.step; // a fork may have had other steps before it
    return (pace.tokens ?? 0) + ahead * facts.tokens_per_step;
  }
  if (row) return row[2] / 60;
  if (!pace.step || pace.seconds == null) return null;
  const ahead = pace.seconds_left && facts.max_steps > pace.step;
  const perStep = ahead ? pace.seconds_left / (facts.max_steps - pace.step) : pace.seconds / pace.step;
  return (pace.seconds + (step - pace.step) * perStep) / 60;
}

export function drawCharts() {
  if (!knownRuns().length) return;
  const xaxis = { title: { text: TITLE[$("axis").value] }, type: $("xscale").value };
  const common = { xaxis, uirevision: $("axis").value + $("xscale").value }; // the zoom is kept while these are the same
  drawLoss(common);
  drawRate(common);
  drawOne("norm-chart", "grad_norm", common, "gradient norm %{y:.4g}", { type: $("scale").value }, "Gradient norm");
  const zero = { rangemode: "tozero" };
  drawOne("speed-chart", "tokens_per_second", common, "%{y:,.0f} tokens/s", zero, "Tokens per second");
}

function drawLoss(common) {
  const chart = {
    bits: $("measure").value === "bits", // bits per byte in place of nats per token
    log: $("scale").value === "log",
    several: knownRuns().length > 1,
    traces: [], shapes: [], annotations: [],
    losses: [], // everything drawn, for the range of the axis
    words: [], // a description for screen readers
  };
  knownRuns().forEach((run, i) => addLosses(run, i, chart));
  if (!chart.bits) chart.losses.push(...marks(chart.log, chart.shapes, chart.annotations));
  const { bits, log, traces, shapes, annotations, words } = chart;
  const yaxis = { title: { text: bits ? "bits per byte" : "loss (nats per token)" }, type: $("scale").value };
  if (chart.losses.length) yaxis.range = lossRange(chart.losses, log);
  const right = bits ? 14 : wide() ? 112 : 52; // room for the names of the landmarks
  draw("loss-chart", traces, {
    ...common, uirevision: common.uirevision + $("scale").value + $("measure").value, yaxis, shapes, annotations,
    showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    margin: { l: 56, r: right, t: 34, b: 44 },
  }, `Loss over the run: ${words.join(", ")}`);
  $("loss-words").textContent = showControls(words.join("; "));
}
function lossRange(losses, log) { // returns the range of the axis; on a log axis in powers of ten
  const low = losses.reduce((a, b) => Math.min(a, b), Infinity);
  const high = losses.reduce((a, b) => Math.max(a, b), -Infinity);
  if (log) return [Math.log10(Math.max(low, 1e-3) * 0.92), Math.log10(high * 1.08)];
  const space = (high - low) * 0.06 || 1;
  return [Math.max(0, low - space), high + space];
}
function addLosses(run, i, chart) { // adds the curves of a run
  const { bits, several, traces, words } = chart;
  const { facts } = run;
  const unit = bits ? "bits per byte" : "loss";
  const label = several ? `${escapeForPlotly(facts.name)}: ` : "";
  const prefix = several ? `${facts.name}: ` : "";
  const line = { color: colour(i), dash: several ? DASHES[i % DASHES.length] : "solid" };
  if (facts.band && !bits && !several && $("axis").value === "step") traces.push(band(facts.band));
  const train = run.curves.loss;
  if (!bits && train && train[0].length) {
    chart.losses.push(...train[COLUMN.loss]);
    traces.push(...training(train, label, several ? line : { ...line, color: colour(1) }, several));
    words.push(`${prefix}training loss ${number(train[COLUMN.loss].at(-1))}`);
  }
  const val = turned(facts.val, 7);
  const [y, averaged] = bits ? [val[4], val[6]] : [val[3], val[5]]; // of the weights, and of their average, if any
  if (!y.length) return;
  const x = along(val);
  traces.push({
    x, y, customdata: val[0], name: `${label}validation`, showlegend: true, line: { ...line, width: 2.4 },
    mode: y.length > 150 ? "lines" : "lines+markers", marker: { symbol: MARKERS[i % MARKERS.length], size: 7 },
    hovertemplate: `${label}validation<br>step %{customdata:,}<br>${unit} %{y:.4f}<extra></extra>`,
  });
  chart.losses.push(...y.filter((value) => value !== null));
  if (averaged.some((value) => value !== null)) {
    const hovertemplate = `${label}average of the weights<br>step %{customdata:,}<br>${unit} %{y:.4f}<extra></extra>`;
    const thin = { ...line, width: 1.4, color: several ? line.color : colour(2), dash: "dot" };
    traces.push({
      x, y: averaged, customdata: val[0], name: `${label}average`, showlegend: true, mode: "lines", line: thin, hovertemplate,
    });
    chart.losses.push(...averaged.filter((value) => value !== null));
  }
  const best = facts.val.findIndex((row) => row[0] === facts.best);
  if (best >= 0 && y[best] !== null) {
    const lowest = facts.lowest[bits ? 1 : 0];
    traces.push(star(x[best], lowest, facts.best, label, line.color));
    const whose = facts.lowest_is_average ? " by the average of the weights" : "";
    words.push(`${prefix}lowest validation ${unit} ${number(lowest)} at step ${integer(facts.best)}${whose}`);
  }
  if (facts.overfits_since !== null) {
    words.push(`${prefix}overfits since step ${integer(facts.overfits_since)}`);
    if (!several) region(run, chart.shapes, chart.annotations);
  }
}
function training(columns, label, line, several) { // the smoothed curve over the recorded one
  const x = along(columns), y = columns[COLUMN.loss], weight = Number($("smoothing").value);
  const thin = { color: line.color, width: 1 }, hover = "loss %{customdata[1]:.4f} (smoothed %{y:.4f})";
  const under = { x, y, mode: "lines", line: thin, opacity: 0.25, hoverinfo: "skip", showlegend: false };
  const over = {
    x, y: smooth(y, weight), customdata: turned([columns[COLUMN.step], y], y.length), mode: "lines",
    line: { ...line, width: 1.6 },
    opacity: several ? 0.75 : 1, name: `${label}training`, showlegend: true,
    hovertemplate: `${label}training<br>step %{customdata[0]:,}<br>${hover}<extra></extra>`,
  };
  return weight > 0 ? [under, over] : [over];
}
function star(x, y, step, label, color) {
  return {
    x: [x], y: [y], mode: "markers+text", showlegend: false, text: [`best ${number(y)}`], textposition: "top center",
    textfont: { color }, marker: { symbol: "star", size: 17, color, line: { color: css("--card"), width: 1.5 } },
    cliponaxis: false, hovertemplate: `${label}best<br>step ${integer(step)}<br>%{y:.4f}<extra></extra>`,
  };
}
function band([steps, mean, half]) {
  const upper = mean.map((m, k) => m + half[k]), lower = mean.map((m, k) => m - half[k]);
  return {
    x: [...steps, ...[...steps].reverse()], y: [...upper, ...lower.reverse()], mode: "lines", line: { width: 0 },
    fill: "toself", fillcolor: dark.matches ? "rgba(124,188,240,.18)" : "rgba(0,80,143,.14)", hoverinfo: "skip",
    name: "reference band", showlegend: true,
  };
}
function region(run, shapes, annotations) { // adds the region of overfitting
  const from = place(run, run.facts.overfits_since), to = place(run, run.pace.step), color = css("--warm");
  const edge = { xref: "x", yref: "paper", x0: from, y0: 0, y1: 1 };
  shapes.push({ type: "rect", ...edge, x1: to, fillcolor: color, opacity: 0.09, line: { width: 0 }, layer: "below" });
  shapes.push({ type: "line", ...edge, x1: from, line: { color, width: 1, dash: "dash" }, layer: "below" });
  annotations.push({
    x: $("xscale").value === "log" ? Math.log10(Math.max(from, 1e-9)) : from, y: 1, xref: "x", yref: "paper",
    text: "overfitting", showarrow: false, xanchor: "left", yanchor: "top", xshift: 4, yshift: -4, font: { color },
  });
}
function marks(log, shapes, annotations) { // adds the landmarks, and returns their losses
  const all = new Map(knownRuns().flatMap((run) => run.facts.landmarks).map((mark) => [mark.loss, mark]));
  const room = wide() && all.size <= 3; // those of several vocabularies are close together
  const sorted = [...all.values()].sort((a, b) => b.loss - a.loss), apart = 0.05 * (sorted[0]?.loss || 0);
  let named = Infinity; // the last landmark with a label, so that labels do not overlap
  for (const mark of sorted) {
    const line = { color: css("--soft"), width: 1, dash: "dot" };
    const words = `${mark.name} = ${mark.loss.toFixed(2)}${room ? `<br>${mark.meaning}` : ""}`;
    shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: mark.loss, y1: mark.loss, line, layer: "below" });
    if (named - mark.loss < apart) continue;
    named = mark.loss;
    annotations.push({ // beside the chart, where no curve crosses it
      xref: "paper", x: 1, xshift: 4, y: log ? Math.log10(mark.loss) : mark.loss, xanchor: "left", yanchor: "middle",
      text: wide() ? words : mark.name, align: "left", showarrow: false,
      font: { color: css("--soft"), size: 11 },
    });
  }
  return [...all.keys()];
}

function drawOne(id, key, common, hover, yaxis, label) {
  const words = [], traces = knownRuns().filter((run) => run.curves[key]).map((run) => {
    const i = knownRuns().indexOf(run), columns = run.curves[key], last = columns[COLUMN[key]].at(-1);
    if (last !== undefined) words.push(`${run.facts.name} ${last.toPrecision(3)}`);
    return {
      x: along(columns), y: columns[COLUMN[key]], customdata: columns[COLUMN.step], mode: "lines",
      line: { color: colour(i), width: 1.4, dash: DASHES[i % DASHES.length] },
      hovertemplate: `${escapeForPlotly(run.facts.name)}<br>step %{customdata:,}<br>${hover}<extra></extra>`,
    };
  });
  draw(id, traces, { ...common, yaxis }, `${label}, latest ${words.join(", ")}`);
}

function drawRate(common) { // the past thick, the future thin, and a marker at the current step
  const traces = [], words = [];
  knownRuns().forEach((run, i) => {
    const { facts, pace } = run, past = run.curves.loss, line = { color: colour(i), dash: DASHES[i % DASHES.length] };
    const muon = facts.muon_ratio; // Muon's rate is that many times AdamW's, which the curve shows
    const shown = muon ? "AdamW %{y:.3e}<br>Muon %{text}" : "learning rate %{y:.3e}";
    const hovertemplate = `${escapeForPlotly(facts.name)}<br>step %{customdata:,}<br>${shown}<extra></extra>`;
    const text = (y) => (muon ? y.map((lr) => (muon * lr).toExponential(3)) : undefined);
    const add = (x, y, steps, look) => traces.push({ x, y, customdata: steps, text: text(y), hovertemplate, ...look });
    const [steps, rates] = turned(facts.schedule.filter(([step]) => step >= (pace.step || 0)), 2);
    add(steps.map((step) => place(run, step)), rates, steps, { mode: "lines", line: { ...line, width: 1 } });
    if (!past || !past[0].length) return;
    const x = along(past), y = past[COLUMN.lr], symbol = MARKERS[i % MARKERS.length];
    add(x, y, past[0], { mode: "lines", line: { ...line, width: 3 } });
    const here = { mode: "markers", marker: { color: line.color, size: 9, symbol } };
    add(x.slice(-1), y.slice(-1), past[0].slice(-1), here);
    words.push(`${facts.name} ${Number(y.at(-1)).toPrecision(3)}`);
  });
  const yaxis = { exponentformat: "e", rangemode: "tozero" };
  draw("lr-chart", traces, { ...common, yaxis }, `Learning rate, latest ${words.join(", ")}`);
}
