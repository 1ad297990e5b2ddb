"""Mistakes that are no convention: another input, another layer's weights, a term left out."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from npllm.errors import NpllmError
from npllm.testing.arithmetic import UNITS
from npllm.testing.exact import gold
from npllm.testing.forms.attention import operands
from npllm.testing.forms.common import NotApplicableError
from npllm.testing.inputs import f64
from npllm.tracing.comparison.graft import NotRecordedError, Run, real_entries
from npllm.tracing.comparison.levels import Level
from npllm.tracing.comparison.nodes import Exact
from npllm.tracing.comparison.operations import call_of, value_of

__all__ = ["last_roundings", "plain_attempts", "short_name", "wired"]

Array = Any
Attempt = tuple[str, Array]

CACHE_FAULTS = ("another request's rows", "new row not written", "one slot early")
MOST_LAYERS = 4  # whose weights are tried
CLOSE = 2.0  # budgets
SAME = 1e-5  # of the mean error, which another computation must explain


def wired(run: Run, name: str, t: int, exact: Exact, x: Array) -> str:
    """Say which other computation a value is the result of; empty where none is found."""
    level = run.levels(x)[-1]
    allowed, wide = exact.error(level), f64(x)
    if not (np.isfinite(wide).all() and np.isfinite(exact.value).all()):
        return ""
    scale = np.mean(np.abs(wide - exact.value))
    floor = CLOSE * allowed + SAME * scale if exact.call.arrange is None else 1e-9 * scale
    is_view = exact.call.arrange is not None
    real = real_entries(name, exact.value.shape, run.settings[t].step)
    for text, y in _attempts(run, name, t, exact):
        with np.errstate(all="ignore"):
            own = 0.0 if is_view else CLOSE * last_roundings(level, y)
            is_same = (np.abs(wide - y) <= floor + own) | np.isnan(y)
        if real is not None:
            is_same = is_same | ~real
        if is_same.all():
            return text
    return ""


def last_roundings(level: Level, y: Array) -> Array:
    """What another answer than ours may be off by on its own: eight roundings of each entry."""
    unit = max(UNITS[level.dtype], UNITS[level.accumulate])
    return 8 * level.roundings * unit * np.abs(y)


def _attempts(run: Run, name: str, t: int, exact: Exact) -> Iterator[Attempt]:
    yield from plain_attempts(run, name, t, exact)
    yield from _other_inputs(run, name, t, exact)
    yield "the output is zero", np.zeros_like(exact.value)


def plain_attempts(run: Run, name: str, t: int, exact: Exact) -> Iterator[Attempt]:
    """List other computations on the same inputs: what they are, and their result."""
    op, a = run.graphs[t][name].op, exact.call.arguments
    if op == "linear":
        yield from _of_linear(run, name, t, exact)
    if op == "add":
        yield "the first term is left out", a["y"]
        yield "the second term is left out", a["x"]
    if op == "swiglu":
        yield "no gate: up alone", a["up"]
        yield "sigmoid in place of SiLU", a["up"] / (1 + np.exp(-a["gate"]))
        yield "ReLU in place of SiLU", np.maximum(a["gate"], 0) * a["up"]
        for kind, text in (("none", ""), ("tanh", " (tanh)")):
            gelu = gold("gelu", {"x": a["gate"], "approximate": kind})
            yield f"GELU in place of SiLU{text}", gelu * a["up"]
    if op == "attention" and not run.settings[t].step.valid.all():
        yield "C23 padding enters", _with_padding(run, name, t)
    if op == "cache":
        yield from _of_cache(run, name, t, exact)
    if op == "view":
        yield from _of_view(run, name, exact)
    if op in ("rope", "rms_norm", "swiglu"):
        yield f"{op} is left out", a.get("x", a.get("gate"))


def _with_padding(run: Run, name: str, t: int) -> Array:
    """Attention that sees the padding as well, with the values that it holds."""
    node, setting = run.graphs[t][name], run.settings[t]
    step = setting.step._replace(valid=np.ones_like(setting.step.valid))
    inputs = [run.with_padding(other, t) for other in node.inputs]
    return value_of(call_of(name, node, inputs, setting._replace(step=step)), name)


def _of_linear(run: Run, name: str, t: int, exact: Exact) -> Iterator[Attempt]:
    """Without the bias; with the weights of another layer."""
    a = exact.call.arguments
    if a["bias"] is not None:
        yield "the bias is left out", exact.value - f64(a["bias"])
    node, setting = run.graphs[t][name], run.settings[t]
    parts = name.split(".")
    if not name.startswith("model.layers."):
        return
    number = int(parts[2])
    near = sorted(range(run.config.num_hidden_layers), key=lambda n: abs(n - number))
    for other in near[1 : 1 + MOST_LAYERS]:
        weights = tuple(w.replace(f".{number}.", f".{other}.", 1) for w in node.weights)
        call = call_of(name, node._replace(weights=weights), [a["x"]], setting)
        yield f"the weights are those of layer {other}", value_of(call, name)


def _of_cache(run: Run, name: str, t: int, exact: Exact) -> Iterator[Attempt]:
    """C32: rows that are not those of the request, or are in another slot; NaN where they are
    padding, which may be anything.
    """
    parts = list(exact.call.arguments.values())
    real = real_entries(name, exact.value.shape, run.settings[t].step)
    held = exact.value if real is None else np.where(real, exact.value, np.nan)
    new = parts[-1]
    for option in CACHE_FAULTS:
        try:
            inputs = {"q": new, "k": held, "v": held}
            yield f"C32 {option}", operands(inputs, {"C32": option}, np.float64)[1]
        except NotApplicableError:
            continue
    if len(parts) > 1:
        yield "the cached rows are left out", np.zeros_like(exact.value)
        yield "the new rows stand first", np.concatenate(parts[::-1], axis=-2)


def _of_view(run: Run, name: str, exact: Exact) -> Iterator[Attempt]:
    """C7, C6 and C22: other rows of a fused projection; C31: heads that were not moved."""
    leaf, x = name.rsplit(".", 1)[-1], exact.call.arguments["input0"]
    if leaf in ("gate", "up"):
        half = x.shape[-1] // 2
        yield "C7 up first", x[..., half:] if leaf == "gate" else x[..., :half]
        yield "C7 interleaved", x[..., 0::2] if leaf == "gate" else x[..., 1::2]
    if leaf in ("q_proj", "k_proj", "v"):
        from npllm.tracing.comparison.row_orders import qkv_index

        for order in ("per-head interleave", "k and v swapped", "q and k swapped"):
            convention = "C6" if order == "per-head interleave" else "C22"
            mixed = x[..., qkv_index(run.config, order)]
            yield f"{convention} {order}", exact.call.arrange(mixed)  # type: ignore[misc]
        y = exact.value
        yield "C31 heads not moved", np.swapaxes(y, -2, -3).reshape(y.shape)
    if leaf == "attention":
        yield "C31 output position-major", x.reshape(exact.value.shape)


def _other_inputs(run: Run, name: str, t: int, exact: Exact) -> Iterator[Attempt]:
    """The operation on another recorded value of the same shape, of the same layer."""
    node = run.graphs[t][name]
    if exact.call.op not in ("linear", "rms_norm", "add", "swiglu", "attention"):
        return
    values = [one.value for one in exact.inputs]
    for place, right in enumerate(node.inputs):
        for other in _alike(run, name, t, values[place].shape, node.inputs):
            try:
                inputs = [*values]
                inputs[place] = run.known(other, t).value
                if np.array_equal(inputs[place], values[place]):
                    continue
                call = call_of(name, node, inputs, run.settings[t])
                yield (
                    f"reads {short_name(other)} in place of {short_name(right)}",
                    value_of(call, name),
                )
            except (NotRecordedError, NpllmError, ValueError):
                continue


def _alike(run: Run, name: str, t: int, shape: tuple, used: tuple) -> list[str]:
    """Recorded values of the same layer, and the one it reads, that have a shape."""
    names = [*run.graphs[t]]
    at = names.index(name)
    near = names[max(0, at - 26) : at]
    found = []
    for other in near:
        if other not in used and run.has(other, t):
            if run.raw(other, t).shape == shape:
                found.append(other)
    return found


def short_name(name: str) -> str:
    """Write a value's name without its layer."""
    if not name.startswith("model.layers."):
        return name
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    return rest or f"the output of layer {number}"
