"""The time of every operation of a run, beside the limits of the machine.

An operation of F flops that moves B bytes takes at least max(F / sgemm, B / read) seconds; sgemm
and read are the machine's own rates, measured by `machine_limits`.  Its share of the limit is this
bound over the measured time.

Source: "Roofline: An Insightful Visual Performance Model for Multicore Architectures" (Williams,
Waterman and Patterson 2009).
"""

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from npllm.analysis.cost import COUNTS, bytes_moved
from npllm.analysis.limits import machine_limits, seconds
from npllm.arrays import array_namespace, to_numpy
from npllm.errors import NpllmValueError
from npllm.kernels.compilation import working_seconds
from npllm.model import Model
from npllm.ops import Ops, split_qkv

__all__ = ["machine_limits", "profile", "seconds", "timed_ops"]

Array = Any
Calls = dict[tuple[str, tuple[int, ...] | None], Any]  # (op, shape of its weight) -> see timed_ops

TAKEN_APART = {"attention_block", "mlp_block", "decoder_layers", "decode_step"}
"""Kernels that are left out, so that each product gets a row of its own."""


def profile(
    model: Model,
    *,
    n_prompt: int = 51,
    n_new: int = 8,
    repeat: int = 3,
    limits: dict[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure every operation of a prefill and of decoding.

    Parameters
    ----------
    model : Model
    n_prompt, n_new, repeat, seed : int
        Random ids; medians over `repeat` runs after a warm-up, and over the new tokens.
    limits : dict, optional
        From `machine_limits`; None: measured now on a CPU, left out on a GPU.

    Returns
    -------
    facts : dict
        "limits", and for "prefill" and "decode": "seconds" of the whole (one token of decoding),
        and "ops", a list of dicts with "op", shape of its "weight", "calls", "seconds", "share" of
        the whole, "bytes", "flops" and share "of_limit" (None without limits).  "between_seconds"
        is the rest: Python between the operations, minus what a kernel over all layers saves.

    Raises
    ------
    NpllmValueError
        For a number below 1, or tokens beyond the context length.

    Notes
    -----
    "seconds" comes from runs without the wrappers, so that it excludes the cost of measuring.
    """
    if min(n_prompt, n_new, repeat) < 1:
        raise NpllmValueError(
            f"n_prompt, n_new and repeat must be at least 1, got {n_prompt}, {n_new} and {repeat}"
        )
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, (1, n_prompt + n_new))
    runs = _measure(model, ids, n_prompt, repeat)
    if limits is None and array_namespace(model.params.embed_tokens) is np:
        limits = machine_limits()
    return {
        "n_prompt": n_prompt,
        "n_new": n_new,
        "repeat": repeat,
        "set": model.ops.name,
        "limits": limits,
        "prefill": _summary(runs["prefill"], 1, limits),
        "decode": _summary(runs["decode"], n_new, limits),
    }


def _measure(model: Model, ids: Array, n_prompt: int, repeat: int) -> dict[str, list[Any]]:
    """Phase -> (seconds of a run without wrappers, calls of a run with them), `repeat` times."""
    xp = array_namespace(model.params.embed_tokens)
    timed, calls = timed_ops(model.ops, getattr(xp, "cuda", None))
    watched = type(model)(model.config, model.params, ops=timed, mask=model.mask)
    phases: dict[str, list[Any]] = {"prefill": [], "decode": []}
    for _ in range(repeat + 1):
        plain = _run_phases(model, ids, n_prompt, {})
        seen = _run_phases(watched, ids, n_prompt, calls)
        for name, runs in phases.items():
            runs.append((plain[name][0], seen[name][1]))
    return {name: runs[1:] for name, runs in phases.items()}  # without the warm-up


def _run_phases(
    model: Model, ids: Array, n_prompt: int, calls: Calls
) -> dict[str, tuple[float, Calls]]:
    """Seconds and calls of a prefill, and of decoding the rest token by token."""
    cache, phases = model.new_cache(), {}
    spans = [slice(0, n_prompt)] + [slice(at, at + 1) for at in range(n_prompt, ids.shape[1])]
    for name, part in (("prefill", spans[:1]), ("decode", spans[1:])):
        calls.clear()
        start = working_seconds()
        for span in part:
            to_numpy(model(ids[:, span], cache=cache, logits_to_keep=1))
        took = working_seconds() - start
        phases[name] = (took, {key: tuple(call) for key, call in calls.items()})
    return phases


def _summary(
    runs: list[tuple[float, Calls]], n_step: int, limits: dict[str, Any] | None
) -> dict[str, Any]:
    """The table of one phase, for one step, from (seconds, calls) of each run."""
    whole = statistics.median(run[0] for run in runs) / n_step
    rows = []
    for op, shape in runs[0][1]:
        n_call, _, flops, moved = (x / n_step for x in runs[0][1][op, shape])
        took = statistics.median(run[1][op, shape][1] for run in runs) / n_step
        least = max(flops / limits["flops"], moved / limits["read"]) if limits else None
        rows.append(
            {
                "op": op,
                "weight": shape,
                "calls": n_call,
                "seconds": took,
                "share": took / whole,
                "bytes": moved,
                "flops": flops,
                "of_limit": None if least is None else least / took,
            }
        )
    rows.sort(key=lambda row: -row["seconds"])
    between = whole - sum(row["seconds"] for row in rows)
    return {"seconds": whole, "ops": rows, "between_seconds": between}


def timed_ops(ops: Ops, cuda: Any = None) -> tuple[Ops, Calls]:
    """Wrap a set of operations so that it times and counts each call.

    The slots of a whole layer, of its halves and of all layers are emptied; the other slots stay.

    Parameters
    ----------
    ops : Ops
    cuda : module, optional
        `cupy.cuda`: synchronises the device before and after each call, so that the time is that of
        the call's own work.

    Returns
    -------
    timed : Ops
    calls : dict
        (op, shape of the weight or None) -> [calls, seconds, operations, bytes moved]; empty at
        first.
    """
    calls: Calls = defaultdict(lambda: [0, 0.0, 0, 0])

    def synchronize() -> None:
        if cuda is not None:
            cuda.Device().synchronize()

    def wrap(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            synchronize()
            start = working_seconds()
            y = op(*args, **options)
            if y is NotImplemented:
                return y
            synchronize()
            took = working_seconds() - start
            call = calls[name, _weight_shape(name, args)]
            for place, value in enumerate((1, took, *count(name, args, options, y))):
                call[place] += value
            return y

        return timed

    kept = {name: getattr(ops, name) for name in Ops.names() if name not in TAKEN_APART}
    wrapped: dict[str, Any] = dict.fromkeys(TAKEN_APART)
    wrapped |= {name: op and wrap(name, op) for name, op in kept.items()}
    return replace(ops, **wrapped), calls


def _weight_shape(name: str, args: tuple[Any, ...]) -> tuple[int, ...] | None:
    place = {"linear": 1, "norm_linear": 3, "norm_swiglu": 3, "linear_add": 1}.get(name)
    return None if place is None else tuple(args[place].shape)


def count(name: str, args: tuple[Any, ...], options: dict[str, Any], y: Any) -> tuple[int, int]:
    """Count operations and bytes of a call, as `npllm.analysis.cost` does; values inside a slot
    move no bytes.
    """
    if name == "rope_attention":
        qkv, step = args
        return _count_rope_attention(qkv, step, y)
    return _flops(name, args, options, y), bytes_moved(name, args, options, y)


def _flops(name: str, args: tuple[Any, ...], options: dict[str, Any], y: Any) -> int:
    """Operations of a call of any operation, or slot, but rope_attention."""
    if name in ("norm_linear", "norm_swiglu"):
        x, _gain, _eps, *rest = args
        activation = 5 * y.size if name == "norm_swiglu" else 0
        return COUNTS["rms_norm"](x) + COUNTS["linear"](x, *rest) + activation
    if name == "linear_add":
        x, weight, _residual, *bias = args
        return COUNTS["linear"](x, weight, *bias)
    return COUNTS[name](*args, **options) if name in COUNTS else 0


def _count_rope_attention(qkv: Array, step: Any, y: Array) -> tuple[int, int]:
    """Count the rotation of queries and keys, and the visible pairs; keys and values of all slots
    are read.
    """
    cos, sin, n_head, n_kv_head = step[:4]
    q, k, _ = split_qkv(qkv, n_head, n_kv_head)
    n_past = 0 if step.cache is None else step.cache.n_ctx
    n_seq, d_head = k.shape[-2:]
    n_ctx = n_past + n_seq
    keys = np.broadcast_to(np.float32(0), (*k.shape[:-2], n_ctx, d_head))
    slots = {"q_slots": range(n_past, n_ctx), "k_slots": range(n_ctx)}
    flops = sum(COUNTS["apply_rope"](x, cos, sin) for x in (q, k))
    flops += COUNTS["attention"](q, keys, keys, mask=step.mask, **slots)
    n_read = 2 * prod(k.shape[:-2]) * _keys_read(step.cache, n_past, n_seq) * d_head
    return flops, sum(x.nbytes for x in (qkv, cos, sin, y)) + n_read * k.dtype.itemsize


def _keys_read(cache: Any, n_past: int, n_seq: int) -> int:
    """Keys of a sequence that attention reads: a cache with a window keeps its last ones."""
    if cache is None or cache.window is None:
        return n_past + n_seq
    return min(n_past, cache.window - 1) + n_seq
