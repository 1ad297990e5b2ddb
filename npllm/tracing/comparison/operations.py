"""The nodes of the graph as calls of `npllm.testing.gold` and `npllm.testing.budget`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from npllm import ops
from npllm.models import rope
from npllm.testing.budgets import Budget, budget
from npllm.testing.exact import gold
from npllm.testing.inputs import f64
from npllm.tracing.comparison.parameters import Weights
from npllm.tracing.comparison.steps import Step, visible
from npllm.tracing.graph import Node

__all__ = ["Call", "Setting", "call_of", "own_budget", "value_of"]

Array = Any

BLOCK = 8192  # rows of a weight matrix that are widened at a time

ARGUMENTS = {
    "tables": (),
    "embed": (),
    "rms_norm": ("x",),
    "linear": ("x",),
    "rope": ("x", "cos", "sin"),
    "attention": ("q", "k", "v"),
    "swiglu": ("gate", "up"),
    "add": ("x", "y"),
}
"""The arguments that a node's inputs are, in their order.  "view" and "cache" arrange theirs."""


class Setting(NamedTuple):
    """What a node needs besides its inputs.

    Parameters
    ----------
    config : Config
    step : Step
    weights : Weights
    documents : integer array, optional
        Labels of packed documents, where attention keeps them apart.
    n_kept : int
        Positions that the head scores.
    """

    config: Any
    step: Step
    weights: Weights
    documents: Array
    n_kept: int


class Call(NamedTuple):
    """An operation with its arguments.

    Parameters
    ----------
    op : str
        As in `npllm.testing.budget`; "tables"; or "view", which only arranges its inputs.
    arguments : dict
        By parameter name.
    inputs : tuple of str
        Which of them other nodes have made.
    arrange : function (*inputs) -> array, optional
        What a view does; works on values and on their errors.
    """

    op: str
    arguments: dict[str, Any]
    inputs: tuple[str, ...]
    arrange: Callable[..., Array] | None = None


def call_of(name: str, node: Node, inputs: Sequence[Array], setting: Setting) -> Call:
    """Make the call that computes a value.

    Parameters
    ----------
    name : str
        Of the value, without its step.
    node : Node
    inputs : sequence of float64 array
        In the order of `node.inputs`; of a cache the past, where there is one, and the new rows.
    setting : Setting
    """
    if node.op in ("view", "cache"):
        arrange = _joined if node.op == "cache" else _view(name, setting)
        names = tuple(f"input{n}" for n in range(len(inputs)))
        return Call("view", dict(zip(names, inputs, strict=True)), names, arrange)
    if node.op == "tables":
        return Call("tables", table_arguments(setting.config, setting.step), ())
    names = ARGUMENTS[node.op]
    arguments = dict(zip(names, inputs, strict=True))
    if node.op == "embed":
        rows = ops.embed(setting.step.ids.ravel(), setting.weights.weight(node.weights[0]))
        order = np.arange(setting.step.ids.size).reshape(setting.step.ids.shape)
        return Call("embed", {"ids": order, "weight": rows}, ())
    if node.op == "rms_norm":
        gain = setting.weights.weight(node.weights[0])
        arguments |= {"weight": f64(gain), "eps": setting.config.rms_norm_eps}
    if node.op == "linear":
        arguments |= {"weight": setting.weights.weight(node.weights[0])}
        arguments |= {"bias": setting.weights.bias(node.weights[0])}
    if node.op == "attention":
        arguments |= {"mask": mask_of(setting, inputs[1].shape[-2]), "causal": False}
    return Call(node.op, arguments, names)


def mask_of(setting: Setting, n_ctx: int) -> Array:
    """Which keys each query sees, bool [n_batch, 1, n_seq, n_ctx]."""
    return visible(setting.step, n_ctx, setting.config.sliding_window, setting.documents)


def table_arguments(config: Any, step: Step) -> dict[str, Any]:
    """Arguments of "rope" that make cos of the first half of a head, and sin of the second.

    A head of ones and then zeros turns into cos and sin.
    """
    half = config.d_rope // 2
    lengths = step.positions.max(axis=1) + 1
    rows = [rope.frequencies(config, rope.frequency_choice(config, int(n))) for n in lengths]
    inv_freq = f64(np.stack([np.asarray(row) for row in rows]))[:, None, None, :]
    base = float(config.rope_parameters.rope_theta)
    exponent = np.arange(0, config.d_rope, 2) / config.d_rope
    head = np.repeat([1.0, 0.0], half)
    return {
        "x": np.broadcast_to(head, (*step.positions.shape, config.d_rope))[:, None],
        "positions": step.positions,
        "base": base,
        "d_rope": config.d_rope,
        "factors": base**-exponent / inv_freq,
        "magnitude": rope.attention_factor(config),
    }


def value_of(call: Call, name: str) -> Array:
    """Evaluate a call in float64."""
    if call.arrange is not None:
        return call.arrange(*(call.arguments[one] for one in call.inputs))
    if call.op == "tables":
        return table_part(gold("rope", call.arguments), name)
    if call.op == "linear" and len(call.arguments["weight"]) > BLOCK:
        return np.concatenate(
            [gold("linear", part.arguments) for part in linear_blocks(call)], axis=-1
        )
    return gold(call.op, call.arguments)


def linear_blocks(call: Call) -> list[Call]:
    """Cut a large matrix into blocks of rows, each a call of its own."""
    weight, bias = call.arguments["weight"], call.arguments["bias"]
    if hasattr(weight, "widened") or len(weight) <= BLOCK:
        return [call]
    return [
        call._replace(
            arguments=call.arguments
            | {"weight": weight[start : start + BLOCK]}
            | {"bias": None if bias is None else bias[start : start + BLOCK]}
        )
        for start in range(0, len(weight), BLOCK)
    ]


def own_budget(call: Call, name: str, arithmetic: dict[str, Any], like: Array) -> Budget:
    """The budget of a call alone, with exact inputs; zeros for a view."""
    if call.arrange is not None:
        zero = np.zeros_like(like)
        return Budget(zero, zero, np.ones_like(like))
    if call.op == "tables":
        found = budget("rope", call.arguments, **arithmetic | {"accumulate": "float32"})
        return Budget(*(table_part(part, name) for part in found))
    return budget(call.op, call.arguments, **arithmetic)


def table_part(x: Array, name: str) -> Array:
    """Cut the table of a name from [n_batch, 1, n_seq, d_rope]: columns i and i + d_rope/2 are
    equal.
    """
    half = x.shape[-1] // 2
    part = x[:, 0, :, :half] if name.endswith(".cos") else x[:, 0, :, half:]
    return np.concatenate([part, part], axis=-1)


def _joined(*parts: Array) -> Array:
    return np.concatenate(parts, axis=-2)


def _view(name: str, setting: Setting) -> Callable[..., Array]:
    """What a view does with its input."""
    config, leaf = setting.config, name.rsplit(".", 1)[-1]
    n_q, n_kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if name == "lm_head.input":
        return lambda x: x[:, -setting.n_kept :]
    if leaf == "attention":
        return merged
    if leaf in ("gate", "up"):
        half = config.intermediate_size
        part = slice(0, half) if leaf == "gate" else slice(half, 2 * half)
        return lambda x: x[..., part]
    first = {"q_proj": 0, "k_proj": n_q, "v": n_q + n_kv}[leaf]
    count = n_q if leaf == "q_proj" else n_kv
    return lambda x: cut_heads(x[..., first * d : (first + count) * d], count)


def cut_heads(x: Array, n_head: int) -> Array:
    """[n_batch, n_seq, n_head*d] -> [n_batch, n_head, n_seq, d]."""
    return np.swapaxes(x.reshape(*x.shape[:-1], n_head, -1), -2, -3)


def merged(x: Array) -> Array:
    """[n_batch, n_head, n_seq, d] -> [n_batch, n_seq, n_head*d]."""
    x = np.swapaxes(x, -2, -3)
    return x.reshape(*x.shape[:-2], -1)
