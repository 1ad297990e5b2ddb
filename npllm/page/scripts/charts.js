// Strips of colour, heat maps and line charts.  Colours follow the scheme, light or dark.
const DARK = window.matchMedia("(prefers-color-scheme: dark)");
const REDRAW = [];
DARK.addEventListener("change", () => REDRAW.forEach((draw) => draw()));

function mix(a, b, t) {
  return a.map((x, k) => Math.round(x + (b[k] - x) * t));
}

function weightColour(w) {
  const ends = DARK.matches ? [[29, 35, 45], [126, 190, 255]] : [[244, 247, 252], [8, 58, 122]];
  return mix(ends[0], ends[1], Math.max(0, Math.min(1, w)) ** 0.7);
}

function signedColour(x) {
  const zero = DARK.matches ? [38, 45, 56] : [246, 246, 246];
  const end = x < 0 ? (DARK.matches ? [255, 140, 90] : [176, 60, 16]) : (DARK.matches ? [110, 180, 255] : [11, 80, 160]);
  return mix(zero, end, Math.min(1, Math.abs(x)) ** 0.6);
}

function rgb(colour) {
  return `rgb(${colour.join(",")})`;
}

function paint(canvas, width, height, colourOf) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) image.data.set([...colourOf(y, x), 255], 4 * (y * width + x));
  }
  context.putImageData(image, 0, 0);
}

function strip(vector, what, most = null) {
  const largest = most || Math.max(...vector.map(Math.abs)) || 1;
  const [low, high] = [Math.min(...vector), Math.max(...vector)];
  const label = `${what}: ${vector.length} numbers from ${digits(low, 3)} to ${digits(high, 3)}`;
  const canvas = el("canvas", { class: "strip", role: "img", "aria-label": label, title: label });
  paint(canvas, vector.length, 1, (_, x) => signedColour(vector[x] / largest));
  return canvas;
}

// Rows of [name, vector, note].
function strips(rows, most = null) {
  const cells = rows.flatMap(([name, vector, note]) => [el("span", {}, name), strip(vector, name, most), el("span", {}, note || "")]);
  return el("div", { class: "strips" }, ...cells);
}

function legend(entries) {
  const item = ([colour, text]) => {
    const key = el("span", { class: "key" });
    key.style.background = colour;
    return el("li", {}, key, text);
  };
  return el("ul", { class: "legend" }, ...entries.map(item));
}

function scale(low, high, colourOf, what) {
  const canvas = el("canvas", { class: "strip", role: "img", "aria-label": `scale of ${what}: ${low} to ${high}` });
  canvas.style.width = "9rem";
  paint(canvas, 64, 1, (_, x) => colourOf(x / 63));
  return el("div", { class: "controls" }, el("span", {}, what), el("span", {}, String(low)), canvas, el("span", {}, String(high)));
}

// A matrix with labels; options: rows, columns, cell, colour(y, x), text(y, x), mark (row), pick(y, x).
function heatmap(n, m, label, options) {
  const cell = options.cell || 18;
  const names = options.rows || [];
  const left = names.length ? 14 + 7.4 * Math.max(...names.map((t) => Array.from(t).length)) : 4;
  const columns = options.columns || [];
  const top = columns.length ? 14 + 7.4 * Math.max(...columns.map((t) => Array.from(t).length)) : 4;
  const titles = (options.xTitle ? 18 : 0);
  const node = svg(left + m * cell + 6, top + n * cell + 6 + titles, label);
  for (let y = 0; y < n; y += 1) {
    for (let x = 0; x < m; x += 1) {
      const box = svgEl("rect", { x: left + x * cell, y: top + y * cell, width: cell - 1, height: cell - 1, fill: options.colour(y, x) });
      if (options.text) box.append(svgEl("title", {}, options.text(y, x)));
      if (options.pick) box.addEventListener("click", () => options.pick(y, x));
      node.append(box);
    }
  }
  names.forEach((t, y) => node.append(svgEl("text", { x: left - 6, y: top + (y + 0.5) * cell + 4, "text-anchor": "end" }, t)));
  columns.forEach((t, x) => {
    const at = `translate(${left + (x + 0.5) * cell + 4} ${top - 5}) rotate(-90)`;
    node.append(svgEl("text", { transform: at }, t));
  });
  if (options.mark !== undefined && options.mark !== null) {
    node.append(svgEl("rect", { x: left - 1.5, y: top + options.mark * cell - 1.5, width: m * cell + 2, height: cell + 2, fill: "none", stroke: "var(--current)", "stroke-width": 2 }));
  }
  if (options.xTitle) node.append(svgEl("text", { x: left, y: top + n * cell + 18, class: "faint" }, options.xTitle));
  return node;
}

// The width that a figure may take, which is small on a phone.
function room() {
  return Math.max(280, document.querySelector("main").clientWidth);
}

function ticks(low, high) {
  const step = 10 ** Math.floor(Math.log10((high - low) / 3 || 1));
  const wide = [1, 2, 5, 10].map((k) => k * step).find((s) => (high - low) / s <= 6);
  const first = Math.ceil(low / wide - 1e-9);
  return range(Math.floor(high / wide + 1e-9) - first + 1).map((k) => Number(((first + k) * wide).toPrecision(12)));
}

function powers(low, high) {
  const first = Math.floor(Math.log10(low));
  return range(Math.ceil(Math.log10(high)) - first + 1).map((k) => 10 ** (first + k));
}

const LINES = [["var(--accent)", ""], ["var(--second)", "6 3"], ["var(--third)", "2 3"], ["var(--fourth)", "9 3 2 3"]];

// options: series [[name, xs, ys]], xTitle, yTitle, log, at (x that is marked).
function lines(label, options) {
  const [width, height, left, low] = [Math.min(560, room()), 250, 62, 40];
  const all = options.series.flatMap(([, , ys]) => ys).filter((y) => !options.log || y > 0);
  const xs = options.series.flatMap(([, x]) => x);
  const f = options.log ? Math.log10 : (y) => y;
  let [y0, y1] = [Math.min(...all, options.log ? Infinity : 0), Math.max(...all)];
  if (options.log) [y0, y1] = [10 ** Math.floor(Math.log10(y0)), 10 ** Math.ceil(Math.log10(y1) + 1e-9)];
  if (y1 === y0) y1 = y0 + 1;
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  const px = (x) => left + ((x - x0) / (x1 - x0 || 1)) * (width - left - 12);
  const py = (y) => 10 + (1 - (f(y) - f(y0)) / (f(y1) - f(y0))) * (height - low - 10);
  const node = svg(width, height, label);
  for (const y of (options.log ? powers(y0, y1) : ticks(y0, y1)).filter((y) => y >= y0 && y <= y1 * 1.0001)) {
    node.append(svgEl("line", { x1: left, x2: width - 12, y1: py(y), y2: py(y), class: "axis" }));
    node.append(svgEl("text", { x: left - 6, y: py(y) + 4, "text-anchor": "end" }, digits(y, 3)));
  }
  for (const x of ticks(x0, x1)) {
    node.append(svgEl("text", { x: px(x), y: height - low + 16, "text-anchor": "middle" }, digits(x, 6)));
  }
  node.append(svgEl("text", { x: left, y: height - 6, class: "faint" }, `${options.xTitle} →`));
  if (options.at !== undefined) {
    node.append(svgEl("line", { x1: px(options.at), x2: px(options.at), y1: 10, y2: height - low, stroke: "var(--current)", "stroke-width": 1.5 }));
  }
  options.series.forEach(([, x, ys], k) => {
    const points = x.map((v, n) => [v, ys[n]]).filter(([, y]) => !options.log || y > 0);
    const [stroke, dash] = LINES[k % LINES.length];
    node.append(svgEl("polyline", { points: points.map(([a, b]) => `${px(a).toFixed(1)},${py(b).toFixed(1)}`).join(" "), fill: "none", stroke, "stroke-width": 2, "stroke-dasharray": dash }));
  });
  const keys = options.series.map(([name], k) => {
    const [stroke, dash] = LINES[k % LINES.length];
    const key = svgEl("svg", { width: 30, height: 8, "aria-hidden": "true" });
    key.append(svgEl("line", { x1: 0, x2: 30, y1: 4, y2: 4, stroke, "stroke-width": 2, "stroke-dasharray": dash }));
    return el("li", {}, key, name);
  });
  return el("figure", {}, el("ul", { class: "legend" }, ...keys), el("figcaption", {}, `Vertical: ${options.yTitle}`), scroll(label, node));
}
