// Controls: each has a label; what it says is read out when it changes.
let counter = 0;

function slider(label, min, max, value, change, options = {}) {
  const id = `control-${(counter += 1)}`;
  const format = options.format || String;
  const input = el("input", { type: "range", id, min, max, step: options.step || 1, value });
  const output = el("output", { for: id });
  const update = () => {
    const x = Number(input.value);
    output.textContent = format(x);
    input.setAttribute("aria-valuetext", format(x));
  };
  input.addEventListener("input", () => {
    update();
    change(Number(input.value));
  });
  update();
  const node = el("div", { class: "control" }, el("label", { for: id }, label), input, output);
  node.set = (x) => {
    input.value = x;
    update();
  };
  return node;
}

function select(label, options, value, change) {
  const id = `control-${(counter += 1)}`;
  const input = el("select", { id });
  for (const [key, text] of options) input.append(el("option", { value: key }, text));
  input.value = value;
  input.addEventListener("change", () => change(input.value));
  return el("div", { class: "control" }, el("label", { for: id }, label), input);
}

function radios(legend, options, value, change) {
  const name = `control-${(counter += 1)}`;
  const one = ([key, text]) => {
    const input = el("input", { type: "radio", name, value: key });
    input.checked = key === value;
    input.addEventListener("change", () => change(key));
    return el("label", {}, input, " " + text);
  };
  return el("fieldset", {}, el("legend", {}, legend), ...options.map(one));
}

function button(text, click) {
  const node = el("button", { type: "button" }, text);
  node.addEventListener("click", click);
  return node;
}

// Play, step and step back over n + 1 states, 0 ... n; `change` is called with the state.
function player(what, n, change, start = 0) {
  let at = start;
  let timer = null;
  const status = el("output", { role: "status" });
  const go = (to) => {
    at = Math.max(0, Math.min(n, to));
    back.disabled = at === 0;
    next.disabled = at === n;
    if (at === n) stop();
    status.textContent = `${what} ${at} of ${n}`;
    change(at);
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  };
  const play = button("Play", () => {
    if (timer !== null) return stop();
    play.textContent = "Pause";
    if (at === n) go(0);
    timer = setInterval(() => go(at + 1), 900);
  });
  const back = button("Step back", () => go(at - 1));
  const next = button("Step", () => go(at + 1));
  const node = el("div", { class: "controls" }, play, back, next, status);
  node.go = go;
  return node;
}

function controls(...nodes) {
  return el("div", { class: "controls" }, ...nodes);
}

function tokenOptions(tokens) {
  return tokens.map((t, k) => [String(k), `${k}: ${short(t.text, 16)}`]);
}
