"use strict";
// Shows the values of the charts at a step, and zooms. Without this script the charts are still there.
{
  const numbers = JSON.parse(document.getElementById("numbers").textContent);
  const byId = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const charts = [...document.querySelectorAll(".chart")].map((figure) => ({
    figure,
    name: figure.dataset.chart,
    frame: figure.querySelector(".frame"),
    curves: figure.querySelector(".curves"),
    ticks: figure.querySelector(".ticks"),
    guide: figure.querySelector(".guide"),
    words: figure.querySelector("output"),
    low: +figure.dataset.low,
    high: +figure.dataset.high,
    data: numbers[figure.dataset.chart],
  }));
  const end = charts.length ? +charts[0].figure.dataset.end : 0;
  const whole = [-0.01 * end, 1.01 * end];
  let view = whole;  // the steps in view
  let used = false;  // whether the reader has selected a step

  // the positions of the slider: every recorded step
  const steps = [...new Set(charts.flatMap((chart) => Object.values(chart.data).flatMap(([x]) => x)))].sort((a, b) => a - b);
  const slider = byId("step");

  function nearest(sorted, value) {
    let low = 0, high = sorted.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < value) low = middle; else high = middle;
    }
    return Math.abs(sorted[low] - value) <= Math.abs(sorted[high] - value) ? low : high;
  }

  function ticks(low, high, count) {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((k) => k * power).find((size) => size >= raw * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step); i <= Math.floor(high / step); i++) found.push(+(i * step).toPrecision(10));
    return found;
  }

  const format = (value) =>
    Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(6));
  const across = (step) => 100 * (step - view[0]) / (view[1] - view[0]);

  function element(name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // returns the range of values that a chart shows: all of it, or for the losses those of the steps in view
  function heights(chart) {
    if (chart.name !== "loss" || view === whole) return [chart.low, chart.high];
    const shown = Object.values(chart.data).flatMap(([x, y]) => y.filter((_, i) => x[i] >= view[0] && x[i] <= view[1]));
    if (!shown.length) return [chart.low, chart.high];
    const low = Math.min(...shown), high = Math.min(Math.max(...shown), chart.high);
    const room = 0.08 * (high - low) || 0.05;
    return [low - room, high + room];
  }

  function draw(chart) {
    const [low, high] = heights(chart), wide = whole[1] - whole[0], tall = chart.high - chart.low;
    const down = (value) => 100 * (high - value) / (high - low);
    const box = [view[0] - whole[0], chart.high - high, view[1] - view[0], high - low];
    chart.curves.setAttribute("viewBox", box.map((size, i) => +(1000 * size / (i % 2 ? tall : wide)).toPrecision(9)).join(" "));
    chart.ticks.replaceChildren(
      ...ticks(low, high, 5).map((value) => {
        const tick = element("svg", { class: "tick y", y: `${down(value)}%` });
        tick.append(element("line", { x2: "100%" }), element("text", { x: -8, dy: ".35em" }, format(value)));
        return tick;
      }),
      ...ticks(Math.max(0, view[0]), Math.min(end, view[1]), 5).filter(Number.isInteger).map((step) => {
        const tick = element("svg", { class: "tick x", x: `${across(step)}%` });
        tick.append(element("line", { y2: "100%" }), element("text", { y: "100%", dy: "1.5em" }, format(step)));
        return tick;
      }),
    );
    for (const label of chart.frame.querySelectorAll(".at")) {
      const { x, y } = label.dataset, places = [];
      if (x !== undefined) places.push(["x", across(+x)]);
      if (y !== undefined) places.push(["y", down(+y)]);
      for (const [key, place] of places) label.setAttribute(key, `${place}%`);
      const gone = places.some(([, place]) => place < 0 || place > 100) || ("end" in label.dataset && view !== whole);
      label.toggleAttribute("hidden", gone);
    }
  }

  function showValues() {
    const step = steps[+slider.value];
    byId("place").textContent = step.toLocaleString("en");
    for (const chart of charts) {
      const place = across(step);
      chart.guide.setAttribute("x", `${place}%`);
      chart.guide.toggleAttribute("hidden", !used || place < 0 || place > 100);
      chart.words.textContent = Object.entries(chart.data).filter(([, [x]]) => x.length).map(([name, [x, y]]) => {
        const i = nearest(x, step), value = chart.name === "loss" ? y[i].toFixed(4) : format(y[i]);
        return (chart.name === "loss" ? `${name} ${value}` : value) + (x[i] === step ? "" : ` (step ${format(x[i])})`);
      }).reverse().join(", ");
    }
    slider.setAttribute("aria-valuetext", `step ${step}: ${charts[0].words.textContent}`);
  }

  function zoomTo(left, right) {
    const size = Math.max(right - left, Math.min(4, whole[1] - whole[0]));
    left = Math.min(Math.max(left, whole[0]), whole[1] - size);
    view = size >= 0.999 * (whole[1] - whole[0]) ? whole : [left, left + size];
    byId("whole").disabled = byId("out").disabled = view === whole;
    charts.forEach(draw);
    showValues();
  }

  // zooms around the selected step, which keeps its place
  function zoom(factor) {
    const step = Math.min(Math.max(steps[+slider.value], view[0]), view[1]);
    zoomTo(step - (step - view[0]) * factor, step + (view[1] - step) * factor);
  }

  if (steps.length > 1) {
    slider.max = steps.length - 1;
    slider.value = steps.length - 1;
    slider.addEventListener("input", () => { used = true; showValues(); });
    byId("in").addEventListener("click", () => zoom(0.5));
    byId("out").addEventListener("click", () => zoom(2));
    byId("whole").addEventListener("click", () => zoomTo(...whole));
    document.querySelector(".controls").hidden = document.querySelector(".hint").hidden = false;
    for (const chart of charts) {
      let from = null;
      const picked = element("rect", { class: "picked", height: "100%", width: 0 });
      const stepAt = (event) => {
        const box = chart.frame.getBoundingClientRect();
        const share = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
        return view[0] + share * (view[1] - view[0]);
      };
      chart.frame.append(picked);
      chart.frame.prepend(element("rect", { width: "100%", height: "100%", "fill-opacity": 0 }));
      chart.frame.addEventListener("pointerdown", (event) => {
        if (event.pointerType === "mouse" && event.button === 0) {
          from = stepAt(event);
          chart.frame.setPointerCapture(event.pointerId);
          event.preventDefault();
        }
      });
      chart.frame.addEventListener("pointermove", (event) => {
        const step = stepAt(event);
        slider.value = nearest(steps, step);
        used = true;
        showValues();
        if (from !== null) {
          picked.setAttribute("x", `${across(Math.min(from, step))}%`);
          picked.setAttribute("width", `${Math.abs(across(step) - across(from))}%`);
        }
      });
      chart.frame.addEventListener("pointerup", (event) => {
        const to = stepAt(event), start = from;
        from = null;
        picked.setAttribute("width", 0);
        if (start !== null && Math.abs(across(to) - across(start)) > 2) zoomTo(Math.min(start, to), Math.max(start, to));
      });
      chart.frame.addEventListener("pointercancel", () => { from = null; picked.setAttribute("width", 0); });
      chart.frame.addEventListener("dblclick", () => zoomTo(...whole));
    }
    showValues();
  }

  // for printing, open all details
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const details of closed) details.open = true;
  });
  addEventListener("afterprint", () => { for (const details of closed) details.open = false; });
}
