"""What the commands report, as plain dicts: the machine, a checkpoint, the next tokens, the speed."""

import importlib
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from math import prod

import numpy as np

from npllm import kernels, ops
from npllm.analysis.profiling import seconds
from npllm.analysis.score import score
from npllm.arrays import array_namespace, backend_name, backend_namespace, to_numpy
from npllm.checkpoints.fetch import DEFAULT_MODEL, find_checkpoint, weights_folder
from npllm.checkpoints.phi3_layout import check_entries, load_params
from npllm.checkpoints.safetensors import SAFETENSORS_DTYPES, read_entries
from npllm.config.config import Config
from npllm.decoding.loop import last_logits
from npllm.decoding.loop import start as start_generation
from npllm.decoding.prompt import read_prompt
from npllm.decoding.sampling import next_token_distribution
from npllm.decoding.sequences import seen_tokens
from npllm.errors import NpllmError
from npllm.models import module_tree
from npllm.quantized.int8 import quantize
from npllm.threads import blas_facts, n_threads

__all__ = [
    "attention_rows",
    "checkpoint_facts",
    "compare_sets",
    "cost_lines",
    "generate_timed",
    "int8_errors",
    "machine_facts",
    "next_tokens",
    "peak_memory",
    "profile_lines",
    "score_facts",
    "set_lines",
    "speed",
]

PACKAGES = (
    "numpy",
    "ml_dtypes",
    "safetensors",
    "tokenizers",
    "jinja2",
    "click",
    "gguf",
    "huggingface_hub",
    "platformdirs",
    "tqdm",
    "numba",
    "threadpoolctl",
    "cupy-cuda13x",
)
THREAD_VARIABLES = (
    "OPENBLAS_CORETYPE",
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUPY_TF32",
)


def machine_facts():
    """Describe what npllm would run on: versions, BLAS and its threads, CuPy and the GPU or why
    there is none.

    Returns
    -------
    facts : dict
    """
    return {
        "npllm": importlib.import_module(
            "npllm"
        ).__version__,  # also of a folder that is not installed
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "blas": _blas_facts(),
        "kernels": _kernel_facts(),
        "environment": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "gpu": _gpu_facts(),
        "weights_folder": str(weights_folder()),
        "default_checkpoint": str(
            find_checkpoint(DEFAULT_MODEL) or "not fetched yet (npllm fetch)"
        ),
    }


def int8_errors(folder):
    """Measure what rounding to 8 bits does to every matrix of a checkpoint.

        error = |weight - quantized| / |weight|,   |.| the square root of the sum of squares

    Parameters
    ----------
    folder : Path

    Returns
    -------
    errors : dict of str to dict
        Part ("embed_tokens", "layer 0", ...) -> name of the matrix -> relative error.
    """
    params = load_params(folder, Config.from_json(folder))
    parts = {
        "embed_tokens, lm_head": {
            name: getattr(params, name) for name in ("embed_tokens", "lm_head")
        }
    }
    parts |= {f"layer {number}": layer._asdict() for number, layer in enumerate(params.layers)}
    return {
        part: {
            name: _int8_error(x) for name, x in matrices.items() if x is not None and x.ndim == 2
        }
        for part, matrices in parts.items()
    }


def _int8_error(weight, n_rows=512):
    """Relative error of one matrix, some rows at a time."""
    off = size = 0.0
    for rows in (weight[start : start + n_rows] for start in range(0, len(weight), n_rows)):
        wide = rows.astype(np.float32)
        off += float(np.square(quantize(wide).widened() - wide).sum())
        size += float(np.square(wide).sum())
    return (off / size) ** 0.5 if size else 0.0


def _kernel_facts():
    """Which set of operations `load` picks on this machine and why, its threads, and how long
    compiling takes.
    """
    reason, seconds = kernels.why_not_compiled(), kernels.seconds_to_prepare()
    facts = {
        "set": kernels.fastest_ops().name,
        "threads": n_threads(),
        "why": reason or "Numba is here",
    }
    if seconds is not None:
        facts |= {
            "ready in": f"{seconds:.1f} s" + (", compiled just now and kept" if seconds > 3 else "")
        }
    return facts


def checkpoint_facts(folder):
    """Count a checkpoint's parameters and bytes, from its headers alone.

    Parameters
    ----------
    folder : Path

    Returns
    -------
    facts : dict
        `kv_bytes_per_token` counts keys and values of all layers in float32, in which the CPU keeps
        them.

    Raises
    ------
    NpllmError
        When the folder is no checkpoint that `load` would take.
    """
    config, entries = Config.from_json(folder), read_entries(folder)
    check_entries(folder, entries, config)
    parts = {"embeddings": 0, "attention": 0, "mlp": 0, "norms": 0}
    for name, entry in entries.items():
        part = (
            "norms"
            if "norm" in name
            else "attention"
            if ".self_attn." in name
            else "mlp"
            if ".mlp." in name
            else "embeddings"
        )
        parts[part] += prod(entry.shape)
    return {
        "folder": str(folder),
        "tree": module_tree.describe(config),
        "parameters": sum(parts.values()),
        "parameters_by_part": parts,
        "bytes": sum(entry.stop - entry.start for entry in entries.values()),
        "dtypes": sorted(
            {SAFETENSORS_DTYPES.get(entry.dtype, entry.dtype) for entry in entries.values()}
        ),
        "files": len({entry.file for entry in entries.values()}),
        "context_length": config.max_position_embeddings,
        "kv_bytes_per_token": 2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * config.head_dim
        * 4,
    }


def next_tokens(model, prompt, n, *, order="transformers", **filters):
    """List the n most likely next tokens after a prompt.

    Parameters
    ----------
    model : Model
    prompt : str or list of messages
    n : int
    order : str
        See `npllm.decoding.sampling.filter_logits`.
    **filters
        temperature, top_k, top_p, min_p, repetition_penalty; None: off.

    Returns
    -------
    rows : list of dict
        Each {"id", "text", "logit", "probability"}, the most likely first; the logit is the model's
        own, the probability that after the filters.  Tokens that a filter excludes are left out.
    """
    ids, valid, *_ = read_prompt(model, prompt)
    logits = last_logits(model, ids, attention_mask=valid)
    seen = seen_tokens(ids, valid, model.config.vocab_size)
    probabilities = next_token_distribution(logits, order=order, seen=seen, **filters)[0]
    best = [i for i in np.lexsort((-logits[0], -probabilities))[:n] if probabilities[i] > 0]
    return [
        {
            "id": int(i),
            "text": model.tokenizer.token_text(i),
            "logit": float(logits[0, i]),
            "probability": float(probabilities[i]),
        }
        for i in best
    ]


def score_facts(model, text, **options):
    """List every token of a text with its log-probability.

    Parameters
    ----------
    model : Model
    text : str
    **options
        As in `npllm.analysis.score.score`.

    Returns
    -------
    facts : dict
        "tokens": a list of {"id", "text", "log_probability"}, None for the first; "log_probability"
        and "perplexity" of the whole.
    """
    scored = score(model, text, **options)
    each = [None, *map(float, scored.log_probs)]
    return {
        "tokens": [
            {"id": int(i), "text": model.tokenizer.token_text(i), "log_probability": value}
            for i, value in zip(scored.ids, each, strict=True)
        ],
        "log_probability": scored.total,
        "perplexity": scored.perplexity,
    }


def cost_lines(facts):
    """Lay out what `npllm.analysis.cost.cost_facts` found: yield lines of text."""
    yield f"parameters {facts['parameters']:>24,}   {facts['weight_bytes']:,} bytes in {facts['dtype']}"
    yield from (f"  {part:<12} {count:>20,}" for part, count in facts["parameters_by_part"].items())
    yield f"\n{facts['batch']} x {facts['context']} tokens {'FLOPs':>22} {'bytes':>20} {'FLOPs/byte':>11}"
    for title, key in (
        ("prefill", "prefill"),
        ("decode step", "decode_step"),
        ("  uncached", "decode_step_uncached"),
    ):
        yield _cost_line(title, facts[key])
        if key != "decode_step_uncached":
            yield from (_cost_line("  " + op, cost) for op, cost in facts[key]["by_op"].items())
    run = facts["whole_run"]
    yield (
        f"\n{run['tokens']} tokens one by one: {run['cached_flops']:,} FLOPs with the cache, {run['uncached_flops']:,} without: "
        f"{run['ratio']:.1f} times as many"
    )
    yield f"\nKV cache {facts['kv_cache_bytes']:>26,} bytes"
    for name, row in facts["kv_cache"].items():
        window = (
            ""
            if row["window"] is None
            else f"   {row['window']:,} with the window of {facts['window']}"
        )
        yield f"  {name.upper()}, {row['n_kv_head']:>3} heads {row['full']:>21,}{window}"


def _cost_line(title, cost):
    return f"{title:<14} {cost['flops']:>25,} {cost['bytes']:>20,} {cost['intensity']:>11.2f}"


def profile_lines(facts):
    """Lay out what `npllm.analysis.profiling.profile` found: yield lines of text."""
    limits = facts["limits"]
    if limits:
        yield f"limits: {limits['read'] / 1e9:.1f} GB/s read, {limits['flops'] / 1e9:.0f} GFLOP/s float32 product"
    steps = {
        "prefill": f"prefill of {facts['n_prompt']} tokens",
        "decode": f"one token of decoding after {facts['n_prompt']}",
    }
    for phase, title in steps.items():
        whole = facts[phase]["seconds"]
        yield (
            f"\n{title}: {whole * 1e3:.2f} ms, {facts['set']} ops\n"
            f"{'op':<16} {'weight':<14} {'calls':>6} {'ms':>9} {'share':>6} {'GB/s':>7} {'GFLOP/s':>8} {'of limit':>9}"
        )
        for row in facts[phase]["ops"]:
            weight = "x".join(map(str, row["weight"] or ()))
            limit = "" if row["of_limit"] is None else f"{row['of_limit']:.0%}"
            yield (
                f"{row['op']:<16} {weight:<14} {row['calls']:>6.0f} {row['seconds'] * 1e3:>9.3f} {row['share']:>6.1%} "
                f"{row['bytes'] / row['seconds'] / 1e9:>7.1f} {row['flops'] / row['seconds'] / 1e9:>8.1f} {limit:>9}"
            )
        between = facts[phase]["between_seconds"]
        yield f"{'between the ops':<38} {between * 1e3:>9.3f} {between / whole:>6.1%}"


def attention_rows(steps):
    """List what one position attends to, key by key.

    Parameters
    ----------
    steps : npllm.analysis.steps.AttentionSteps

    Returns
    -------
    rows : list of dict
        Each {"slot", "token", "score", "weight", "weighted_value"}, the last as the length of the
        vector.
    """
    lengths = np.linalg.norm(steps.weighted_values, axis=1)
    keys = zip(steps.tokens, steps.scores, steps.weights, lengths, strict=True)
    return [
        {
            "slot": slot,
            "token": token,
            "score": float(score),
            "weight": float(weight),
            "weighted_value": float(length),
        }
        for slot, (token, score, weight, length) in enumerate(keys)
    ]


def generate_timed(model, prompt, write, *, echo=False, **options):
    """Generate, hand every piece of text to `write` as it comes, and time it.

    Parameters
    ----------
    model : Model
    prompt : str or list of messages
    write : function (str)
    echo : bool
        Hand over a text prompt first, once everything has been checked.
    **options
        As in `Model.generate`.

    Returns
    -------
    stats : dict
        Seconds and tokens/s of the prompt (up to the first new token) and of the generation after
        it, bytes of peak memory.
    """
    run = start_generation(model, prompt, **options)
    if echo and isinstance(prompt, str):
        write(prompt)
    start, ticks, text = time.perf_counter(), [], []
    try:
        for (piece,) in run:
            ticks.append(time.perf_counter())
            text.append(piece)
            write(piece)
    finally:
        text.extend(run.close())
        write(text[-1])
    first = ticks[0] - start if ticks else 0.0
    rest = ticks[-1] - ticks[0] if ticks else 0.0
    return {
        "text": "".join(text),
        "prompt_tokens": run.sequences.n_prompt,
        "prompt_seconds": first,
        "prompt_tokens_per_second": run.sequences.n_prompt / first if first else 0.0,
        "new_tokens": len(ticks),
        "new_seconds": rest,
        "new_tokens_per_second": (len(ticks) - 1) / rest if rest else 0.0,
        "peak_bytes": peak_memory(),
    }


def speed(model, *, n_prompt=51, n_new=32, repeat=3, seed=0):
    """Measure prefill, and decoding with and without the cache, on random token ids.

    Parameters
    ----------
    model : Model
    n_prompt, n_new, repeat, seed : int

    Returns
    -------
    facts : dict
        Medians over `repeat` runs after a warm-up, in tokens per second.  A run ends when its
        logits are on the host.
    """
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, (1, n_prompt))
    to_numpy(model(ids[:, :2]))  # warm up: the first touch reads the mapped weights
    runs = {
        "prefill": lambda: to_numpy(model(ids, logits_to_keep=1)),
        "decode_cached": lambda: _decode(model, ids, n_new, True),
        "decode_uncached": lambda: _decode(model, ids, n_new, False),
    }
    counts = {"prefill": n_prompt, "decode_cached": n_new, "decode_uncached": n_new}
    facts = {
        name: counts[name] / statistics.median(seconds(run) for _ in range(repeat))
        for name, run in runs.items()
    }
    return {
        "n_prompt": n_prompt,
        "n_new": n_new,
        "repeat": repeat,
        "ops": model.ops.name,
        "tokens_per_second": facts,
        "cache_speedup": facts["decode_cached"] / facts["decode_uncached"],
        "peak_bytes": peak_memory(),
    }


def compare_sets(model, others, **sizes):
    """Measure a model on its own set of operations and on others, one after another.

    Parameters
    ----------
    model : Model
    others : iterable of str
        Names of sets, see `npllm.kernels.choose_ops`.
    **sizes
        As in `speed`.

    Returns
    -------
    facts : dict
        "sets": what `speed` found, in the order measured, the model's own set first; "speedup": the
        tokens per second of the model's own set over those of each other, by the name of that set
        and of what was measured.
    """
    backend = backend_name(array_namespace(model.params.embed_tokens))
    models = [model, *(model.on(kernels.choose_ops(name, backend)) for name in others)]
    sets = [speed(one, **sizes) for one in models]
    own = sets[0]["tokens_per_second"]
    return {
        "sets": sets,
        "speedup": {
            facts["ops"]: {
                name: own[name] / value for name, value in facts["tokens_per_second"].items()
            }
            for facts in sets[1:]
        },
    }


def set_lines(facts):
    """Lay out what `compare_sets` found: yield lines of text."""
    for one in facts["sets"]:
        for name, value in one["tokens_per_second"].items():
            yield f"{one['ops']:<12} {name:<16} {value:9.1f} tokens/s"
    own = facts["sets"][0]["ops"]
    for other, ratios in facts["speedup"].items():
        yield f"{own} over {other}: " + ", ".join(
            f"{name} {ratio:.2f}" for name, ratio in ratios.items()
        )


def peak_memory():
    """Bytes of memory that this process held at most, mapped weights that were touched included; 0
    where the system cannot tell.
    """
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _decode(model, ids, n_new, use_cache):
    """Greedy steps without stop ids: the same number of tokens in every run."""
    cache = model.new_cache() if use_cache else None
    new = ids
    for _ in range(n_new):
        token = ops.greedy(to_numpy(model(new, cache=cache, logits_to_keep=1))[:, -1])[:, None]
        new = token if use_cache else np.concatenate([new, token], axis=1)


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _blas_facts():
    """Name and version of NumPy's BLAS; its kernel set and threads where threadpoolctl can ask it."""
    built = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    facts = {"name": built.get("name"), "version": built.get("version")}
    pool = blas_facts()
    return facts | {"kernels": pool.get("architecture"), "threads": pool.get("num_threads")}


def _gpu_facts():
    """The CUDA device, or the reason why there is none."""
    try:
        cupy = backend_namespace("cupy")
    except NpllmError as error:
        return {"found": False, "why": str(error)}
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    return {
        "found": True,
        "name": properties["name"].decode(),
        "bytes": properties["totalGlobalMem"],
        "cuda_runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "cupy": cupy.__version__,
    }
