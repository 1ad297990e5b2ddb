FIGURES.heads = (host, data) => {
  const [n_layer, n_head] = [data.weights.length, data.weights[0].length];
  const state = { layer: DATA.attention.layer, head: telling(DATA.attention), query: data.tokens.length - 1 };
  const large = el("div", { class: "large" });
  const grid = thumbnails(data, (layer, head) => pick({ layer, head }));
  const draw = () => {
    grid.mark(state.layer, state.head);
    replace(large, ...enlarged(data, state, (query) => pick({ query })));
  };
  const pick = (change) => {
    Object.assign(state, change);
    layer.set(state.layer);
    head.set(state.head);
    query.set(state.query);
    draw();
  };
  const layer = slider("Layer", 0, n_layer - 1, state.layer, (x) => pick({ layer: x }));
  const head = slider("Head", 0, n_head - 1, state.head, (x) => pick({ head: x }));
  const query = slider("Query", 0, data.tokens.length - 1, state.query, (x) => pick({ query: x }), { format: (k) => `${k} ${short(data.tokens[k].text)}` });
  const left = el("div", {}, scroll("Attention of every head", grid));
  host.append(controls(layer, head, query), el("div", { class: data.tokens.length <= 12 ? "beside" : "" }, left, large));
  REDRAW.push(() => {
    grid.paint();
    draw();
  });
  draw();
};

function thumbnails(data, pick) {
  const n_head = data.weights[0].length;
  const n = data.tokens.length;
  const node = el("div", { class: "thumbs", role: "group", "aria-label": "Layers and heads; arrow keys choose another head" });
  node.style.gridTemplateColumns = `max-content repeat(${n_head}, max-content)`;
  node.append(el("span", { class: "name" }, "head"), ...range(n_head).map((h) => el("span", { class: "name" }, String(h))));
  const all = data.weights.map((heads, l) => {
    node.append(el("span", { class: "name" }, l === 0 ? "layer 0" : String(l)));
    return heads.map((_, h) => {
      const one = el("button", { type: "button", tabindex: -1, "aria-label": `layer ${l}, head ${h}`, title: `layer ${l}, head ${h}` }, el("canvas", {}));
      one.addEventListener("click", () => pick(l, h));
      one.addEventListener("keydown", (event) => step(event, l, h));
      node.append(one);
      return one;
    });
  });
  const step = (event, l, h) => {
    const [dl, dh] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] || [0, 0];
    const next = (all[l + dl] || [])[h + dh];
    if ((dl || dh) && next) {
      event.preventDefault();
      pick(l + dl, h + dh);
      next.focus();
    }
  };
  node.paint = () => all.forEach((row, l) => row.forEach((one, h) => paint(one.firstChild, n, n, (y, x) => weightColour((data.weights[l][h][y][x] || 0) / 1000))));
  node.mark = (layer, head) => all.forEach((row, l) => row.forEach((one, h) => {
    const is = l === layer && h === head;
    one.setAttribute("aria-pressed", String(is));
    one.tabIndex = is ? 0 : -1;
  }));
  node.paint();
  return node;
}

function enlarged(data, { layer, head, query }, pick) {
  const w = data.weights[layer][head];
  const n = data.tokens.length;
  const names = data.tokens.map((t) => short(t.text));
  const summary = data.summary[layer * data.weights[0].length + head];
  const title = `Layer ${layer}, head ${head}: weight of each key (columns) for each query (rows)`;
  const value = (y, x) => (w[y][x] || 0) / 1000;
  const map = heatmap(n, n, title, {
    rows: names, columns: names, cell: n > 48 ? 12 : n > 32 ? 15 : n > 16 ? 18 : 24, mark: query, pick,
    colour: (y, x) => rgb(weightColour(value(y, x))),
    text: (y, x) => `${names[y]} looks at ${names[x]}: ${fixed(value(y, x))}`,
  });
  const rows = range(n).filter((j) => value(query, j) > 0 || j <= query).map((j) => [String(j), token(data.tokens[j]), fixed(value(query, j)), bars(value(query, j), 1)]);
  return [
    el("h3", {}, `Layer ${layer}, head ${head}`),
    facts([["entropy of the weights (mean, nats)", digits(summary.entropy, 3)], ["weight of the first token (mean)", fixed(summary.first)], ["distance (mean, tokens)", digits(summary.distance, 3)]]),
    scale(0, 1, weightColour, "weight"),
    scroll(title, map),
    scroll("Weights of the query", table(`Query ${query}, ${names[query]}: weight of each key`, ["", "key", "weight", ""], rows, [0, 2])),
  ];
}
