FIGURES.packing = (host, data) => {
  const place = el("div", {});
  const draw = (kind) => replace(place, ...packedFigure(data, kind));
  host.append(
    el("figure", {}, el("figcaption", {}, `${data.documents.length} documents in rows of at most ${data.capacity} tokens; grey is padding up to the longest row`), scroll("Rows", rowsPicture(data)), legend(data.documents.map((tokens, d) => [DOCUMENT[d % 4], `document ${d}, ${many(tokens.length)}: ${plain(tokens)}`]))),
    facts([["share that is not padding, one document a row", percent(data.unpacked, 1)], ["share that is not padding, packed", percent(data.used, 1)]]),
    controls(radios("Mask", [["masked", "causal & documents"], ["leaky", "causal only: documents leak"]], "masked", draw)), place,
  );
  draw("masked");
};

// The text of a document, the beginning of a long one.
function plain(tokens) {
  const all = Array.from(tokens.map((t) => t.text).join("").trim());
  return all.length > 48 ? `${all.slice(0, 47).join("")}…` : all.join("");
}

const DOCUMENT = ["var(--accent)", "var(--second)", "var(--third)", "var(--fourth)"];

function rowsPicture(data) {
  const cell = 14;
  const longest = Math.max(...data.rows.map((row) => row.reduce((sum, d) => sum + data.documents[d].length, 0)));
  const node = svg(60 + longest * cell, data.rows.length * 30 + 6, `Documents packed into ${data.rows.length} rows`);
  data.rows.forEach((row, r) => {
    let start = 0;
    node.append(svgEl("text", { x: 0, y: r * 30 + 22 }, `row ${r}`));
    node.append(svgEl("rect", { x: 56, y: r * 30 + 6, width: longest * cell, height: 22, fill: "var(--line)", stroke: "var(--line)" }));
    row.forEach((d) => {
      const n = data.documents[d].length;
      node.append(svgEl("rect", { x: 56 + start * cell, y: r * 30 + 6, width: n * cell - 2, height: 22, fill: "var(--panel)", stroke: DOCUMENT[d % 4], "stroke-width": 3 }));
      node.append(svgEl("text", { x: 56 + start * cell + 6, y: r * 30 + 22 }, n * cell > 90 ? `document ${d}: ${n}` : String(d)));
      start += n;
    });
  });
  return node;
}

function packedFigure(data, kind) {
  const labels = data.together.flatMap((d) => data.documents[d].map(() => d));
  const n = labels.length;
  const visible = (i, j) => j <= i && (kind === "leaky" || labels[i] === labels[j]);
  const cell = n > 40 ? 7 : 10;
  const colour = (i, j) => (i === j ? "var(--current)" : visible(i, j) ? "var(--allowed)" : "var(--excluded)");
  const map = heatmap(n, n, "What each slot of the packed row sees", { cell, colour });
  const leak = kind === "leaky" ? data.leak : data.leak_masked;
  const rows = data.together.flatMap((d, k) => data.alone[k].map((x, t) => [String(d), token(data.documents[d][t + 1]), fixed(x, 3), fixed(data[kind][k][t], 3), fixed(Math.abs(data[kind][k][t] - x), 3)]));
  return [
    facts([[`leak: the largest change of a log-probability${kind === "masked" ? " (rounding)" : ""}`, digits(leak, 3)]]),
    el("figure", {}, el("figcaption", {}, `One row with the documents ${data.together.join(", ")}`), MASK.key(), scroll("Mask of the packed row", map)),
    scroll("Log-probabilities", table("Log-probability of each token: alone, and in the packed row", ["document", "token", "alone", "packed", "change"], rows, [0, 2, 3, 4])),
  ];
}
