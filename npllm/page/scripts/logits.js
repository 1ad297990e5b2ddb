FIGURES.logits = (host, data) => {
  const all = [...data.named.map((t) => t.logit), ...data.others];
  const place = scroll("Most likely tokens");
  const draw = (n) => {
    const rows = data.named.slice(0, n).map((t, k) => [String(k + 1), token(t), String(t.id), fixed(t.logit, 3), percent(t.p, 3), bars(t.p, data.named[0].p)]);
    const sum = data.named.slice(0, n).reduce((s, t) => s + t.p, 0);
    replace(place, table(`The ${n} most likely of ${commas(data.n_vocab)} tokens: together ${percent(sum)}`, ["", "token", "id", "logit", "probability", ""], rows, [0, 2, 3, 4]));
  };
  const few = Math.min(10, data.named.length);
  host.append(controls(slider("Tokens shown", 1, Math.min(50, data.named.length), few, draw)), place, histogram(all));
  draw(few);
};

function histogram(values) {
  const [low, high] = [Math.floor(Math.min(...values)), Math.ceil(Math.max(...values))];
  const wide = Math.max(1, Math.ceil((high - low) / 40));
  const counts = range(Math.ceil((high - low) / wide) + 1).map(() => 0);
  values.forEach((x) => { counts[Math.floor((x - low) / wide)] += 1; });
  const at = counts.map((_, k) => low + k * wide);
  const label = `How many tokens have which logit, from ${low} to ${high}`;
  return lines(label, { series: [[`tokens in a step of ${wide}`, at, counts.map((c) => Math.max(c, 0.5))]], xTitle: "logit", yTitle: "tokens (logarithmic)", log: true });
}
