FIGURES.tokens = (host, data) => {
  const buttons = el("div", { role: "group", "aria-label": "Tokens of the prompt" });
  const detail = el("div", { "aria-live": "polite" });
  const most = Math.max(...data.tokens.flatMap((t) => t.vector.map(Math.abs)));
  const pick = (n) => {
    Array.from(buttons.children).forEach((b, k) => b.setAttribute("aria-pressed", String(k === n)));
    const t = data.tokens[n];
    const vector = t.vector.slice(0, 8).map((x) => digits(x, 3)).join(", ");
    replace(
      detail,
      facts([["position", n], ["token", shown(t.text)], ["id", t.id], ["bytes (UTF-8)", t.utf8], ["length of the vector", digits(t.norm)]]),
      el("p", { class: "mono" }, `embedding: [${vector}, ...]`),
    );
  };
  data.tokens.forEach((t, n) => {
    const node = button("", () => pick(n));
    node.className = "token";
    node.append(shown(t.text), " ", el("small", {}, String(t.id)));
    buttons.append(node);
  });
  const vectors = el("div", {});
  const draw = () => replace(vectors, strips(data.tokens.map((t) => [short(t.text), t.vector, digits(t.norm, 3)]), most));
  REDRAW.push(draw);
  draw();
  pick(0);
  host.append(buttons, detail, el("figure", {}, el("figcaption", {}, `The first ${data.tokens[0].vector.length} of ${data.d_model} channels of each embedding: blue above 0, orange below; at the right the length of the whole vector`), vectors));
};
