// Learning curves and trends. A `Chart` draws its lines at the size it has, reads values out under the pointer or the
// arrow keys, and hides a line when its name in the legend is pressed. A trend's chart has a unit: its steps are what was
// varied, on a logarithmic axis, and its few points are marked.

const MARGIN = { top: 8, right: 18, bottom: 24, left: 50 };
const SMOOTH_FROM = 100; // points; shorter curves are smoothed only when asked

function formatValue(value) {
  if (value === null) return "not finite";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e6) return Number(value.toPrecision(3)).toExponential().replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

// Round numbers that part [low, high] in about `count`.
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough * 0.999);
  const found = []; // + 0 below makes 0 of -0
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1) found.push(n * step + 0);
  return found;
}

// The mean of the finite values around each point; none where the point itself is not finite.
function movingMean(values) {
  const reach = Math.max(1, Math.round(values.length / 60));
  return values.map((value, n) => {
    if (value === null) return null;
    const near = values.slice(Math.max(0, n - reach), n + reach + 1).filter((other) => other !== null);
    return near.reduce((total, other) => total + other, 0) / near.length;
  });
}

function nearest(steps, step) {
  let low = 0;
  let high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle;
    else high = middle;
  }
  return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
}

// Of ascending steps those that are far enough from the one before to be labelled; the last one always is.
function apart(steps, x) {
  const found = [];
  for (const step of steps.toReversed()) if (found.length === 0 || x(found[0]) - x(step) >= 36) found.unshift(step);
  return found;
}

class Chart {
  constructor({ title, lines, unit }, smooth) {
    this.unit = unit;
    this.lines = lines.map((line, n) => ({ ...line, n, visible: true, means: movingMean(line.values) }));
    this.smooth = smooth;
    this.step = null; // that is read out; null: the last one
    this.allSteps = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
    this.allPlaces = this.allSteps.map((step) => this.place(step));
    this.svg = shape("svg", { tabindex: 0, role: "img", "aria-label": `${title}, arrow keys read values out` });
    this.stepText = element("span", { class: "step" });
    this.spoken = element("span", { class: "visually-hidden", role: "status" });
    this.items = this.lines.map((line) => this.#legendItem(line));
    const head = element("figcaption", {}, element("h4", {}, title), this.stepText);
    const legend = element("ul", {}, ...this.items.map((item) => item.node));
    this.node = element("figure", { class: lines.length > 3 ? "chart wide" : "chart" }, head, this.svg, legend, this.spoken);
    this.#listen();
    this.readOut();
  }

  // Where a step lies along the axis.
  place(step) {
    return this.unit === null ? step : Math.log(step);
  }

  #legendItem(line) {
    const swatch = element("span", { class: "swatch" });
    swatch.style.setProperty("--colour", seriesColour(line.n));
    const value = element("span", { class: "value" });
    const button = element("button", { type: "button", "aria-pressed": "true" }, swatch, line.name, value);
    button.addEventListener("click", () => {
      line.visible = !line.visible;
      button.setAttribute("aria-pressed", String(line.visible));
      this.draw();
    });
    const gaps = line.not_finite ? element("span", { class: "gaps" }, `${line.not_finite} not finite`) : "";
    return { node: element("li", {}, button, gaps), value };
  }

  #listen() {
    this.svg.addEventListener("pointermove", (event) => {
      const { left, width } = this.svg.getBoundingClientRect();
      const share = (event.clientX - left - MARGIN.left) / (width - MARGIN.left - MARGIN.right);
      const [first, last] = [this.allPlaces[0], this.allPlaces.at(-1)];
      this.#moveTo(this.allSteps[nearest(this.allPlaces, first + share * (last - first))]);
    });
    this.svg.addEventListener("pointerleave", () => this.#moveTo(null));
    this.svg.addEventListener("blur", () => this.#moveTo(null));
    this.svg.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      const last = this.allSteps.length - 1;
      const stride = by * Math.max(1, Math.round(last / 50));
      const here = this.step === null ? last : nearest(this.allSteps, this.step);
      this.#moveTo(this.allSteps[Math.min(Math.max(here + stride, 0), last)]);
      const values = this.lines.map((line, n) => `${line.name} ${this.items[n].value.textContent}`);
      this.spoken.textContent = `${this.stepText.textContent}: ${values.join(", ")}`;
    });
  }

  #moveTo(step) {
    this.step = step;
    this.readOut();
    this.drawCursor();
  }

  readOut() {
    const step = this.step ?? this.allSteps.at(-1);
    this.stepText.textContent =
      this.unit === null ? `step ${step.toLocaleString("en")}` : `${formatValue(step)}${this.unit}`;
    this.lines.forEach((line, n) => {
      this.items[n].value.textContent = this.#valueText(line, step);
    });
  }

  // A curve's value is that of its nearest step; a trend has none between its points.
  #valueText(line, step) {
    const n = nearest(line.steps, step);
    if (this.unit === null) return formatValue(line.values[n]);
    return line.steps[n] !== step || line.values[n] === null ? "-" : formatValue(line.values[n]);
  }

  // Scales from steps and values to pixels; the value axis starts at 0 unless the values lie far from it, and has no
  // ticks where there are no values.
  #scales() {
    const values = this.lines.filter((line) => line.visible).flatMap((line) => line.values.filter((v) => v !== null));
    let low = values.reduce((a, b) => Math.min(a, b), Infinity);
    let high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    if (low > 0 && low < 0.6 * high) low = 0;
    if (low === high) [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) / 2, high + Math.abs(high) / 2];
    high += (high - low) * 0.04;
    const [first, last] = [this.allPlaces[0], this.allPlaces.at(-1)];
    const { width, height } = this.size;
    const [inner, tall] = [width - MARGIN.left - MARGIN.right, height - MARGIN.top - MARGIN.bottom];
    return {
      low, high, first, last,
      x: (step) => MARGIN.left + (last === first ? 0.5 : (this.place(step) - first) / (last - first)) * inner,
      y: (value) => MARGIN.top + (1 - (value - low) / (high - low)) * tall,
    };
  }

  draw() {
    const { width, height } = this.svg.getBoundingClientRect();
    if (width === 0) return;
    this.size = { width, height };
    this.scales = this.#scales();
    this.cursor = shape("g");
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const lines = this.lines.filter((line) => line.visible).flatMap((line) => this.#lineShapes(line));
    this.svg.replaceChildren(this.#axes(), ...lines, this.cursor);
    this.drawCursor();
  }

  #axes() {
    const { low, high, first, last, x, y } = this.scales;
    const { width, height } = this.size;
    const rows = ticks(low, high, 4).flatMap((value) => [
      shape("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }),
      shape("text", { x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }, formatValue(value)),
    ]);
    const between = () => (last === first ? [first] : ticks(first, last, Math.max(2, Math.floor(width / 110))));
    const columns = (this.unit === null ? between() : apart(this.allSteps, x)).map((step) =>
      shape("text", { x: x(step), y: height - 6, "text-anchor": "middle" }, this.#tickText(step)),
    );
    return shape("g", { "aria-hidden": "true" }, ...rows, ...columns);
  }

  #tickText(step) {
    return this.unit === null ? step.toLocaleString("en") : `${formatValue(step)}${this.unit.startsWith("%") ? "%" : ""}`;
  }

  #lineShapes(line) {
    const path = (values, name) => {
      const node = shape("path", { class: name, d: this.#path(line.steps, values) });
      node.style.setProperty("--colour", seriesColour(line.n));
      return node;
    };
    if (this.unit !== null) return [path(line.values, "measured"), ...line.steps.flatMap((step) => this.#mark(line, step))];
    if (!this.smooth) return [path(line.values, "measured")];
    return [path(line.values, "measured faint"), path(line.means, "smoothed")];
  }

  #mark(line, step, name = "mark") {
    const { x, y } = this.scales;
    const n = nearest(line.steps, step);
    if (line.values[n] === null || (this.unit !== null && line.steps[n] !== step)) return [];
    const dot = shape("circle", { class: name, r: 4, cx: x(line.steps[n]), cy: y(line.values[n]) });
    dot.style.setProperty("--colour", seriesColour(line.n));
    return [dot];
  }

  #path(steps, values) {
    const { x, y } = this.scales;
    let pen = "M";
    let path = "";
    values.forEach((value, n) => {
      if (value === null) {
        pen = "M";
        return;
      }
      path += `${pen}${x(steps[n]).toFixed(1)} ${y(value).toFixed(1)}`;
      // A lone point is a line of no length, which a round cap makes a dot.
      if (pen === "M") path += "h0";
      pen = "L";
    });
    return path;
  }

  drawCursor() {
    if (this.cursor === undefined) return;
    if (this.step === null) {
      this.cursor.replaceChildren();
      return;
    }
    const [at, foot] = [this.scales.x(this.step), this.size.height - MARGIN.bottom];
    const dots = this.lines.filter((line) => line.visible).flatMap((line) => this.#mark(line, this.step, "dot"));
    this.cursor.replaceChildren(shape("line", { class: "cursor", x1: at, x2: at, y1: MARGIN.top, y2: foot }), ...dots);
  }
}

function startTrends(charts, place) {
  const all = charts.map((chart) => new Chart(chart, false));
  place.append(...all.map((chart) => chart.node));
  new ResizeObserver(() => all.forEach((chart) => chart.draw())).observe(place);
  all.forEach((chart) => chart.draw());
}

function startCharts(stages, root) {
  const box = document.getElementById("smooth");
  box.checked = stages.some(({ charts }) => charts.some(({ lines }) => lines.some((line) => line.steps.length >= SMOOTH_FROM)));
  const all = [];
  const place = document.getElementById("charts");
  for (const { stage, charts } of stages) {
    const own = charts.map((chart) => new Chart(chart, box.checked));
    all.push(...own);
    place.append(element("h3", {}, stage), element("div", { class: "chart-row" }, ...own.map((chart) => chart.node)));
  }
  root.hidden = false;
  const resized = new ResizeObserver(() => all.forEach((chart) => chart.draw()));
  resized.observe(place);
  all.forEach((chart) => chart.draw());
  box.addEventListener("change", () => {
    for (const chart of all) {
      chart.smooth = box.checked;
      chart.draw();
    }
  });
}
