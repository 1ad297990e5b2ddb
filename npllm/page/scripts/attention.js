FIGURES.attention = (host, data) => {
  const n = data.tokens.length;
  const state = { head: telling(data), position: n - 1, step: 8 };
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
  const steps = player("step", 8, (k) => {
    state.step = Math.max(1, k);
    draw();
  }, 8);
  host.append(controls(select(`Head of layer ${data.layer}`, heads, String(state.head), change("head")), select("Position of the query", tokenOptions(data.tokens), String(n - 1), change("position"))), steps, list);
  REDRAW.push(draw);
  steps.go(8);
};

// The head whose last query looks most at one earlier token, the first one left out.
function telling(data) {
  const last = data.tokens.length - 1;
  const most = data.weights.map((head) => Math.max(0, ...head[last].slice(1, last)));
  return most.indexOf(Math.max(...most));
}

function attentionSteps(data, h, i) {
  const g = Math.floor(h / data.group);
  const scores = data.scores[h][i];
  const keys = range(scores.length).filter((j) => scores[j] !== null);
  const w = data.weights[h][i];
  const name = (j) => `${j} ${short(data.tokens[j].text)}`;
  const most = (rows) => Math.max(...rows.flatMap((row) => row.map(Math.abs)));
  const weighted = keys.map((j) => data.v[g][j].map((x) => w[j] * x));
  const after = data.stream[i].map((x, c) => x + data.added[i][c]);
  return [
    ["The normalised vector x of the current position", strips([[name(i), data.x[i], `length ${digits(data.lengths.x[i])}`]])],
    ["Its query, after the rotation by its position", strips([[`q of head ${h}`, data.q[h][i], `length ${digits(data.lengths.q[h][i])}`]])],
    [`The keys and values of the visible positions (key/value head ${g})`, el("div", { class: "pair" }, el("div", {}, "Keys", strips(keys.map((j) => [name(j), data.k[g][j], digits(data.lengths.k[g][j], 3)]), most(keys.map((j) => data.k[g][j])))), el("div", {}, "Values", strips(keys.map((j) => [name(j), data.v[g][j], digits(data.lengths.v[g][j], 3)]), most(keys.map((j) => data.v[g][j])))))],
    ["Scores, and their softmax", scoreTable(data, keys, scores, w, g, i)],
    ["Each value times its weight", strips(keys.map((j, k) => [name(j), weighted[k], digits(w[j] * data.lengths.v[g][j], 3)]), most(weighted))],
    ["Their sum: the output of this head", strips([[`head ${h}`, data.output[h][i], `length ${digits(data.lengths.output[h][i])}`]])],
    ["W_o maps the outputs of all heads back: what each head adds", el("div", {}, headShares(data, h, i), strips([["all heads", data.added[i], `length ${digits(data.lengths.added[i])}`]]))],
    ["The sum goes into the residual stream", strips([["before", data.stream[i], digits(data.lengths.stream[i])], ["added", data.added[i], digits(data.lengths.added[i])], ["after", after, digits(data.lengths.after[i])]], most([data.stream[i], after]))],
  ];
}

function scoreTable(data, keys, scores, w, g, i) {
  const rows = keys.map((j) => [String(j), token(data.tokens[j], j === i ? { class: "token new" } : {}), fixed(scores[j], 3), fixed(w[j], 4), bars(w[j], 1), fixed(w[j] * data.lengths.v[g][j], 4)]);
  const sum = keys.reduce((s, j) => s + w[j], 0);
  return scroll("Scores and weights", table(`The weights sum to ${fixed(sum, 3)}; positions after the query are excluded`, ["", "key", "score", "weight", "", "|w v|"], rows, [0, 2, 3, 5]));
}

function headShares(data, h, i) {
  const most = Math.max(...data.shares.map((row) => row[i]));
  const rows = data.shares.map((row, k) => [k === h ? `head ${k} (this one)` : `head ${k}`, digits(row[i]), bars(row[i], most, k === h ? 1 : 0)]);
  return scroll("What each head adds", table("Length of what each head adds alone", ["head", "length", ""], rows, [1]));
}
