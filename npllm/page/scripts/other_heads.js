FIGURES.other_heads = (host, data) => {
  const place = el("p", {});
  const draw = (kind) => replace(place, ...data.tokens.map((t, n) => {
    const x = data.change[kind][n];
    return editedToken(data, t, n, { class: x > data.rounding ? "token changed" : "token" }, changed(x, data.rounding));
  }));
  host.append(
    el("h3", {}, "The last token edited, under two masks"),
    controls(radios("Mask", [["causal", "causal: a decoder"], ["bidirectional", "bidirectional: an encoder"]], "causal", draw)),
    place,
    el("p", {}, "The weights are those of this model, which was trained with the causal mask; only the mask differs. BERT runs in npllm as npllm.Encoder."),
  );
  draw("causal");
};
