// Format text, numbers and colours. What comes from a run is inserted as text, never as HTML. Plotly interprets some
// HTML in names, so it gets them escaped (`escapeForPlotly`).

export const $ = (id) => document.getElementById(id);

export function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = showControls(text);
  if (className) made.className = className;
  return made;
}

// replaces control characters, and those that reverse the direction of text, by symbols
export function showControls(text) {
  return String(text)
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g, "\ufffd");
}

const SIGNS = { "\n": " ", "\t": " ", "&": "&amp;", "<": "&lt;", ">": "&gt;", $: "&#36;", "%": "&#37;" };
export const escapeForPlotly = (text) => showControls(text).slice(0, 60).replace(/[\n\t&<>$%]/g, (c) => SIGNS[c]);

export const integer = (x) => (x == null ? "–" : Math.round(x).toLocaleString("en"));
export const number = (x, digits = 3) => (x == null ? "–" : Number(x).toFixed(digits));
export function rate(x) { // formats a learning rate
  if (x === 0) return "0";
  return x >= 0.001 ? String(Number(x.toPrecision(3))) : x.toExponential(2).replace(/\.?0+e/, "e");
}
export function duration(s) {
  if (s == null) return "–";
  if (s < 60) return `${Math.round(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

// Runs differ by colour, dash and marker. LIGHT and DARK begin with the colours of page.css and of report/report.css;
// record/chart_style.py has the same palette for pictures. Change the colours together.
export const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
export const MARKERS = ["circle", "square", "triangle-up", "diamond", "cross", "x"];
export const SIGN = ["●", "■", "▲", "◆", "✚", "✖"]; // the markers, as text
const LIGHT = ["#00508f", "#b04a0c", "#007a5a", "#a03070", "#6a5acd", "#7a5d10"];
const DARK = ["#7cbcf0", "#f0a060", "#5fd0a8", "#f08fc0", "#b3a8ff", "#e0c060"];
export const dark = matchMedia("(prefers-color-scheme: dark)");
export const colour = (i) => (dark.matches ? DARK : LIGHT)[i % LIGHT.length];
export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// sets the choices of a select, [value, words] each; the selected one stays selected if it is still there
export function setChoices(select, pairs) {
  const now = JSON.stringify(pairs);
  if (select.dataset.pairs === now) return;
  const before = select.value;
  select.dataset.pairs = now;
  select.replaceChildren(...pairs.map(([value, words]) => {
    const option = element("option", words);
    option.value = value;
    return option;
  }));
  if (pairs.some(([value]) => String(value) === before)) select.value = before;
}

export function tableRow(cells, heads = 0) { // returns a row of a table; its first `heads` cells are headings
  const row = element("tr");
  row.append(...cells.map((text, i) => element(i < heads ? "th" : "td", text)));
  for (const head of row.querySelectorAll("th")) head.scope = heads > 1 ? "col" : "row";
  return row;
}
