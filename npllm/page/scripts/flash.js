FIGURES.flash = (host, data) => {
  const n = DATA.attention.tokens.length;
  const state = { block: Math.max(1, Math.min(4, Math.ceil(n / 4))), outer: "queries", head: telling(DATA.attention), at: 0 };
  const place = el("div", {});
  const steps = el("div", {});
  const restart = () => {
    const order = blockOrder(n, state.block, state.outer);
    const one = player("block", order.length, (k) => {
      state.at = k;
      replace(place, ...flashFigure(n, order, state));
    }, order.length);
    replace(steps, one);
    one.go(order.length);
  };
  const change = (name, convert) => (x) => {
    state[name] = convert(x);
    restart();
  };
  const heads = DATA.attention.q.map((_, h) => [String(h), `head ${h}`]);
  host.append(
    controls(
      slider("Positions in a block", 1, Math.max(2, Math.min(16, n)), state.block, change("block", Number)),
      radios("Outer loop", [["queries", "queries (FlashAttention-2)"], ["keys", "keys (FlashAttention)"]], "queries", change("outer", String)),
      select(`Head of layer ${DATA.attention.layer}`, heads, String(state.head), change("head", Number)),
    ), steps, place);
  REDRAW.push(restart);
  restart();
  document.querySelector("#flash .moved").append(movedBytes(data));
};

// The blocks [row, column] in the order of the loops; a block above the diagonal is skipped.
function blockOrder(n, block, outer) {
  const all = range(Math.ceil(n / block));
  const pairs = outer === "queries" ? all.flatMap((i) => all.map((j) => [i, j])) : all.flatMap((j) => all.map((i) => [i, j]));
  return pairs.filter(([i, j]) => j <= i);
}

function flashFigure(n, order, { block, head, at }) {
  const side = Math.ceil(n / block);
  const when = (i, j) => order.findIndex(([a, b]) => a === i && b === j);
  const colour = (i, j) => (when(i, j) < 0 ? "var(--line)" : when(i, j) === at - 1 ? "var(--current)" : when(i, j) < at ? "var(--allowed)" : "var(--panel)");
  const cell = side > 20 ? 16 : 26;
  const map = heatmap(side, side, `Blocks of queries (rows) and keys (columns), ${at} of ${order.length} visited`, { cell, colour, text: (i, j) => (when(i, j) < 0 ? "skipped" : `visited as number ${when(i, j) + 1}`) });
  if (cell > 20) order.forEach(([i, j], k) => map.append(svgEl("text", { x: 4 + (j + 0.5) * cell, y: 4 + (i + 0.5) * cell + 4, "text-anchor": "middle" }, String(k + 1))));
  const key = legend([["var(--current)", "in fast memory now"], ["var(--allowed)", "done"], ["var(--panel)", "to come"], ["var(--line)", "skipped: excluded by the mask"]]);
  return [el("div", { class: "pair" }, el("figure", {}, el("figcaption", {}, `Blocks of ${block} by ${block}, numbered in the order of the loops`), scroll("Blocks", map), key), runningTable(order.slice(0, at), block, head, n))];
}

// The state of the last row after each of its blocks.
function runningTable(done, block, head, n) {
  const i = n - 1;
  const scores = DATA.attention.scores[head][i];
  let [m, l] = [-Infinity, 0];
  const rows = done.filter(([a]) => a === Math.floor(i / block)).map(([, b]) => {
    const part = scores.slice(b * block, (b + 1) * block).filter((s) => s !== null && s !== undefined);
    const most = Math.max(m, ...part);
    const factor = m === -Infinity ? 0 : Math.exp(m - most);
    l = l * factor + part.reduce((s, x) => s + Math.exp(x - most), 0);
    m = most;
    return [`${b * block} to ${Math.min(n, (b + 1) * block) - 1}`, part.length ? fixed(Math.max(...part)) : "–", fixed(m), fixed(factor, 4), fixed(l, 4)];
  });
  const caption = `Row ${i} (${short(DATA.attention.tokens[i].text)}): running maximum m and sum l, from the real scores`;
  const node = el("div", { class: "running" }, scroll(caption, table(caption, ["keys", "largest score", "m", "factor of l", "l"], rows, [1, 2, 3, 4])));
  if (rows.length === Math.ceil(n / block)) {
    const all = scores.filter((s) => s !== null);
    const whole = all.reduce((s, x) => s + Math.exp(x - Math.max(...all)), 0);
    node.append(el("p", {}, `The whole row at once: m = ${fixed(Math.max(...all))}, l = ${fixed(whole, 4)}.`));
  }
  return node;
}

function movedBytes(data) {
  const state = { n: 5, block: 2 };
  const place = scroll("Bytes moved");
  const draw = () => {
    const rows = [["naive: scores in slow memory", data.naive], ["FlashAttention (outer loop over keys)", data.flash_1], ["FlashAttention-2 (outer loop over queries)", data.flash_2]].map(([name, x]) => [name, x[state.n][state.block]]);
    const most = Math.max(...rows.map((row) => row[1]));
    replace(place, table(`One head of width ${data.d_head}, ${commas(data.lengths[state.n])} positions, float32, no mask`, ["schedule", "bytes", "", "of naive", ""], rows.map(([name, x]) => [name, commas(x), bytes(x), percent(x / rows[0][1], 1), bars(x, most)]), [1, 2, 3]));
  };
  const change = (name) => (x) => {
    state[name] = x;
    draw();
  };
  draw();
  return el("div", {}, controls(slider("Positions", 0, data.lengths.length - 1, 5, change("n"), { format: (k) => commas(data.lengths[k]) }), slider("Block size", 0, data.blocks.length - 1, 2, change("block"), { format: (k) => String(data.blocks[k]) })), place);
}
