FIGURES.rope = (host, data) => {
  const hands = el("div", {});
  const drawHands = (m) => replace(hands, handsPicture(data, m), matrixTable(data, m));
  const score = el("div", {});
  const state = { head: 0, distance: 8 };
  const drawScore = () => {
    const at = range(data.scores[0][0].length);
    const series = data.starts.map((start, k) => [`key at position ${start}`, at, data.scores[k][state.head]]);
    const rows = data.starts.map((start, k) => [String(start), String(start + state.distance), fixed(data.scores[k][state.head][state.distance], 3)]);
    replace(score, lines(`Score of head ${state.head} by distance`, { series, xTitle: "distance of query and key", yTitle: "score", at: state.distance }), scroll("Scores", table(`Distance ${state.distance}: the same score wherever the pair stands`, ["position of the key", "of the query", "score"], rows, [0, 1, 2])));
  };
  const change = (name) => (x) => {
    state[name] = Number(x);
    drawScore();
  };
  const heads = data.scores[0].map((_, h) => [String(h), `head ${h}`]);
  const pairing = el("div", {});
  const drawPairing = (kind) => replace(pairing, pairingPicture(data.d_rope, kind));
  host.append(
    controls(slider("Position m", 0, data.n_positions - 1, 3, drawHands)), hands,
    el("h3", {}, "The score depends on the distance only"),
    el("p", {}, `Query and key of the last token in layer ${data.layer}, before the rotation, put at other positions.`),
    controls(select("Head", heads, "0", change("head")), slider("Distance", 0, data.scores[0][0].length - 1, 8, change("distance"))), score,
    el("h3", {}, "Which channels make a pair"),
    controls(radios("Pairing", [["half", "half-split: i and i + d/2 (npllm, Transformers)"], ["interleaved", "interleaved: 2i and 2i + 1 (the paper, GGUF)"]], "half", drawPairing)), pairing,
  );
  drawHands(3);
  drawScore();
  drawPairing("half");
};

function handsPicture(data, m) {
  const figure = el("div", { class: "cells" });
  data.inv_freq.forEach((f, i) => {
    const angle = m * f;
    const label = `pair ${i}: ${digits(angle, 4)} rad`;
    const node = svg(56, 68, label);
    node.append(svgEl("circle", { cx: 28, cy: 28, r: 24, fill: "none", stroke: "var(--line)" }), svgEl("line", { x1: 28, y1: 28, x2: 28 + 22 * Math.cos(angle), y2: 28 - 22 * Math.sin(angle), stroke: "var(--current)", "stroke-width": 2.5 }), svgEl("text", { x: 28, y: 65, "text-anchor": "middle" }, angle !== 0 && angle < 0.001 ? angle.toExponential(0) : digits(angle, 3)));
    node.append(svgEl("title", {}, label));
    figure.append(node);
  });
  return el("figure", {}, el("figcaption", {}, `The ${data.inv_freq.length} pairs of channels at position ${m}: a hand for each, below it the angle in radians`), figure);
}

function matrixTable(data, m) {
  const rows = data.matrix[m].map((row) => row.map((x) => fixed(x, 4)));
  return table(`Rotation matrix of pair 0 at position ${m}`, ["first channel", "second channel"], rows, [0, 1]);
}

function pairingPicture(d, kind) {
  const cell = Math.max(5, Math.min(15, Math.floor((room() - 12) / d)));
  const label = kind === "half" ? `Channel i is paired with channel i + ${d / 2}` : "Channel 2i is paired with channel 2i + 1";
  const tall = kind === "half" ? 110 : 40;
  const node = svg(d * cell + 10, tall + 40, label);
  const wide = Math.max(3, cell - 3);
  const x = (c) => 5 + (c + 0.5) * cell;
  const colour = (i) => ["var(--accent)", "var(--second)", "var(--third)", "var(--fourth)"][i % 4];
  range(d / 2).forEach((i) => {
    const [a, b] = kind === "half" ? [i, i + d / 2] : [2 * i, 2 * i + 1];
    node.append(svgEl("path", { d: `M${x(a)} ${tall} C${x(a)} ${kind === "half" ? 4 : 12} ${x(b)} ${kind === "half" ? 4 : 12} ${x(b)} ${tall}`, fill: "none", stroke: colour(i), "stroke-width": 1.2 }));
    [a, b].forEach((c) => node.append(svgEl("rect", { x: x(c) - wide / 2, y: tall, width: wide, height: 16, fill: colour(i) })));
  });
  range(d).filter((c) => c % 8 === 0 || c === d - 1).forEach((c) => node.append(svgEl("text", { x: x(c), y: tall + 32, "text-anchor": "middle" }, String(c))));
  return el("figure", {}, el("figcaption", {}, `${label}; colours repeat, one for each pair`), scroll(label, node));
}
