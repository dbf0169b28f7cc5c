"use strict";
// Draws the cards of a report into the page, at its width. `report` is the JSON that report_run.py put there.
const report = JSON.parse(document.getElementById("report").textContent);
const HEIGHT = 190, LEFT = 52, RIGHT = 12, TOP = 8, BOTTOM = 32;
const color = (i) => `var(--c${i % 7})`;

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function shape(name, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

function format(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2).replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(4)));
}

function short(tokens) {
  if (tokens >= 2 ** 20 && tokens % 2 ** 20 === 0) return `${tokens / 2 ** 20}M`;
  return tokens >= 1024 && tokens % 1024 === 0 ? `${tokens / 1024}K` : format(tokens);
}

/** Return round values for the marks of an axis; between whole ends, such as iterations, only whole ones. */
function ticks(low, high, count) {
  const whole = Number.isInteger(low) && Number.isInteger(high), rough = Math.max((high - low) / count, whole ? 1 : 0);
  const power = 10 ** Math.floor(Math.log10(rough)), steps = whole && power === 1 ? [1, 2, 5, 10] : [1, 2, 2.5, 5, 10];
  const step = power * steps.find((each) => each * power >= rough);
  const values = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) values.push(value);
  return values.map((value) => Number(value.toPrecision(12)));
}

/** Return the range of values with some room; a constant gets room around it. */
function range(values) {
  const low = Math.min(...values), high = Math.max(...values), room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}

/** Create an SVG of the card's width with axes; returns it with the functions from values to pixels. */
function axes(plot, xs, ys, label, { log = false, rows = null, height = HEIGHT, unit = format } = {}) {
  const width = Math.max(plot.clientWidth, 220), left = rows ? 116 : LEFT;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height });
  const place = (value) => (!log ? value : value < log ? value / log : 1 + Math.log2(value / log));
  const x = (value) => left + ((place(value) - place(xs[0])) / (place(xs[1]) - place(xs[0]) || 1)) * (width - left - RIGHT);
  const y = (value) => height - BOTTOM - ((value - ys[0]) / (ys[1] - ys[0] || 1)) * (height - TOP - BOTTOM);
  for (const value of rows ? [] : ticks(ys[0], ys[1], 5)) {
    svg.append(shape("line", { class: "grid", x1: left, x2: width - RIGHT, y1: y(value), y2: y(value) }));
    svg.append(shape("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, format(value)));
  }
  const marks = log ? powers(xs, log) : ticks(xs[0], xs[1], width / 80);
  let free = -Infinity;
  for (const value of marks) {
    if (x(value) < free) continue;
    svg.append(shape("line", { class: "grid", x1: x(value), x2: x(value), y1: height - BOTTOM, y2: height - BOTTOM + 4 }));
    svg.append(shape("text", { x: x(value), y: height - 16, "text-anchor": "middle" }, (log ? short : unit)(value)));
    free = x(value) + 40;
  }
  svg.append(shape("text", { x: (left + width - RIGHT) / 2, y: height - 2, "text-anchor": "middle" }, label));
  plot.append(svg);
  return { svg, x, y, width, height };
}

function powers([low, high], first) {
  const values = low === 0 ? [0] : [];
  for (let value = first; value <= high; value *= 2) if (value >= low) values.push(value);
  return values;
}

/** Show what `describe` returns for the pointer's place, [x in pixels, text] or null, beside a vertical line. */
function hover(plot, { svg, width, height }, describe) {
  const tip = element("div", { class: "tip" });
  const line = shape("line", { class: "cursor", y1: TOP, y2: height - BOTTOM });
  svg.append(line);
  plot.append(tip);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const found = describe(((event.clientX - box.left) / box.width) * width, event.clientY - box.top);
    tip.style.display = found ? "block" : "none";
    line.style.visibility = found ? "visible" : "hidden";
    if (!found) return;
    line.setAttribute("x1", found[0]);
    line.setAttribute("x2", found[0]);
    tip.textContent = found[1];
    tip.style.left = `${found[0] > width / 2 ? found[0] - tip.offsetWidth - 10 : found[0] + 10}px`;
    tip.style.top = "10px";
  });
  svg.addEventListener("pointerleave", () => {
    tip.style.display = "none";
    line.style.visibility = "hidden";
  });
}

function legend(plot, names) {
  if (names.length < 2) return;
  const entries = names.map((name, i) => element("span", {}, element("i", { style: `background: ${color(i)}` }), name));
  plot.before(element("div", { class: "legend" }, ...entries));
}

function nearest(points, value, place) {
  return points.reduce((best, point) => (Math.abs(place(point[0]) - value) < Math.abs(place(best[0]) - value) ? point : best));
}

const draw = {
  lines(plot, card) {
    const points = card.series.flatMap((each) => each.points);
    const xs = points.map((point) => point[0]);
    const ys = range(points.map((point) => point[1])), first = Math.min(...xs);
    const view = axes(plot, [first, Math.max(...xs)], ys, card.x, card.log ? { log: first } : {});
    card.series.forEach((each, i) => {
      const path = each.points.map(([x, y]) => `${view.x(x)},${view.y(y)}`).join(" ");
      view.svg.append(shape("polyline", { points: path, fill: "none", stroke: color(i), "stroke-width": 1.8 }));
      if (!each.dots && each.points.length > 1) return;
      for (const [x, y] of each.points) view.svg.append(shape("circle", { cx: view.x(x), cy: view.y(y), r: 3, fill: color(i) }));
    });
    for (const mark of card.marks || []) {
      for (const x of mark.iterations) {
        const text = shape("text", { x: view.x(x), y: HEIGHT - BOTTOM - 4, "text-anchor": "middle", style: "fill: var(--bad)" }, "×");
        text.append(shape("title", {}, `${mark.label}, iteration ${x}`));
        view.svg.append(text);
      }
    }
    legend(plot, card.series.map((each) => each.name));
    hover(plot, view, (pointer) => {
      const at = nearest(points, pointer, view.x)[0];
      const here = card.series.map((each) => [each.name, nearest(each.points, view.x(at), view.x)]);
      const lines = here.map(([name, [x, y]]) => `${name} ${format(y)}${x === at ? "" : ` (at ${format(x)})`}`);
      return [view.x(at), [`${card.x} ${format(at)}`, ...lines].join("\n")];
    });
  },

  steps(plot, card) {
    const points = card.series.flatMap((each) => each.points), first = points[0];
    const xs = [Math.min(...points.map((p) => p[0])), Math.max(...points.map((p) => p[1]))];
    const even = Math.max(...points.map((p) => p[1] - p[0])) < 2 * (first[1] - first[0]);
    const options = even ? {} : { log: first[1] };
    const view = axes(plot, xs, range(points.map((p) => p[2])), "position in the context (tokens)", options);
    const last = card.series.length - 1;
    card.series.forEach((each, i) => {
      const path = each.points.flatMap(([from, to, loss]) => [`${view.x(from)},${view.y(loss)}`, `${view.x(to)},${view.y(loss)}`]);
      const style = { stroke: color(i), "stroke-width": i === last ? 2.4 : 1.4 };
      view.svg.append(shape("polyline", { points: path.join(" "), fill: "none", ...style }));
    });
    legend(plot, card.series.map((each) => each.name));
    hover(plot, view, (pointer) => {
      const bucket = first && card.series[last].points.find(([from, to]) => pointer >= view.x(from) && pointer < view.x(to));
      if (!bucket) return null;
      const lines = card.series.map((each) => [each.name, each.points.find((p) => p[0] === bucket[0])]);
      const middle = (view.x(bucket[0]) + view.x(bucket[1])) / 2;
      const text = lines.filter(([, point]) => point).map(([name, point]) => `${name}: ${format(point[2])}`);
      return [middle, [`positions ${format(bucket[0])} to ${format(bucket[1] - 1)}`, ...text].join("\n")];
    });
  },

  timeline(plot, card) {
    const end = Math.max(...card.lanes.flatMap((lane) => lane.spans.map((span) => span[1])));
    const height = card.lanes.length * 26 + TOP + BOTTOM, row = (i) => TOP + i * 26;
    const view = axes(plot, [0, end], [0, 1], "seconds", { rows: card.lanes, height });
    card.lanes.forEach((lane, i) => {
      view.svg.append(shape("text", { x: 110, y: row(i) + 16, "text-anchor": "end" }, lane.name));
      const path = lane.spans.map(([a, b]) => `M${view.x(a)} ${row(i) + 3}H${Math.max(view.x(b), view.x(a) + 0.5)}v20H${view.x(a)}z`);
      view.svg.append(shape("path", { d: path.join(""), fill: color(i) }));
    });
    hover(plot, view, (pointer, y) => {
      const lane = card.lanes[Math.floor((y - TOP) / 26)];
      const span = lane && lane.spans.find(([a, b]) => pointer >= view.x(a) - 1 && pointer <= view.x(b) + 1);
      return span ? [pointer, `${lane.name}\n${format(span[1] - span[0])} s, from ${format(span[0])} s`] : null;
    });
  },

  bars(plot, card) {
    const total = (row) => row.parts.reduce((sum, part) => sum + part[1], 0), longest = Math.max(...card.rows.map(total));
    const names = [...new Set(card.rows.flatMap((row) => row.parts.map((part) => part[0])))];
    for (const row of card.rows) {
      const whole = card.stacked ? total(row) : longest;
      const fill = (name) => (card.stacked ? color(names.indexOf(name)) : color(0));
      const parts = row.parts.map(([name, value]) => {
        const style = `width: ${(100 * value) / whole}%; background: ${fill(name)}`;
        return element("i", { title: `${name}: ${format(value)} ${card.unit}`, style });
      });
      const sum = element("b", {}, `${format(total(row))} ${card.unit}`);
      plot.append(element("div", { class: "bar" }, element("span", {}, row.name), element("div", {}, ...parts), sum));
      if (!card.stacked) continue;
      const entries = row.parts.map(([name, value]) => {
        return element("span", {}, element("i", { style: `background: ${fill(name)}` }), `${name} ${format(value)}`);
      });
      plot.append(element("div", { class: "legend" }, ...entries));
    }
  },

  heat(plot, card) {
    const sorted = (i) => [...new Set(card.cells.map((cell) => cell[i]))].sort((a, b) => a - b);
    const lengths = sorted(0);
    const table = element("table", { class: "heat", style: `min-width: ${44 + 29 * lengths.length}px` });
    table.append(element("tr", {}, element("th"), ...lengths.map((length) => element("th", {}, short(length)))));
    for (const depth of sorted(1)) {
      const tr = element("tr", {}, element("th", {}, `${Math.round(100 * depth)}%`));
      for (const length of lengths) {
        const [, , accuracy, probability] = card.cells.find((cell) => cell[0] === length && cell[1] === depth) || [];
        const title = accuracy === undefined ? "" : `${length} tokens, depth ${Math.round(100 * depth)}%: ${format(accuracy)} of ${card.trials} right, probability ${format(probability)}`;
        tr.append(element("td", { title, style: `background: rgba(var(--found), ${0.06 + 0.6 * (accuracy || 0)})` }, accuracy === undefined ? "" : accuracy.toFixed(2)));
      }
      table.append(tr);
    }
    plot.append(element("div", { class: "scroll" }, table));
  },

  table(plot, card) {
    const row = (kind, cells) => element("tr", {}, ...cells.map((cell) => element(kind, {}, cell)));
    const table = element("table", { class: "numbers" }, row("th", card.head), ...card.rows.map((cells) => row("td", cells)));
    plot.append(element("div", { class: "scroll" }, table));
  },

  settings(plot, card) {
    const line = ([, name, value]) => element("div", {}, element("span", { class: "soft" }, name), element("span", {}, value));
    const given = card.rows.filter((row) => row[3]), rest = card.rows.filter((row) => !row[3]);
    plot.append(element("div", { class: "columns" }, ...given.map(line)));
    const more = element("summary", {}, `${rest.length} more, by default or derived`);
    plot.append(element("details", {}, more, element("div", { class: "columns" }, ...rest.map(line))));
  },
};

const filled = (card) => [card.series, card.rows, card.lanes, card.cells].some((content) => content && content.length);

function drawAll() {
  const main = document.querySelector("main"), open = document.querySelector("details[open]") !== null;
  main.replaceChildren();
  for (const card of [...report.cards.filter(filled), ...report.cards.filter((card) => !filled(card))]) {
    const title = [element("h2", {}, card.title), element("span", { class: "soft" }, filled(card) ? card.unit || "" : "")];
    const plot = element("div", { class: "plot" });
    main.append(element("section", card.wide && filled(card) ? { class: "wide" } : {}, element("header", {}, ...title), plot));
    if (filled(card)) draw[card.kind](plot, card);
    else plot.append(element("p", { class: "empty" }, `Nothing here yet. Filled by ${card.empty}.`));
  }
  if (open) document.querySelector("details")?.setAttribute("open", "");
}

for (const { label, value } of report.tiles) {
  document.querySelector(".tiles").append(element("div", { class: "tile" }, element("span", { class: "soft" }, label), element("b", {}, value)));
}
drawAll();
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) drawAll();
  width = innerWidth;
});
if (report.refresh) setTimeout(() => location.reload(), 1000 * report.refresh);
