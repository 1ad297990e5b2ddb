// Elements are made with textContent and attributes only, so that no text of a prompt becomes markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const FIGURES = {};

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  setAll(node, attributes);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function setAll(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
}

function svgEl(tag, attributes = {}, text = null) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  setAll(node, attributes);
  if (text !== null) node.textContent = text;
  return node;
}

function svg(width, height, label, ...children) {
  const node = svgEl("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  node.append(...children);
  return node;
}

function scroll(label, ...children) {
  const node = el("div", { class: "scroll", role: "group", "aria-label": label }, ...children);
  FITS.observe(node);
  return node;
}

// What is wider than its place can be scrolled with the keyboard; what fits is no stop of the Tab key.
const FITS = new ResizeObserver((entries) => entries.forEach(({ target }) => {
  if (target.scrollWidth > target.clientWidth + 1) target.setAttribute("tabindex", 0);
  else if (target !== document.activeElement) target.removeAttribute("tabindex");
}));

function shown(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

function short(text, n = 12) {
  const all = Array.from(shown(text));
  return all.length > n ? all.slice(0, n - 1).join("") + "…" : all.join("");
}

function token(t, attributes = {}, note = null) {
  const node = el("span", { class: "token", ...attributes }, shown(t.text));
  if (note !== null) node.append(" ", el("small", {}, note));
  return node;
}

function fixed(x, digits = 3) {
  return x === null ? "–" : x.toFixed(digits);
}

function digits(x, n = 4) {
  if (x === null) return "–";
  if (x !== 0 && (Math.abs(x) >= 1e6 || Math.abs(x) < 1e-4)) return x.toExponential(n - 1);
  return String(Number(x.toPrecision(n)));
}

function percent(p, n = 2) {
  return (100 * p).toFixed(n) + " %";
}

function commas(n) {
  return Math.round(n).toLocaleString("en-US");
}

function many(n) {
  return `${n} ${n === 1 ? "token" : "tokens"}`;
}

function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let k = 0;
  let x = n;
  while (x >= 1000 && k < units.length - 1) {
    x /= 1000;
    k += 1;
  }
  return k === 0 ? `${n} B` : `${x.toPrecision(4)} ${units[k]}`;
}

function table(caption, heads, rows, numeric = [], attributes = {}) {
  const kind = (k) => ({ class: numeric.includes(k) ? "n" : null });
  const head = el("tr", {}, ...heads.map((text, k) => el("th", { scope: "col", ...kind(k) }, text)));
  const body = rows.map((row) => {
    const cells = row.map((cell, k) => el("td", cell instanceof Bars ? { class: "wide" } : kind(k), cell instanceof Bars ? cell.node : cell));
    return el("tr", {}, ...cells);
  });
  return el("table", attributes, el("caption", {}, el("span", {}, caption)), el("thead", {}, head), el("tbody", {}, ...body));
}

class Bars {
  constructor(parts, most) {
    const kinds = ["bar", "bar second", "bar third", "bar fourth"];
    const bar = ([x, kind]) => {
      const node = el("span", { class: kinds[kind], "aria-hidden": "true" });
      node.style.width = `${Math.max(0, Math.min(100, (100 * x) / (most || 1)))}%`;
      return node;
    };
    this.node = el("span", { class: "bars" }, ...parts.map(bar));
  }
}

function bars(x, most, kind = 0) {
  return new Bars([[x, kind]], most);
}

function facts(pairs) {
  return el("dl", { class: "facts" }, ...pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))));
}

function replace(host, ...children) {
  host.replaceChildren(...children.filter((child) => child !== null));
}

function changed(x, rounding) {
  return x === 0 ? "the same: 0" : x <= rounding ? `rounding: ${digits(x, 3)}` : `changed: ${digits(x, 3)}`;
}

function range(n) {
  return Array.from({ length: n }, (_, k) => k);
}
