FIGURES.streams = (host, data) => {
  const n_layer = data.change.length;
  const name = (l) => (l === 0 ? "embedding" : `layer ${l - 1}`);
  const row = el("p", {});
  const named = (t, n, attributes, note) => editedToken(data, t, n, attributes, note);
  const draw = (l) => {
    const chips = data.tokens.map((t, n) => {
      const x = data.change[l][n];
      return named(t, n, { class: x > data.rounding[l] ? "token changed" : "token" }, changed(x, data.rounding[l]));
    });
    replace(row, ...chips);
  };
  const rows = data.tokens.map((t, n) => [named(t, n, {}, null), token(data.best[n]), token(data.edited_best[n])]);
  host.append(
    controls(slider("Compare the streams behind", 0, n_layer - 1, n_layer - 1, draw, { format: name })),
    el("figure", {}, el("figcaption", {}, "Each stream in both runs: the largest change of a channel"), row),
    scroll("Most likely next token of each stream", table("The most likely next token of each stream; only the last one is used", ["stream", "before the edit", "after the edit"], rows)),
  );
  draw(n_layer - 1);
};

// A token of the prompt; the last one with what it was edited to.
function editedToken(data, t, n, attributes, note) {
  const node = token(t, attributes, note);
  if (n === data.tokens.length - 1) node.firstChild.textContent += ` → ${shown(DATA.streams.edited.text)}`;
  return node;
}
