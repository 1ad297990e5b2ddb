FIGURES.block = (host, data) => {
  const place = el("div", {});
  const n_layer = data.attention.length;
  const draw = (n) => {
    const pick = (rows) => rows.map((row) => row[n]);
    const layers = range(n_layer);
    replace(place,
      lines("Length of the residual stream and of what is added to it, by layer", { series: [["stream behind the layer", layers, pick(data.stream).slice(1)], ["attention adds", layers, pick(data.attention)], ["feed-forward network adds", layers, pick(data.mlp)]], xTitle: "layer", yTitle: "length of the vector (logarithmic)", log: true }),
      shares(pick(data.stream), pick(data.attention), pick(data.mlp)),
    );
  };
  const last = data.tokens.length - 1;
  host.append(
    controls(select("Position", tokenOptions(data.tokens), String(last), (k) => draw(Number(k)))),
    place,
    el("h3", {}, "Logit lens at the last position"),
    lens(data),
  );
  draw(last);
};

function shares(stream, attention, mlp) {
  const rows = attention.map((a, l) => [String(l), digits(stream[l + 1]), digits(a), digits(mlp[l]), percent(a / (a + mlp[l]), 1), new Bars([[a, 1], [mlp[l], 2]], Math.max(...attention, ...mlp))]);
  const node = el("details", {}, el("summary", {}, "The numbers of every layer"));
  node.append(scroll("Numbers of every layer", table("Lengths of vectors (orange: attention, green: feed-forward network)", ["layer", "stream", "attention", "feed-forward", "attention's share", ""], rows, [0, 1, 2, 3, 4])));
  return node;
}

function lens(data) {
  const rows = data.lens.map((row) => [row.name, commas(row.rank), percent(row.probability), bars(row.probability, 1), fixed(row.kl, 3), el("span", {}, ...row.top.map((t) => token(t, {}, percent(t.p, 1))))]);
  return scroll("Logit lens", table("What each layer would predict: rank and probability of the model's own choice, KL divergence in nats, best three tokens", ["layer", "rank", "probability", "", "KL", "most likely"], rows, [1, 2, 4]));
}
