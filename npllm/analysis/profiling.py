"""Where the time of a model goes: every operation of a run, beside what the machine could do.

An operation that does F operations and moves B bytes takes at least max(F / sgemm, B / read)
seconds, where sgemm and read are the machine's own rates, measured by `machine_limits`; that bound
over the time it took is its share of the limit.

Source: "Roofline: An Insightful Visual Performance Model for Multicore Architectures" (Williams,
Waterman and Patterson 2009).
"""

import statistics
import time
from collections import defaultdict
from dataclasses import replace
from math import prod

import ml_dtypes
import numpy as np

from npllm import kernels
from npllm.analysis.cost import COUNTS, bytes_moved
from npllm.arrays import array_namespace, to_numpy
from npllm.errors import NpllmValueError
from npllm.ops import Ops, split_qkv
from npllm.threads import run_blocks

__all__ = ["machine_limits", "profile", "timed_ops"]


def profile(model, *, n_prompt=51, n_new=8, repeat=3, limits=None, seed=0):
    """Measure every operation of a prefill and of decoding.

    Parameters
    ----------
    model : Model
    n_prompt, n_new, repeat, seed : int
        Random ids; medians over `repeat` runs after a warm-up, and over the new tokens.
    limits : dict, optional
        From `machine_limits`; None: measured now, on the CPU, and left out on a GPU.

    Returns
    -------
    facts : dict
        "limits", and for "prefill" and "decode": "seconds" of the whole (one token of decoding),
        and "ops", a list of dicts with "op", shape of its "weight", "calls", "seconds", "share" of
        the whole, "bytes", "flops" and share "of_limit" (None without limits); "between_seconds" is
        what no op accounts for: the Python between them, less what a set saves that runs all layers
        as one kernel.

    Raises
    ------
    NpllmValueError
        For a number below 1, or tokens beyond the context length.

    Notes
    -----
    "seconds" is of runs without the wrappers, so that measuring is not measured.
    """
    if min(n_prompt, n_new, repeat) < 1:
        raise NpllmValueError(
            f"n_prompt, n_new and repeat must be at least 1, got {n_prompt}, {n_new} and {repeat}"
        )
    xp = array_namespace(model.params.embed_tokens)
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, (1, n_prompt + n_new))
    timed, calls = timed_ops(model.ops, getattr(xp, "cuda", None))
    watched = type(model)(model.config, model.params, ops=timed, mask=model.mask)
    phases = {"prefill": [], "decode": []}
    for _ in range(repeat + 1):
        plain = _run_phases(model, ids, n_prompt, {})
        seen = _run_phases(watched, ids, n_prompt, calls)
        for name, runs in phases.items():
            runs.append((plain[name][0], seen[name][1]))
    if limits is None and xp is np:
        limits = machine_limits()
    counts = {"prefill": 1, "decode": n_new}
    return {
        "n_prompt": n_prompt,
        "n_new": n_new,
        "repeat": repeat,
        "set": model.ops.name,
        "limits": limits,
        **{name: _summary(runs[1:], counts[name], limits) for name, runs in phases.items()},
    }


def _run_phases(model, ids, n_prompt, calls):
    """Seconds and calls of a prefill, and of decoding the rest token by token."""
    cache, phases = model.new_cache(), {}
    spans = [slice(0, n_prompt)] + [slice(at, at + 1) for at in range(n_prompt, ids.shape[1])]
    for name, part in (("prefill", spans[:1]), ("decode", spans[1:])):
        calls.clear()
        start = time.perf_counter()
        for span in part:
            to_numpy(model(ids[:, span], cache=cache, logits_to_keep=1))
        phases[name] = (
            time.perf_counter() - start,
            {key: tuple(call) for key, call in calls.items()},
        )
    return phases


def _summary(runs, n_step, limits):
    """The table of one phase, from (seconds, calls) of each run; everything for one step."""
    seconds = statistics.median(run[0] for run in runs) / n_step
    rows = []
    for op, shape in runs[0][1]:
        n_call, _, flops, moved = runs[0][1][op, shape]
        took = statistics.median(run[1][op, shape][1] for run in runs) / n_step
        least = limits and max(flops / limits["flops"], moved / limits["read"]) / n_step
        rows.append(
            {
                "op": op,
                "weight": shape,
                "calls": n_call / n_step,
                "seconds": took,
                "share": took / seconds,
                "bytes": moved / n_step,
                "flops": flops / n_step,
                "of_limit": least and least / took,
            }
        )
    rows.sort(key=lambda row: -row["seconds"])
    between = seconds - sum(row["seconds"] for row in rows)
    return {"seconds": seconds, "ops": rows, "between_seconds": between}


def timed_ops(ops, cuda=None):
    """Wrap a set of ops so that it times and counts each call; layers and their halves are taken
    apart, other slots stay whole.

    Parameters
    ----------
    ops : Ops
    cuda : module, optional
        `cupy.cuda`: the clock then waits for the device, so that a call's work is its own.

    Returns
    -------
    timed : Ops
    calls : dict
        (op, shape of the weight or None) -> [calls, seconds, operations, bytes moved]; empty at
        first.
    """
    calls = defaultdict(lambda: [0, 0.0, 0, 0])

    def wrap(name, op):
        def timed(*args, **options):
            if cuda is not None:
                cuda.Device().synchronize()
            start = time.perf_counter()
            y = op(*args, **options)
            if y is NotImplemented:
                return y
            if cuda is not None:
                cuda.Device().synchronize()
            took = time.perf_counter() - start
            call = calls[name, _weight_shape(name, args)]
            for place, value in enumerate((1, took, *count(name, args, options, y))):
                call[place] += value
            return y

        return timed

    apart = {
        "attention_block",
        "mlp_block",
        "decoder_layers",
    }  # each product is to have a row of its own
    kept = {name: None if name in apart else getattr(ops, name) for name in Ops.names()}
    wrapped = {name: op and wrap(name, op) for name, op in kept.items()}
    return replace(ops, **wrapped), calls


def count(name, args, options, y):
    """Operations and bytes of a call, as `npllm.analysis.cost` counts; values inside a slot are not
    moved.
    """
    if name == "rope_attention":
        qkv, step = args
        return _count_rope_attention(qkv, *step[:4], y=y, mask=step.mask, cache=step.cache)
    if name in ("norm_linear", "norm_swiglu"):
        x, _gain, _eps, *rest = args
        flops = (
            COUNTS["rms_norm"](x)
            + COUNTS["linear"](x, *rest)
            + (5 * y.size if name == "norm_swiglu" else 0)
        )
    elif name == "linear_add":
        x, weight, _residual, *bias = args
        flops = COUNTS["linear"](x, weight, *bias)
    else:
        flops = COUNTS[name](*args, **options) if name in COUNTS else 0
    return flops, bytes_moved(name, args, options, y)


def _count_rope_attention(qkv, cos, sin, n_head, n_kv_head, *, y, mask, cache):
    """The rotation of queries and keys, and the pairs that the mask lets through; the keys and
    values of all slots are read.
    """
    q, k, _ = split_qkv(qkv, n_head, n_kv_head)
    n_past = 0 if cache is None else cache.n_ctx
    shape = (*k.shape[:-2], n_past + k.shape[-2], k.shape[-1])
    keys = np.broadcast_to(np.float32(0), shape)
    flops = sum(COUNTS["apply_rope"](x, cos, sin) for x in (q, k))
    flops += COUNTS["attention"](
        q, keys, keys, mask=mask, q_slots=range(n_past, shape[-2]), k_slots=range(shape[-2])
    )
    n_seen = (
        n_past + k.shape[-2]
        if cache is None or cache.window is None
        else min(n_past, cache.window - 1) + k.shape[-2]
    )
    return flops, sum(x.nbytes for x in (qkv, cos, sin, y)) + 2 * prod(
        k.shape[:-2]
    ) * n_seen * k.shape[-1] * k.dtype.itemsize


def machine_limits():
    """Measure what the machine can do: bytes/s read, by the best of several probes, and float32
    operations/s of NumPy's product.

    Returns
    -------
    limits : dict
        "read" in bytes/s and "flops" in 1/s, the best of "read_probes" and of "sgemm" by size.
    """
    rng = np.random.default_rng(0)
    sgemm, b = {}, rng.standard_normal((3072, 4096), dtype=np.float32)
    for n in (256, 512, 1024):
        a = rng.standard_normal((n, 3072), dtype=np.float32)
        sgemm[f"{n} x 3072 x 4096"] = 2 * n * 3072 * 4096 / _median_seconds(lambda a=a: a @ b)
    reads = _read_probes()
    return {
        "read": max(reads.values()),
        "flops": max(sgemm.values()),
        "read_probes": reads,
        "sgemm": sgemm,
    }


def _read_probes(size=2**30):
    """Bytes/s of reading a gigabyte that no cache holds: two sums by threads, BLAS, and the kernel
    of decoding itself.
    """
    x = np.random.default_rng(0).standard_normal(size // 4, dtype=np.float32)
    blocks, vector = np.split(x, 64), np.ones((1, 8192), np.float32)
    matrix = x.view(np.uint16)
    matrix &= 0x3FFF  # finite as bfloat16
    matrix = matrix.view(ml_dtypes.bfloat16).reshape(-1, 8192)
    probes = {
        "maximum of float32 on all threads": lambda: run_blocks(np.max, blocks),
        "sum of int64 on all threads": lambda: run_blocks(
            lambda block: np.sum(block.view(np.int64)), blocks
        ),
        "sgemv of BLAS": lambda: x.reshape(-1, 8192) @ vector[0],
    }
    if kernels.compiled_ops() is not None:
        probes["decoding's matrix-vector kernel, bfloat16"] = lambda: kernels.compiled_ops().linear(
            vector, matrix
        )
    return {name: size / _median_seconds(probe) for name, probe in probes.items()}


def _median_seconds(function, repeat=5):
    function()
    return statistics.median(seconds(function) for _ in range(repeat))


def seconds(function):
    """Time one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _weight_shape(name, args):
    place = {"linear": 1, "norm_linear": 3, "norm_swiglu": 3, "linear_add": 1}.get(name)
    return None if place is None else tuple(args[place].shape)
