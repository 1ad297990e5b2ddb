// A name that may be broken behind its points and underscores.
function breakable(name) {
  return el("span", {}, ...name.split(/(?<=[._])/).flatMap((part) => [part, el("wbr")]));
}

FIGURES.tree = (host, data) => {
  const kinds = [["stored", "as it is held in memory"], ["8", "float64"], ["4", "float32"], ["2", "bfloat16 or float16"], ["1.0625", "8-bit blocks (8.5 bits)"], ["0.5625", "4-bit blocks (4.5 bits)"]];
  const place = scroll("Tensors");
  const size = (t, kind) => (kind === "stored" ? t.bytes : t.shape.reduce((a, b) => a * b, 1) * Number(kind));
  const draw = (kind) => {
    const total = data.tensors.reduce((sum, t) => sum + t.count * size(t, kind), 0);
    const rows = data.tensors.map((t) => [breakable(t.name), `[${t.shape.join(", ")}]`, kind === "stored" ? t.dtype : kinds.find((k) => k[0] === kind)[1], String(t.count), commas(size(t, kind)), bars(t.count * size(t, kind), total)]);
    rows.push(["all", "", "", "", commas(total), bars(total, total)]);
    replace(place, table(`Tensors: ${bytes(total)} in all`, ["tensor", "shape", "type", "count", "bytes of one", "share of all"], rows, [3, 4]));
  };
  host.append(controls(select("Type of the weights", kinds, "stored", draw)), place);
  draw("stored");
};
