FIGURES.norms = (host, data) => {
  const old = ["x", "multi-head attention", "add x", "LayerNorm", "feed-forward network, ReLU", "add", "LayerNorm"];
  const now = ["x", "RMSNorm", "attention: GQA, RoPE on q and k", "add x", "RMSNorm", "feed-forward network, SwiGLU", "add"];
  const place = el("div", {});
  const draw = () => replace(place, strips([["x", "x"], ["LayerNorm", "layer_norm"], ["RMSNorm", "rms_norm"], ["with the gain", "with_gain"]].map(([name, key]) => [name, data.vectors[key], `rms ${digits(data.rms[key], 3)}`])));
  REDRAW.push(draw);
  draw();
  const names = { x: "x", layer_norm: "LayerNorm(x), no gain", rms_norm: "RMSNorm(x), no gain", with_gain: "RMSNorm(x) with the model's gain" };
  const rows = Object.keys(names).map((name) => [names[name], Math.abs(data.mean[name]) < 1e-12 ? "0" : digits(data.mean[name]), digits(data.rms[name])]);
  host.append(
    el("div", { class: "pair" }, blockPicture("2017: post-norm", old, [3, 6]), blockPicture("2024: pre-norm", now, [1, 4])),
    el("h3", {}, `The stream in front of layer ${data.layer}, last position`),
    el("figure", {}, el("figcaption", {}, `The first ${data.vectors.x.length} channels, each line in its own scale; mean and rms are those of all channels`), place),
    scroll("Mean and root mean square", table("RMSNorm leaves the mean in; LayerNorm removes it", ["vector", "mean", "root mean square"], rows, [1, 2])),
    activations(data),
  );
};

function blockPicture(title, parts, norms) {
  const node = svg(262, 30 + parts.length * 44, `${title}: ${parts.join(", then ")}`);
  node.append(svgEl("text", { x: 30, y: 16, "font-weight": "bold" }, title));
  const y = (k) => 28 + k * 44;
  parts.forEach((text, k) => {
    const add = text.startsWith("add");
    if (k > 0) node.append(svgEl("path", { d: `M140 ${y(k) - 16} V${y(k)} m-4 -6 l4 6 l4 -6`, stroke: "var(--soft)", fill: "none" }));
    node.append(svgEl("rect", { x: 30, y: y(k), width: 222, height: 28, rx: add ? 14 : 4, fill: norms.includes(k) ? "var(--allowed)" : "var(--panel)", stroke: "var(--line)" }));
    node.append(svgEl("text", { x: 141, y: y(k) + 18, "text-anchor": "middle" }, text));
  });
  let from = 0;
  parts.forEach((text, k) => {
    if (!text.startsWith("add")) return;
    node.append(svgEl("path", { d: `M30 ${y(from) + 14} H10 V${y(k) + 14} H28 m-6 -4 l6 4 l-6 4`, stroke: "var(--current)", fill: "none", "stroke-width": 1.5 }));
    from = norms.includes(k + 1) && title.startsWith("2017") ? k + 1 : k;
  });
  return scroll(title, node);
}

function activations(data) {
  const place = el("div", {});
  const draw = (k) => {
    const x = data.at[k];
    const rows = Object.entries(data.curves).map(([name, ys]) => [name, digits(ys[k], 4)]);
    replace(place, lines("Activations", { series: Object.entries(data.curves).map(([name, ys]) => [name, data.at, ys]), xTitle: "x", yTitle: "activation", at: x }), table(`At x = ${x}`, ["activation", "value"], rows, [1]));
  };
  draw(40);
  return el("div", {}, el("h3", {}, "Activations"), controls(slider("x", 0, data.at.length - 1, 40, draw, { format: (k) => String(data.at[k]) })), place);
}
