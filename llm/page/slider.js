// The sliders of a schedule: warm-up, peak, floor, total steps, shape and cool-down; with its curve, its table and its flags.

import { $, colour, element, integer, rate, tableRow } from "./words.js";
import { draw, turned } from "./charts.js";

const TOTALS = [100, 1e6], PEAKS = [1e-6, 1e-1]; // ranges of the logarithmic sliders
const along = ([low, high], t) => low * (high / low) ** (t / 100);
const back = ([low, high], v) => {
  const inside = Math.min(high, Math.max(low, v));
  return Math.round((100 * Math.log(inside / low)) / Math.log(high / low));
};
const twoDigits = (x) => Number(x.toPrecision(2));
const at = (id) => Number($(id).value);
let exact = {}; // the run's own settings, until their slider is moved: a slider's position is rounded

function chosen() {
  const total = exact.total ?? twoDigits(along(TOTALS, at("total")));
  const peak = exact.peak ?? twoDigits(along(PEAKS, at("peak")));
  const warmup = exact.warmup ?? Math.min(Math.round((total * at("warmup")) / 500), total - 1); // 0 to 20 %
  const floor = exact.floor ?? twoDigits((peak * at("floor")) / 100);
  const values = { max_steps: total, max_lr: peak, schedule: $("shape").value, warmup_steps: warmup, min_lr: floor };
  return values.schedule === "wsd" ? { ...values, decay_fraction: exact.cooldown ?? at("cooldown") / 100 } : values;
}

export function setSlider(knobs) { // sets the sliders to a run's schedule
  exact = { ...knobs };
  $("shape").value = knobs.shape;
  $("total").value = back(TOTALS, knobs.total);
  $("peak").value = back(PEAKS, knobs.peak);
  $("warmup").value = Math.round((500 * knobs.warmup) / knobs.total);
  $("floor").value = Math.round((100 * knobs.floor) / knobs.peak);
  $("cooldown").value = Math.round(100 * knobs.cooldown);
  $("muon-words").textContent = knobs.muon_lr
    ? `This is AdamW’s rate. The matrices that Muon updates follow the same curve up to their own peak, --muon_lr ${knobs.muon_lr}.`
    : "";
  drawSlider();
}

let asked = 0;
export async function drawSlider() {
  const number = ++asked, values = chosen(), share = (100 * values.warmup_steps) / values.max_steps;
  const words = {
    warmup: `${integer(values.warmup_steps)} steps, ${Number(share.toPrecision(2))} %`, peak: rate(values.max_lr),
    floor: rate(values.min_lr), total: `${integer(values.max_steps)} steps`,
    cooldown: `${Number((100 * (values.decay_fraction ?? 0)).toPrecision(3))} %`,
  };
  $("cooldown-label").hidden = values.schedule !== "wsd";
  for (const [id, text] of Object.entries(words)) {
    document.querySelector(`output[for=${id}]`).textContent = text;
    $(id).setAttribute("aria-valuetext", text);
  }
  let found;
  try {
    found = await (await fetch(`schedule?${new URLSearchParams(values)}`)).json();
  } catch {
    return; // the server has stopped, which #connection says
  }
  if (number !== asked) return;
  $("schedule-warning").textContent = found.error || found.warning || "";
  if (found.error) return;
  const flags = found.flags.split(" --").map((flag, i) => element("span", i ? `--${flag}` : flag)); // each on one line
  $("flags").replaceChildren(...flags.flatMap((flag, i) => (i ? [" ", flag] : [flag])));
  $("schedule-table").tBodies[0].replaceChildren(...found.table.map(([step, lr]) => tableRow([integer(step), rate(lr)])));
  const [x, y] = turned(found.curve, 2), hovertemplate = "step %{x:,}<br>learning rate %{y:.3e}<extra></extra>";
  const layout = { xaxis: { title: { text: "step" } }, yaxis: { exponentformat: "e", rangemode: "tozero" } };
  const trace = { x, y, mode: "lines", line: { color: colour(0), width: 2.4 }, hovertemplate };
  draw("schedule-chart", [trace], layout, `Learning rate of the schedule ${found.flags}`, { displayModeBar: false });
}

for (const id of ["warmup", "peak", "floor", "total", "cooldown"]) {
  $(id).oninput = () => {
    delete exact[id];
    if (id === "total") delete exact.warmup;
    if (id === "peak") delete exact.floor;
    drawSlider();
  };
}
$("shape").onchange = drawSlider;
$("copy").onclick = async () => {
  try {
    await navigator.clipboard.writeText($("flags").textContent);
    $("copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren($("flags"));
    $("copy").textContent = "Selected";
  }
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
};
