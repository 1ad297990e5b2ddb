FIGURES.attention = (host, data) => {
  const n = data.tokens.length;
  const state = { head: telling(data), position: n - 1, step: 10 };
  const list = el("ol", { class: "steps" });
  const draw = () => {
    const steps = attentionSteps(data, state.head, state.position);
    replace(list, ...steps.map(([title, ...nodes], k) => {
      const kind = k + 1 === state.step ? "on" : k + 1 > state.step ? "later" : "";
      return el("li", { class: kind }, el("h3", {}, `${k + 1}. ${title}`), ...nodes);
    }));
  };
  const change = (name) => (x) => {
    state[name] = Number(x);
    draw();
  };
  const heads = data.q.map((_, h) => [String(h), `head ${h}`]);
  const steps = player("step", 10, (k) => {
    state.step = Math.max(1, k);
    draw();
  }, 10);
  host.append(controls(select(`Head of layer ${data.layer}`, heads, String(state.head), change("head")), select("Position of the query", tokenOptions(data.tokens), String(n - 1), change("position"))), steps, list);
  REDRAW.push(draw);
  steps.go(10);
};

// The head whose last query looks most at one earlier token, the first one left out.
function telling(data) {
  const last = data.tokens.length - 1;
  const most = data.weights.map((head) => Math.max(0, ...head[last].slice(1, last)));
  return most.indexOf(Math.max(...most));
}

// The steps in the order of npllm.analysis.steps.AttentionSteps.
function attentionSteps(data, h, i) {
  const g = Math.floor(h / data.group);
  const scores = data.scores[h][i];
  const keys = range(scores.length).filter((j) => scores[j] !== null);
  const w = data.weights[h][i];
  const { lengths } = data;
  const name = (j) => `${j} ${short(data.tokens[j].text)}`;
  const most = (rows) => Math.max(...rows.flatMap((row) => row.map(Math.abs)));
  const rows = (what) => strips(keys.map((j) => [name(j), data[what][g][j], digits(lengths[what][g][j], 3)]), most(keys.map((j) => data[what][g][j])));
  const query = (what) => strips([[`${name(i)}: query`, data[what][h][i], digits(lengths[what][h][i])]]);
  const beside = (...named) => el("div", { class: "pair" }, ...named.map(([title, node]) => el("div", {}, title, node)));
  const weighted = keys.map((j) => data.v[g][j].map((x) => w[j] * x));
  const after = data.stream[i].map((x, c) => x + data.added[i][c]);
  const merged = data.output.flatMap((head) => head[i]);
  const sum = keys.reduce((s, j) => s + w[j], 0);
  return [
    ["The residual stream, and x, its norm", note("The number at the right of a vector is its length."), strips([["stream", data.stream[i], digits(lengths.stream[i])], ["x", data.x[i], digits(lengths.x[i])]])],
    [`Query, keys and values: q of head ${h}, k and v of key/value head ${g}`, note("The query comes from the x of its own position, each key and value from the x of the position that it is named after. Only positions that this query sees are listed."), query("q_proj"), beside(["Keys", rows("k_proj")], ["Values", rows("v")])],
    ["Query and keys, rotated by their positions (RoPE)", note("A rotation changes no length."), query("q"), beside(["Keys", rows("k")])],
    ["Scores: the query times each key, times the scale", keyTable(data, i, "Scores", "Positions that the mask excludes have no score", keys, [["score", (j) => fixed(scores[j], 3)]], null)],
    ["Weights: the softmax of the scores", keyTable(data, i, "Weights", `The weights sum to ${fixed(sum, 3)}`, keys, [["score", (j) => fixed(scores[j], 3)], ["weight", (j) => fixed(w[j], 4)]], (j) => bars(w[j], 1))],
    ["Each value times its weight", strips(keys.map((j, k) => [name(j), weighted[k], digits(w[j] * lengths.v[g][j], 4)]), most(weighted))],
    ["Their sum: the output of this head", strips([[`head ${h}`, data.output[h][i], digits(lengths.output[h][i])]])],
    ["The outputs of all heads side by side", strips([[`heads 0 to ${data.output.length - 1}`, merged, digits(lengths.merged[i])]])],
    ["W_o maps them back to the width of the stream", el("div", {}, headShares(data, h, i), strips([["all heads", data.added[i], digits(lengths.added[i])]]))],
    ["The sum goes into the residual stream", strips([["before", data.stream[i], digits(lengths.stream[i])], ["added", data.added[i], digits(lengths.added[i])], ["after", after, digits(lengths.after[i])]], most([data.stream[i], after]))],
  ];
}

function note(text) {
  return el("p", { class: "note" }, text);
}

// A row for each key: its place, its token, the named columns and a bar.
function keyTable(data, i, label, caption, keys, columns, bar) {
  const rows = keys.map((j) => [String(j), token(data.tokens[j], j === i ? { class: "token new" } : {}), ...columns.map(([, of]) => of(j)), ...(bar ? [bar(j)] : [])]);
  const heads = ["", "key", ...columns.map(([head]) => head), ...(bar ? [""] : [])];
  return scroll(label, table(caption, heads, rows, [0, ...columns.map((_, k) => k + 2)]));
}

function headShares(data, h, i) {
  const most = Math.max(...data.shares.map((row) => row[i]));
  const rows = data.shares.map((row, k) => [k === h ? `head ${k} (this one)` : `head ${k}`, digits(row[i]), bars(row[i], most, k === h ? 1 : 0)]);
  return scroll("What each head adds", table("Length of what each head adds alone", ["head", "length", ""], rows, [1]));
}
