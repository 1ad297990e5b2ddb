FIGURES.feedforward = (host, data) => {
  const most = Math.max(...data.neurons.map((n) => Math.abs(n.activation)));
  const rows = data.neurons.map((n) => [String(n.neuron), fixed(n.activation), bars(Math.abs(n.activation), most, n.activation < 0 ? 1 : 0), el("span", {}, ...n.tokens.map((t) => token(t)))]);
  const told = el("p", { class: "status", role: "status" });
  const largest = Math.max(...data.activations.map(Math.abs));
  const draw = (share) => {
    const n = data.activations.filter((a) => Math.abs(a) >= (share / 100) * largest).length;
    told.textContent = `${commas(n)} of ${commas(data.d_ff)} neurons (${percent(n / data.d_ff, 1)}) are at least ${share} % as active as the most active one`;
  };
  const place = el("div", {});
  const strip64 = () => replace(place, ...range(Math.ceil(data.d_ff / 256)).map((k) => strip(data.activations.slice(256 * k, 256 * (k + 1)), `Neurons ${256 * k} to ${Math.min(data.d_ff, 256 * (k + 1)) - 1}`, largest)));
  REDRAW.push(strip64);
  strip64();
  host.append(
    scroll("Most active neurons", table("Most active neurons", ["neuron", "activation a", "", "tokens that it makes likelier"], rows, [0, 1])),
    controls(slider("Threshold, in % of the largest", 1, 100, 10, draw)), told,
    el("figure", {}, el("figcaption", {}, "The activations of all neurons, 256 in a line: blue above 0, orange below"), place),
  );
  draw(10);
};
