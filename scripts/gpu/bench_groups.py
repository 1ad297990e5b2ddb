"""What scripts/bench_gpu.py measures: each group gets `record(name, work)`, and calls it."""

import json
import statistics
import time
from collections.abc import Callable
from copy import copy as copied
from functools import partial
from typing import Any

import numpy as np

from gpu.block_model import PRODUCTS, in_blocks, matrix_bytes
from gpu.measure import MissingPackageError, need
from gpu.predict import kernels as kernels_of
from gpu.records import rehearsing
from gpu.weights import model_folder

MODEL = "phi-3-mini"
CONTEXTS = (16, 24, 32) if rehearsing() else (128, 1024, 4000)
PROMPTS = (5, 12) if rehearsing() else (512, 2048, 3900)
LONG, LONGER = (40, 50) if rehearsing() else (16384, 65400)  # below a power of two: no growth
N_NEW = 3 if rehearsing() else 64
N_ON_OFF = 4 if rehearsing() else 100
N_QUEUED = 2 if rehearsing() else 8


def timed(call: Callable[[], Any], repeat: int = 3) -> float:
    """Median seconds of a call, up to the end of its work on the device."""
    import cupy

    wait, found = cupy.cuda.get_current_stream().synchronize, []
    for _ in range(1 if rehearsing() else repeat):
        wait()
        start = time.perf_counter()
        call()
        wait()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def memory() -> dict[str, Any]:
    """Bytes that CuPy's pool has taken from the device so far, the most it has held."""
    import cupy

    pool = getattr(cupy, "get_default_memory_pool", None)
    return {"peak_bytes": pool().total_bytes() if pool else None}


# ------------------------------------------------------------------------------------------ groups


def copy(record: Callable) -> None:
    """Time a copy of 1 GiB on the device: bytes read and written."""

    def work() -> dict[str, Any]:
        import cupy

        x = cupy.zeros(2**10 if rehearsing() else 2**28, dtype=np.float32)
        y = cupy.empty(x.shape, dtype=np.float32)
        y[...] = x
        seconds = timed(lambda: y.__setitem__(..., x), 10)
        return {"seconds": seconds, "gigabytes_per_second": 2 * x.nbytes / seconds / 1e9}

    record("device", work)
    record("matrix", matrix_rate)


def matrix_rate() -> dict[str, Any]:
    """Time products of square bfloat16 matrices on the tensor cores, of random entries: with zeros
    a device draws less power, and is faster.
    """
    import cupy

    from npllm.arrays import DTYPES
    from npllm.kernels.cuda import gemm

    if gemm.library() is None:
        return {"status": "not run", "why": "the device has no tensor cores for bfloat16"}
    n = 8192
    random = np.random.default_rng(0).standard_normal((n, n), dtype=np.float32)
    x, y = cupy.asarray(random.astype(DTYPES["bfloat16"])), cupy.empty((n, n), dtype=np.float32)
    seconds = timed(lambda: gemm.add_product(x, x, y, is_first=True), 10)
    return {"seconds": seconds, "operations_per_second": 2 * n**3 / seconds}


def loaded(**changes: Any) -> Any:
    """The model on the device; `changes` of its config keep the weights."""
    import npllm
    from npllm.config.config import Config

    model = npllm.load(model_folder(MODEL), backend="cupy")
    if not changes:
        return model
    data = json.loads((model_folder(MODEL) / "config.json").read_text(encoding="utf-8"))
    return npllm.Model(Config.from_json(data | changes), model.params)


def ids_of(model: Any, n: int, n_batch: int = 1) -> np.ndarray:
    """Random tokens [n_batch, n]."""
    return np.random.default_rng(0).integers(3, model.config.vocab_size, (n_batch, n))


def filled(model: Any, n_ctx: int, n_batch: int = 1) -> Any:
    """A cache that holds n_ctx random tokens a row."""
    cache, ids = model.new_cache(n_batch), ids_of(model, n_ctx, n_batch)
    model.last_logits(ids, np.ones(ids.shape, bool), cache)
    return cache


def decode(
    model: Any, n_ctx: int, how: str, n_batch: int = 1, reader: Any = None
) -> dict[str, Any]:
    """Time N_NEW tokens behind n_ctx others: queued, one by one, or without a graph.  reader: the
    model that reads the others.
    """
    from npllm.arrays import to_numpy
    from npllm.kernels.cuda.decode import decode_step

    steps = {"no graph": partial(decode_step, use_graph=False), "kernel by kernel": None}
    if how in steps:
        model = model.on(model.ops.replace(decode_step=steps[how]))
    cache, one = filled(reader or model, n_ctx, n_batch), ids_of(model, 1, n_batch)

    def queue(n: int) -> None:
        for _ in range(-(-n // N_QUEUED)):
            valid = np.ones((n_batch, cache.n_ctx + 1), bool)
            if model.greedy_ids(one, valid, cache, N_QUEUED) is None:
                raise RuntimeError("the engine did not take the step")

    def each(n: int) -> None:
        for _ in range(n):
            to_numpy(model.last_logits(one, np.ones((n_batch, cache.n_ctx + 1), bool), cache))

    run, n = (queue, -(-N_NEW // N_QUEUED) * N_QUEUED) if how == "queued" else (each, N_NEW)
    run(2 * N_QUEUED if how == "queued" else 3)  # compiles, captures
    seconds = timed(lambda: run(n), 1)
    rate = n_batch * n / seconds
    return {"n_ctx": n_ctx, "seconds_per_token": seconds / n, "tokens_per_second": rate}


def on_off(model: Any, use_cache: bool) -> dict[str, Any]:
    """Time N_ON_OFF greedy tokens with the KV cache, or without."""
    ids = ids_of(model, 5 if rehearsing() else 12)
    model.generate(ids, max_new_tokens=2, use_cache=use_cache, do_sample=False)

    def run() -> None:
        model.generate(ids, max_new_tokens=N_ON_OFF, use_cache=use_cache, do_sample=False)

    return {"n_new": N_ON_OFF, "seconds": timed(run, 5 if use_cache else 3)}


def prefill(model: Any, n: int) -> dict[str, Any]:
    """Time a prompt of n tokens into an empty cache."""
    filled(model, n)
    seconds = timed(lambda: filled(model, n), 2)
    work = 2 * sum(getattr(one, x).size for one in model.params.layers for x in PRODUCTS)
    rates = {"tokens_per_second": n / seconds, "operations_per_second": work * n / seconds}
    return {"n_prompt": n, "seconds": seconds} | rates | memory()


def prefill_models(model: Any) -> dict[str, Any]:
    """The model with x in three bfloat16 parts, rounded to one, and in float32, by these names."""
    from npllm.kernels import choose_ops
    from npllm.ops import blockwise

    rounded, plain = (
        choose_ops("cuda", "cupy", "bfloat16"),
        model.ops.replace(linear=blockwise.linear),
    )
    return {"three parts": model, "bf16 activations": model.on(rounded), "float32": model.on(plain)}


def npllm_group(record: Callable) -> None:
    """Load once; then what matters most first."""
    held: list[Any] = []

    def load() -> dict[str, Any]:
        start = time.perf_counter()
        held.append(loaded())
        return {"seconds": time.perf_counter() - start} | memory()

    record("load", load)
    model = held[0] if held else loaded()
    for how in ("queued", "one by one", "no graph", "kernel by kernel"):
        for n_ctx in CONTEXTS if how in ("queued", "one by one") else CONTEXTS[:1]:
            record(f"decode {how} {n_ctx}", partial(decode, model, n_ctx, how))
    record(f"decode 8 rows {CONTEXTS[0]}", partial(decode, model, CONTEXTS[0], "queued", 8))
    for how, same in prefill_models(model).items():
        for n in PROMPTS:
            record(f"prefill {how} {n}", partial(prefill, same, n))
    kept = copied(model)
    kept.cache_dtype = "bfloat16"
    record(
        f"decode queued {CONTEXTS[-1]}, cache bf16", partial(decode, kept, CONTEXTS[-1], "queued")
    )
    for use_cache in (True, False):
        record(f"cache {'on' if use_cache else 'off'}", partial(on_off, model, use_cache))


def long(record: Callable) -> None:
    """Decode behind LONG and LONGER tokens, with the frequencies of longrope."""
    from npllm.kernels import choose_ops

    d_half = 32 if rehearsing() else 48
    factors = {"short_factor": [1.0] * d_half, "long_factor": [1.5] * d_half}
    changes = {"rope_scaling": {"type": "longrope"} | factors, "max_position_embeddings": 131072}
    changes |= {"sliding_window": 262144}
    model = loaded(**changes | ({"original_max_position_embeddings": 20} if rehearsing() else {}))
    record(f"decode queued {LONG}", partial(decode, model, LONG, "queued"))
    model.cache_dtype = "bfloat16"
    reader = model.on(choose_ops("cuda", "cupy", "bfloat16"))
    work = partial(decode, model, LONGER, "queued", reader=reader)
    record(f"decode queued {LONGER}, cache bf16", work)


def kernels(record: Callable) -> None:
    """Replay each kernel of a step by itself, all layers in one graph, and count its bytes."""
    model, n_ctx = loaded(), CONTEXTS[1]
    launches = recorded_launches(model, n_ctx)
    data = json.loads((model_folder(MODEL) / "config.json").read_text(encoding="utf-8"))
    expected = {one.label: one for one in kernels_of(data, n_ctx)}
    for label, calls in launches.items():
        record(label, partial(kernel_facts, calls, expected[label].n_bytes))


def kernel_facts(calls: list[Callable[[], None]], n_bytes: float) -> dict[str, Any]:
    """Time the launches of one kernel as a graph."""
    from npllm.kernels.cuda.decode_graph import captured

    for call in calls:
        call()
    graph = captured(lambda: [call() for call in calls])
    seconds = timed(graph.launch, 10) / len(calls)
    return {"seconds": seconds, "gigabytes_per_second": n_bytes / seconds / 1e9}


def recorded_launches(model: Any, n_ctx: int) -> dict[str, list[Callable[[], None]]]:
    """The launches of one decode step, by their names in `gpu.predict`."""
    from npllm.kernels.cuda import launching
    from npllm.kernels.cuda.decode import decode_step

    products, found = ["qkv", "o", "gate_up", "down"], {}
    names = {"rope_append": "rope", "attend_one": "attention", "attend_merge": "merge"}
    launch, n_products = launching.launch, 0

    def noted(kernel: str, *arguments: Any) -> None:
        nonlocal n_products
        label = names.get(kernel, kernel)
        if kernel == "linear":
            last = n_products == 4 * model.config.num_hidden_layers
            label, n_products = ("lm_head" if last else products[n_products % 4]), n_products + 1
        found.setdefault(label, []).append(partial(launch, kernel, *arguments))
        launch(kernel, *arguments)

    model = model.on(model.ops.replace(decode_step=partial(decode_step, use_graph=False)))
    cache = filled(model, n_ctx)
    launching.launch = noted
    try:
        model.last_logits(ids_of(model, 1), np.ones((1, n_ctx + 1), bool), cache)
    finally:
        launching.launch = launch
    KEPT.append(cache)  # the launches point into its arrays
    return found


KEPT: list[Any] = []


def transformers(record: Callable) -> None:
    """Decode the same weights with Transformers: eager, then compiled with a static cache."""

    def work(how: str) -> dict[str, Any]:
        need("torch", "transformers")
        import torch
        from transformers import AutoModelForCausalLM

        if not torch.cuda.is_available():
            raise MissingPackageError("torch finds no CUDA device")
        model = AutoModelForCausalLM.from_pretrained(model_folder(MODEL), dtype=torch.bfloat16)
        model = model.to("cuda").eval()
        if how == "compiled":  # `generate` compiles the decoding step for a cache of this kind
            model.generation_config.cache_implementation = "static"
        ids = torch.randint(3, 300, (1, CONTEXTS[0]), device="cuda")

        def generate(n: int) -> float:
            start = time.perf_counter()
            sizes = {"max_new_tokens": n, "min_new_tokens": n}
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **sizes)
            torch.cuda.synchronize()
            return time.perf_counter() - start

        for _ in range(2):
            generate(N_NEW + 1)
        seconds = generate(N_NEW + 1) - generate(1)
        return {"seconds_per_token": seconds / N_NEW, "tokens_per_second": N_NEW / seconds}

    for how in ("eager", "compiled"):
        record(how, partial(work, how))


def vllm(record: Callable) -> None:
    """Decode the same weights with vLLM."""

    def work() -> dict[str, Any]:
        need("vllm")
        import vllm as engine

        where = str(model_folder(MODEL))
        llm = engine.LLM(where, skip_tokenizer_init=True, max_model_len=512)
        prompt = {"prompt_token_ids": [5] * CONTEXTS[0]}

        def generate(n: int) -> float:
            start = time.perf_counter()
            sizes = {"max_tokens": n, "ignore_eos": True, "detokenize": False}
            llm.generate([prompt], engine.SamplingParams(temperature=0, **sizes))
            return time.perf_counter() - start

        generate(2)
        seconds = generate(N_NEW + 1) - generate(1)
        return {"seconds_per_token": seconds / N_NEW, "tokens_per_second": N_NEW / seconds}

    record("decode", work)


def formats(record: Callable) -> None:
    """Decode with every matrix in a block format."""
    from npllm.quantized.block_formats import FORMATS

    model, n_ctx = loaded(), CONTEXTS[0]
    for name in ("Q4_0",) if rehearsing() else FORMATS:

        def work(name: str = name) -> dict[str, Any]:
            packed = in_blocks(model, name)
            return {"weight_bytes": matrix_bytes(packed)} | decode(packed, n_ctx, "queued")

        record(f"decode {name} {n_ctx}", work)


GROUPS: dict[str, Callable[[Callable], None]] = {
    "copy": copy,
    "kernels": kernels,
    "npllm": npllm_group,
    "formats": formats,
    "long": long,
    "transformers": transformers,
    "vllm": vllm,
}
