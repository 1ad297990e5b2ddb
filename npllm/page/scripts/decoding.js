FIGURES.decoding = (host, data) => {
  const logits = [...DATA.logits.named.map((t) => t.logit), ...DATA.logits.others];
  const options = { temperature: 1, topK: 0, topP: 1, minP: 0, seed: 1 };
  const place = scroll("Distribution and draws");
  const status = el("p", { class: "status", role: "status" });
  const draw = () => {
    const p = filtered(logits, options);
    const counts = draws(p, 1000, options.seed);
    const kept = p.filter((x) => x > 0).length;
    status.textContent = `${commas(kept)} of ${commas(p.length)} tokens can be drawn`;
    replace(place, distribution(p, counts));
  };
  const change = (name) => (x) => {
    options[name] = x;
    draw();
  };
  const parts = [
    slider("Temperature (0: greedy)", 0, 2, 1, change("temperature"), { step: 0.05, format: (x) => x.toFixed(2) }),
    slider("Top-k (0: off)", 0, 100, 0, change("topK")),
    slider("Top-p (1: off)", 0.05, 1, 1, change("topP"), { step: 0.01, format: (x) => x.toFixed(2) }),
    slider("Min-p (0: off)", 0, 0.5, 0, change("minP"), { step: 0.01, format: (x) => x.toFixed(2) }),
    button("Draw 1,000 again", () => change("seed")(options.seed + 1)),
  ];
  host.append(controls(...parts), status, place);
  draw();
  document.querySelector("#decoding .beam").append(beamTree(data), answersTable(data));
};

function softmax(x) {
  const most = Math.max(...x);
  const e = x.map((v) => Math.exp(v - most));
  const sum = e.reduce((a, b) => a + b, 0);
  return e.map((v) => v / sum);
}

// The filters in the order of Transformers: temperature, top-k, top-p, min-p.  The logits descend.
function filtered(logits, { temperature, topK, topP, minP }) {
  if (temperature === 0) return logits.map((_, k) => (k === 0 ? 1 : 0));
  let x = logits.map((v) => v / temperature);
  if (topK > 0) x = x.map((v) => (v >= x[Math.min(topK, x.length) - 1] ? v : -Infinity));
  if (topP < 1) {
    const p = softmax(x);
    let before = 0;
    x = x.map((v, k) => {
      const keep = k === 0 || before < topP;
      before += p[k];
      return keep ? v : -Infinity;
    });
  }
  if (minP > 0) {
    const p = softmax(x);
    x = x.map((v, k) => (p[k] >= minP * p[0] ? v : -Infinity));
  }
  return softmax(x);
}

// A generator of 32 bits (mulberry32), so that a seed replays its draws.
function uniforms(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function draws(p, n, seed) {
  const next = uniforms(seed);
  const counts = new Map();
  const sums = [];
  p.reduce((sum, x) => (sums.push(sum + x), sum + x), 0);
  for (let k = 0; k < n; k += 1) {
    const u = next() * sums[sums.length - 1];
    let [low, high] = [0, sums.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sums[middle] > u) high = middle;
      else low = middle + 1;
    }
    counts.set(low, (counts.get(low) || 0) + 1);
  }
  return counts;
}

function distribution(p, counts) {
  const n = 12;
  const top = DATA.logits.named.slice(0, n);
  const rest = { p: p.slice(n).reduce((a, b) => a + b, 0), drawn: 1000 - top.reduce((s, _, k) => s + (counts.get(k) || 0), 0) };
  const most = Math.max(p[0], rest.p, rest.drawn / 1000, (counts.get(0) || 0) / 1000);
  const row = (name, exact, drawn) => [name, percent(exact), String(drawn), new Bars([[exact, 0], [drawn / 1000, 1]], most)];
  const rows = top.map((t, k) => row(token(t), p[k], counts.get(k) || 0));
  rows.push(row("all others", rest.p, rest.drawn));
  const key = legend([["var(--accent)", "exact probability"], ["var(--second)", "share of 1,000 draws"]]);
  return el("div", {}, key, table("Next token", ["token", "probability", "drawn", ""], rows, [1, 2]));
}

function beamTree(data) {
  const last = data.nodes.map((_, n) => !data.nodes.some((other) => other.parent === n));
  const height = {};
  let leaves = 0;
  const place = (n) => {
    const children = range(data.nodes.length).filter((k) => data.nodes[k].parent === n);
    if (children.length === 0) {
      height[n] = leaves;
      leaves += 1;
    } else {
      children.forEach(place);
      height[n] = children.reduce((s, k) => s + height[k], 0) / children.length;
    }
  };
  place(-1);
  const [wide, tall, box] = [150, 46, 118];
  const depth = Math.max(...data.nodes.map((t) => t.depth));
  const label = `Tree of a beam search with ${data.n_beam} beams and ${depth} steps`;
  const node = svg(60 + depth * wide, leaves * tall + 8, label);
  const xy = (n) => [n < 0 ? 8 : 60 + (data.nodes[n].depth - 1) * wide, height[n] * tall + 24];
  data.nodes.forEach((t, n) => {
    const [[x0, y0], [x1, y1]] = [xy(t.parent), xy(n)];
    const from = t.parent < 0 ? x0 + 40 : x0 + box;
    node.append(svgEl("path", { d: `M${from} ${y0} C${from + 16} ${y0} ${x1 - 16} ${y1} ${x1} ${y1}`, fill: "none", stroke: "var(--soft)" }));
  });
  node.append(svgEl("text", { x: 2, y: xy(-1)[1] + 4 }, "prompt"));
  data.nodes.forEach((t, n) => {
    const [x, y] = xy(n);
    const finished = last[n] && t.depth === depth;
    node.append(svgEl("rect", { x, y: y - 18, width: box, height: 36, rx: 4, fill: "var(--panel)", stroke: finished ? "var(--current)" : "var(--line)", "stroke-width": finished ? 2 : 1 }));
    node.append(svgEl("text", { x: x + 6, y: y - 3 }, short(t.text, 14)));
    node.append(svgEl("text", { x: x + 6, y: y + 12, class: "faint" }, fixed(t.score, 3)));
  });
  return scroll(label, node);
}

function answersTable(data) {
  const rows = data.answers.map((a) => [shown(a.text), fixed(a.score, 3)]);
  return scroll("Answers", table("Answers, the best first", ["continuation", "sum of log-probabilities"], rows, [1]));
}
