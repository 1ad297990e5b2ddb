FIGURES.forward = (host, data) => {
  const rows = Object.entries(data.parameters).map(([name, n]) => [name, commas(n), percent(n / data.total, 1), bars(n, data.total)]);
  rows.push(["all", commas(data.total), "100.0 %", bars(data.total, data.total)]);
  host.append(scroll("Parameters by part", table("Parameters by part", ["part", "parameters", "share", ""], rows, [1, 2])));
};
