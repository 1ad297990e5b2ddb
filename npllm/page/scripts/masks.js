const MASK = {
  bits: (rows, n) => rows.map((text) => range(n).map((j) => {
    const at = 4 * text.length - n + j;
    return (parseInt(text[at >> 2], 16) >> (3 - (at & 3))) & 1;
  })),
  colour: (bits, i, j, current) => (j === current && i === current ? "var(--current)" : bits[i][j] ? "var(--allowed)" : "var(--excluded)"),
  key: () => legend([["var(--current)", "current position"], ["var(--allowed)", "it may see"], ["var(--excluded)", "it may not see"]]),
  count: (bits) => bits.reduce((s, row) => s + row.reduce((a, b) => a + b, 0), 0),
};

FIGURES.masks = (host, data) => {
  const state = { rule: data.rules.findIndex((r) => r.name === "strided"), at: data.n - 10, parameters: {} };
  const sliders = el("div", { class: "controls" });
  const place = el("div", {});
  const draw = () => replace(place, ...maskFigure(data, chosen(data.rules[state.rule], state.parameters), state, (i) => {
    state.at = i;
    at.set(i);
    draw();
  }));
  const choose = (k) => {
    state.rule = Number(k);
    state.parameters = { ...middle(data.rules[state.rule], data.side).parameters };
    replace(sliders, ...parameterSliders(data.rules[state.rule], state.parameters, draw));
    draw();
  };
  const at = slider("Current position", 0, data.n - 1, state.at, (x) => {
    state.at = x;
    draw();
  });
  host.append(controls(select("Rule", data.rules.map((r, k) => [String(k), r.name]), String(state.rule), choose), at), sliders, MASK.key(), place);
  choose(state.rule);
  document.querySelector("#masks .compare").append(comparePicture(data));
};

function middle(rule, side) {
  const fits = (v) => Object.values(v.parameters)[0] === side && Object.keys(v.parameters).length === 1;
  return rule.variants.find(fits) || rule.variants[Math.floor(rule.variants.length / 3)];
}

function values(rule, name) {
  return [...new Set(rule.variants.map((v) => v.parameters[name]))].sort((a, b) => a - b);
}

// The variant of these parameters; where there is none (c above stride), the nearest below.
function chosen(rule, parameters) {
  const fits = (v) => Object.entries(parameters).every(([name, x]) => v.parameters[name] === x);
  const below = (v) => Object.entries(parameters).every(([name, x]) => v.parameters[name] <= x);
  return rule.variants.find(fits) || rule.variants.filter(below).at(-1) || rule.variants[0];
}

function parameterSliders(rule, parameters, draw) {
  return Object.keys(parameters).map((name) => {
    const all = values(rule, name);
    return slider(name, 0, all.length - 1, all.indexOf(parameters[name]), (k) => {
      parameters[name] = all[k];
      draw();
    }, { format: (k) => String(all[k]) });
  });
}

function maskFigure(data, variant, state, pick) {
  const rule = data.rules[state.rule];
  const bits = MASK.bits(variant.rows, data.n);
  const i = state.at;
  const pairs = MASK.count(bits);
  const [full, causal] = [data.n ** 2, (data.n * (data.n + 1)) / 2];
  const called = Object.entries(variant.parameters).map(([name, x]) => `${name} = ${x}`).join(", ");
  const matrix = heatmap(data.n, data.n, `${rule.name}: row i is the query, column j the key`, {
    cell: Math.min(11, Math.floor((room() - 8) / data.n)), mark: i, pick: (y) => pick(y), colour: (y, x) => MASK.colour(bits, y, x, y),
    text: (y, x) => `query ${y}, key ${x}: ${bits[y][x] ? "visible" : "excluded"}`,
  });
  return [
    el("code", { class: "formula" }, `${rule.name}${called ? ` (${called})` : ""}:   ${rule.formula}`),
    el("div", { class: "pair" },
      el("figure", {}, el("figcaption", {}, "Queries from top to bottom, keys from left to right"), scroll("Matrix of queries and keys", matrix)),
      el("div", {},
        el("figure", {}, el("figcaption", {}, `The same slots as a picture of ${data.side} by ${data.side} pixels, in reading order: what position ${i} may see`), picture(bits, i, data.side)),
        facts([["pairs visited", `${pairs} of ${full}`], ["share of full attention", percent(pairs / full, 1)], ["share of causal attention", percent(pairs / causal, 1)], [`keys that position ${i} sees`, bits[i].reduce((a, b) => a + b, 0)]]),
        alternating(data, pairs, causal))),
  ];
}

function picture(bits, i, side) {
  return heatmap(side, side, `Position ${i} in a picture of ${side} by ${side}`, {
    cell: 22, colour: (y, x) => MASK.colour(bits, i, y * side + x, i),
    text: (y, x) => `slot ${y * side + x}`,
  });
}

function alternating(data, pairs, causal) {
  const n = data.n_layer;
  const rows = [["every layer causal", n * causal], ["alternating: causal, this rule", Math.ceil(n / 2) * causal + Math.floor(n / 2) * pairs], ["every layer this rule", n * pairs]];
  const most = Math.max(...rows.map((row) => row[1]));
  return scroll("Layers", table(`Pairs in ${n} layers`, ["layers", "pairs", ""], rows.map(([name, x]) => [name, commas(x), bars(x, most)]), [1]));
}

function comparePicture(data) {
  const rules = ["two-dimensional band", "causal & block_local"].map((name) => data.rules.find((r) => r.name === name));
  const names = ["width", "block"];
  const state = { width: data.side, at: 27 };
  const place = el("div", { class: "pair" });
  const draw = () => replace(place, ...rules.map((rule, k) => {
    const bits = MASK.bits(chosen(rule, { [names[k]]: state.width }).rows, data.n);
    const matrix = heatmap(data.n, data.n, `${rule.name}, ${names[k]} ${state.width}`, { cell: 8, mark: state.at, colour: (y, x) => MASK.colour(bits, y, x, y) });
    const caption = `${rule.name} (${names[k]} = ${state.width}): ${MASK.count(bits)} pairs`;
    return el("figure", {}, el("figcaption", {}, caption), grid(bits, state, data.n), scroll(caption, matrix));
  }));
  const grid = (bits, { width, at }, n) => heatmap(Math.ceil(n / width), width, `Position ${at}, ${width} slots in a row`, {
    cell: 18, colour: (y, x) => (y * width + x < n ? MASK.colour(bits, at, y * width + x, at) : "none"),
  });
  const change = (name) => (x) => {
    state[name] = x;
    draw();
  };
  draw();
  return el("div", {}, controls(slider("Width of the picture, or block", 2, 12, data.side, change("width")), slider("Position in the picture", 0, data.n - 1, 27, change("at"))), MASK.key(), place);
}
