"use strict";
// One chart: lines or stacked areas over steps, with a legend that turns into a readout under the pointer or the arrows.
const make = (name, attributes = {}, ...children) => {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};
const makeSvg = (name, attributes = {}, ...children) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};
const readData = (id) => JSON.parse(document.getElementById(id).textContent);

const DASHES = ["", "7 3", "2 2.5", "9 3 2 3"];
const look = (index) => ({ style: `--c:var(--c${index % 8})`, dash: DASHES[index % 4] });

const showNumber = (value) => {
  if (value === undefined || value === null) return "–";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : Number(value.toPrecision(3)).toString();
  return text.replaceAll("-", "−").replace("+", "");
};

const ticksOf = (low, high, count) => {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
};

const nearest = (xs, x) => {
  let best = 0;
  for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - x) < Math.abs(xs[best] - x)) best = i;
  return best;
};

const stackUp = (series) => {
  const below = series[0].x.map(() => 0);
  return series.map((one) => ({ ...one, base: below.slice(), top: one.y.map((y, i) => (below[i] += y)) }));
};

const rangeOf = (series, stacked) => {
  const ys = series.flatMap((one) => (stacked ? one.top : one.y)), xs = series.flatMap((one) => one.x);
  let low = stacked ? 0 : ys.reduce((a, b) => Math.min(a, b)), high = ys.reduce((a, b) => Math.max(a, b));
  if (high - low < 1e-12 + 1e-6 * Math.abs(high)) { const pad = Math.abs(high) * 0.1 || 1; low -= pad; high += pad; }
  else { const pad = (high - low) * 0.06; high += pad; if (!stacked) low = low >= 0 && low < 2 * pad ? 0 : low - pad; }
  const first = Math.min(...xs), last = Math.max(...xs);
  return { low, high, first, last: last > first ? last : first + 1 };
};

// spec: {title, unit, stacked, series: [{label, x, y, index}]}. peers: charts that show the same step together.
function drawChart(box, spec, peers = []) {
  if (!box.clientWidth) return; // folded away; drawn when it is opened
  const series = spec.stacked ? stackUp(spec.series) : spec.series;
  const readout = make("div", { class: "readout" });
  box.replaceChildren(readout);
  const keys = series.map((one) => legendKey(one, spec.stacked));
  const when = make("span");
  readout.append(when, ...keys.map((key) => key.span));
  const width = box.clientWidth - (box.classList.contains("big") ? 26 : 0);
  const height = Math.max(90, box.clientHeight - readout.offsetHeight - (box.classList.contains("big") ? 18 : 2));
  const range = rangeOf(series, spec.stacked);
  const left = 46, right = width - 8, top = 18, bottom = height - 30;
  const px = (x) => left + ((x - range.first) / (range.last - range.first)) * (right - left);
  const py = (y) => bottom - ((y - range.low) / (range.high - range.low)) * (bottom - top);
  const svg = makeSvg("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: "0", role: "img", "aria-label": `${spec.title}, ${spec.unit} over steps: ${series.map((one) => one.label).join(", ")}. Arrow keys read the values.` });
  drawAxes(svg, range, px, py, { left, right, top, bottom, unit: spec.unit });
  series.forEach((one) => svg.append(...marks(one, px, py, spec.stacked)));
  const cross = makeSvg("line", { class: "cross", y1: top, y2: bottom, visibility: "hidden" });
  const dots = series.map((one) => makeSvg("circle", { class: "dot", r: 3.2, style: look(one.index).style, visibility: "hidden" }));
  svg.append(cross, ...dots);
  box.append(svg);
  const show = (x) => {
    const over = x !== null;
    const at = over ? x : range.last;
    when.textContent = `step ${Math.round(at)}`;
    cross.setAttribute("visibility", over ? "visible" : "hidden");
    cross.setAttribute("x1", px(at)); cross.setAttribute("x2", px(at));
    series.forEach((one, i) => {
      const place = nearest(one.x, at), close = Math.abs(one.x[place] - at) <= (range.last - range.first) / 50 + 0.5 || !over;
      keys[i].value.textContent = close ? showNumber(one.y[place]) : "–";
      dots[i].setAttribute("visibility", over && close ? "visible" : "hidden");
      dots[i].setAttribute("cx", px(one.x[place])); dots[i].setAttribute("cy", py(spec.stacked ? one.top[place] : one.y[place]));
    });
  };
  peers.push({ show });
  const showAll = (x) => peers.forEach((peer) => peer.show(x));
  listen(svg, series, range, { left, right, width, showAll });
  show(null);
}

function legendKey(one, stacked) {
  const { style, dash } = look(one.index);
  const mark = stacked ? makeSvg("rect", { width: 18, height: 8 }) : makeSvg("line", { x1: 0, x2: 20, y1: 4, y2: 4, "stroke-dasharray": dash });
  const value = make("b", {}, "–");
  return { value, span: make("span", {}, makeSvg("svg", { class: "key", viewBox: "0 0 20 8", style, "aria-hidden": "true" }, mark), `${one.label} `, value) };
}

function drawAxes(svg, range, px, py, { left, right, top, bottom, unit }) {
  svg.append(makeSvg("text", { class: "unit", x: 0, y: top - 8 }, unit));
  svg.append(makeSvg("text", { class: "unit", x: right, y: bottom + 26, "text-anchor": "end" }, "step of the stage"));
  svg.append(makeSvg("path", { class: "axis", d: `M${left} ${top}V${bottom}H${right}` }));
  for (const tick of ticksOf(range.low, range.high, (bottom - top) / 38)) {
    svg.append(makeSvg("path", { class: "axis", d: `M${left} ${py(tick)}H${right}` }));
    svg.append(makeSvg("text", { x: left - 6, y: py(tick) + 3.5, "text-anchor": "end" }, showNumber(tick)));
  }
  for (const tick of ticksOf(range.first, range.last, (right - left) / 45)) {
    if (Number.isInteger(tick)) svg.append(makeSvg("text", { x: px(tick), y: bottom + 14, "text-anchor": "middle" }, String(tick)));
  }
}

function marks(one, px, py, stacked) {
  const { style, dash } = look(one.index);
  const along = (ys) => one.x.map((x, i) => `${px(x).toFixed(1)} ${py(ys[i]).toFixed(1)}`);
  if (stacked) {
    return [makeSvg("path", { class: "area", style, d: `M${along(one.top).join("L")}L${along(one.base).reverse().join("L")}Z` })];
  }
  const line = makeSvg("path", { class: "line", style, "stroke-dasharray": dash, d: `M${along(one.y).join("L")}` });
  const few = one.x.length <= 12 ? one.x.map((x, i) => makeSvg("circle", { class: "dot", r: 2.4, style, cx: px(x), cy: py(one.y[i]) })) : [];
  return [line, ...few];
}

function listen(svg, series, range, { left, right, width, showAll }) {
  const steps = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
  let here = steps.length - 1;
  const at = (event) => {
    const frame = svg.getBoundingClientRect(), x = ((event.clientX - frame.left) / frame.width) * width;
    here = nearest(steps, range.first + ((x - left) / (right - left)) * (range.last - range.first));
    showAll(steps[here]);
  };
  svg.addEventListener("pointermove", at);
  svg.addEventListener("pointerdown", at);
  svg.addEventListener("pointerleave", () => showAll(null));
  svg.addEventListener("blur", () => showAll(null));
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: steps.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    here = Math.min(steps.length - 1, Math.max(0, moves[event.key]));
    showAll(steps[here]);
  });
}
