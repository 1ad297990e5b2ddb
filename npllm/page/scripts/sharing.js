FIGURES.sharing = (host, data) => {
  const state = { kind: "gqa", n: Math.min(10, Math.floor(Math.log2(data.context_length))) };
  const place = el("div", {});
  const draw = () => replace(place, headLines(data, state.kind), cacheTable(data, state));
  const change = (name) => (x) => {
    state[name] = x;
    draw();
  };
  const n_own = data.kinds.gqa.n_kv_head;
  const own = n_own === data.n_head ? "MHA" : n_own === 1 ? "MQA" : "GQA";
  const kinds = [["mha", "MHA: each its own"], ["gqa", `${own}: this model, ${data.kinds.gqa.n_kv_head}`], ["mqa", "MQA: one for all"]];
  const most = Math.floor(Math.log2(data.context_length));
  host.append(controls(radios("Key/value heads", kinds, "gqa", change("kind")), slider("Length of the context", 0, most, state.n, change("n"), { format: (k) => commas(2 ** k) })), place);
  draw();
};

function headLines(data, kind) {
  const { n_head } = data;
  const n_kv = data.kinds[kind].n_kv_head;
  const wide = Math.max(28, Math.min(48, Math.floor((room() - 72) / n_head)));
  const label = `${n_head} query heads share ${n_kv} key/value heads`;
  const node = svg(70 + n_head * wide, 150, label);
  const x = (h) => 70 + (h + 0.5) * wide;
  const kv = (g) => (x((g * n_head) / n_kv) + x(((g + 1) * n_head) / n_kv - 1)) / 2;
  node.append(svgEl("text", { x: 0, y: 32 }, "queries"), svgEl("text", { x: 0, y: 125 }, "keys and"), svgEl("text", { x: 0, y: 140 }, "values"));
  range(n_head).forEach((h) => {
    const g = Math.floor((h * n_kv) / n_head);
    node.append(svgEl("line", { x1: x(h), y1: 44, x2: kv(g), y2: 110, stroke: "var(--soft)", "stroke-width": 1.5 }));
    node.append(svgEl("rect", { x: x(h) - 12, y: 14, width: 24, height: 30, rx: 4, fill: "var(--allowed)" }), svgEl("text", { x: x(h), y: 34, "text-anchor": "middle" }, String(h)));
  });
  range(n_kv).forEach((g) => {
    node.append(svgEl("rect", { x: kv(g) - 12, y: 110, width: 24, height: 34, rx: 4, fill: "none", stroke: "var(--current)", "stroke-width": 2 }), svgEl("text", { x: kv(g), y: 132, "text-anchor": "middle" }, String(g)));
  });
  return el("figure", {}, el("figcaption", {}, label), scroll(label, node));
}

function cacheTable(data, state) {
  const n = 2 ** state.n;
  const most = data.kinds.mha.bytes_per_token * n;
  const rows = Object.entries(data.kinds).map(([kind, row]) => [kind.toUpperCase() + (kind === state.kind ? "\u00a0←" : ""), String(row.n_kv_head), commas(row.bytes_per_token * n), bytes(row.bytes_per_token * n), bars(row.bytes_per_token * n, most, kind === state.kind ? 1 : 0)]);
  return scroll("Bytes of the cache", table(`KV cache of ${commas(n)} tokens in float32, all ${data.n_layer} layers`, ["kind", "key/value heads", "bytes", "", ""], rows, [1, 2, 3]));
}
