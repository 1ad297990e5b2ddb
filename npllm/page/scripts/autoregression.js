FIGURES.autoregression = (host, data) => {
  const text = el("p", { class: "loop" });
  const candidates = scroll("Candidates of this step");
  const draw = (at) => {
    const done = data.steps.slice(0, at).map((step) => step[0]);
    const given = data.prompt.map((t) => token(t));
    replace(text, ...given, ...done.map((t) => token(t, { class: "token new" })));
    const step = data.steps[Math.min(at, data.steps.length - 1)];
    const rows = step.map((t, k) => [k === 0 ? "→" : "", token(t), String(t.id), percent(t.p), bars(t.p, step[0].p, k === 0 ? 1 : 0)]);
    const title = at < data.steps.length
      ? `Step ${at + 1}: the five most likely tokens; the first one is appended`
      : `Step ${at}, the last one${data.stop.includes(step[0].id) ? ": a stop id, which ends the text" : ""}`;
    replace(candidates, table(title, ["", "token", "id", "probability", ""], rows, [2, 3]));
  };
  host.append(player("step", data.steps.length, draw), text, candidates);
  draw(0);
  host.querySelector(".controls").go(0);
};
