"""One task of the stage `timings`, in a process of its own, which prints the facts as JSON.

    python3 -m gpu.measure parity/smollm2/cuda

The tasks:

    logits/MODEL             NumPy's logits, by the definitions: the reference of parity
    parity/MODEL/SET         CuPy's logits beside those, in prefill and in decoding
    speed/MODEL/SET          what `npllm bench` measures; the set `numpy` runs on the CPU
    context/MODEL/SET        one token more, by the length of the context
    command/MODEL            the command `npllm bench` itself
    generate/MODEL/ENGINE    `bench.py generate`, npllm and Transformers
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

from gpu.records import ROOT, rehearsing
from gpu.weights import MODELS, model_folder

NOT_RUN = 4  # exit code of a task that this machine lacks a package for
SETS = ("cuda", "blockwise", "reference")
ENGINES = ("npllm-cupy", "transformers-cuda")  # of bench.py
N_TOKENS = {
    "cuda": 32,
    "blockwise": 12,
    "reference": 4,
    "numpy": 4,
}  # that a run decodes, with the cache and without
TOLERANCE = 1e-3  # of the largest logit


def tasks() -> dict[str, float]:
    """Every task and its time limit in seconds, what matters most first."""
    found: dict[str, float] = {}
    for model in MODELS:
        found |= {f"logits/{model}": 60.0, f"parity/{model}/cuda": 40.0}
        found |= {f"{kind}/{model}/cuda": 40.0 for kind in ("speed", "context")}
    for set_ in SETS[1:]:
        for model in MODELS:
            found |= {f"{kind}/{model}/{set_}": 40.0 for kind in ("parity", "speed")}
    for model in MODELS:
        found |= {f"generate/{model}/{engine}": 120.0 for engine in ENGINES}
    found[f"command/{MODELS[0]}"] = 120.0
    return found | {f"speed/{model}/numpy": 120.0 for model in MODELS}


TASKS = tasks()


class MissingPackageError(Exception):
    """A task that this machine cannot do."""


def main(name: str) -> int:
    """Do one task; print its facts as one line of JSON."""
    kind, model, *rest = name.split("/")
    try:
        facts = WORK[kind](model, *rest)
    except MissingPackageError as error:
        print(error)
        return NOT_RUN
    print(json.dumps(facts, default=float))
    return 0


def load(model: str, set_: str) -> Any:
    """A model on the device with one set of operations; with `numpy` the fastest on the CPU."""
    import npllm
    from npllm import kernels, ops

    if set_ == "numpy":
        return npllm.load(model_folder(model))
    sets = {"cuda": kernels.cuda_ops(), "blockwise": ops.blockwise, "reference": ops.reference}
    return npllm.load(model_folder(model), backend="cupy", ops=sets[set_])


def fed(model: Any, n_prompt: int, n_more: int = 3) -> np.ndarray:
    """Logits of a prompt, and of the tokens behind it fed one by one."""
    from npllm.arrays import to_numpy

    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, n_prompt + n_more))
    cache = model.new_cache()
    parts = [to_numpy(model(ids[:, :n_prompt], cache=cache))]
    parts += [
        to_numpy(model(ids[:, at : at + 1], cache=cache)) for at in range(n_prompt, ids.shape[1])
    ]
    return np.concatenate(parts, axis=1)[0]


def logits(model: str) -> dict[str, Any]:
    """Compute NumPy's logits with the blockwise definitions, and keep them beside the weights."""
    import npllm

    start = time.perf_counter()
    found = fed(npllm.load(model_folder(model), ops=npllm.ops.blockwise), prompt_length())
    np.save(model_folder(model) / "numpy-logits.npy", found)
    return {
        "seconds": time.perf_counter() - start,
        "shape": found.shape,
        "largest": np.abs(found).max(),
    }


def parity(model: str, set_: str) -> dict[str, Any]:
    """Compare CuPy's logits with NumPy's."""
    want = np.load(model_folder(model) / "numpy-logits.npy")
    got = fed(load(model, set_), prompt_length())
    return judged(got, want) | {"argmax_equal": float((got.argmax(-1) == want.argmax(-1)).mean())}


def judged(got: np.ndarray, want: np.ndarray) -> dict[str, Any]:
    """The largest difference over the largest logit, and whether that passes; NaN does not."""
    if got.shape != want.shape:
        return {"status": "failed", "why": f"logits of CuPy {got.shape}, of NumPy {want.shape}"}
    error = float(np.abs(got - want).max() / np.abs(want).max())
    facts = {"max_error": error, "tolerance": TOLERANCE}
    return (
        facts
        if error <= TOLERANCE
        else facts | {"status": "failed", "why": f"max error {error:.3g}, tolerance {TOLERANCE:g}"}
    )


def prompt_length() -> int:
    """Tokens of the prompt that is compared."""
    return 9 if rehearsing() else 33


def speed(model: str, set_: str) -> dict[str, Any]:
    """Measure prefill and decoding, as `npllm bench` does."""
    from npllm import kernels
    from npllm.analysis import speed

    n_new = 2 if rehearsing() else N_TOKENS[set_]
    repeat = 3 if set_ == "cuda" and not rehearsing() else 1
    loaded = load(model, set_)
    if set_ == "numpy":
        kernels.seconds_to_prepare()  # Numba compiles at the first use: not in what is timed
    return speed.speed(loaded, n_prompt=9 if rehearsing() else 51, n_new=n_new, repeat=repeat)


def context(model: str, set_: str) -> dict[str, Any]:
    """Time one token more at several lengths of the context."""
    from npllm.arrays import to_numpy

    loaded = load(model, set_)
    lengths = (4, 12, 20) if rehearsing() else (128, 1024, 3500)
    ids = np.random.default_rng(0).integers(0, loaded.config.vocab_size, (1, max(lengths) + 16))
    cache, at, found = loaded.new_cache(), 0, {}
    for length in lengths:
        to_numpy(loaded(ids[:, at:length], cache=cache, logits_to_keep=1))
        seconds, at = [], length + 4
        for place in range(length, at):
            start = time.perf_counter()
            to_numpy(loaded(ids[:, place : place + 1], cache=cache, logits_to_keep=1))
            seconds.append(time.perf_counter() - start)
        found[str(length)] = statistics.median(seconds[1:])
    return {"seconds_per_token": found}


def command(model: str) -> dict[str, Any]:
    """Run the command `npllm bench` on CuPy."""
    need("click")
    sizes = ["-p", "5", "-n", "2", "-r", "1"] if rehearsing() else ["-n", "8", "-r", "1"]
    return child(
        "-m",
        "npllm",
        "bench",
        "-m",
        str(model_folder(model)),
        "--backend",
        "cupy",
        "--json",
        *sizes,
    )


def generate(model: str, engine: str) -> dict[str, Any]:
    """Run `bench.py generate` with one engine."""
    need("click")
    if engine.startswith("transformers"):
        need("torch", "transformers")
        import torch

        if not torch.cuda.is_available():
            raise MissingPackageError("torch finds no CUDA device")
    sizes = ["-n", "2", "-r", "1"] if rehearsing() else ["-n", "32", "-r", "2"]
    return child(
        "scripts/bench.py",
        "generate",
        "-m",
        str(model_folder(model)),
        "--engines",
        engine,
        "--json",
        *sizes,
    )


def need(*packages: str) -> None:
    """Raise unless every package is there."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise MissingPackageError(f"{name} is not installed")


def child(*arguments: str) -> dict[str, Any]:
    """Run a Python program that prints JSON; an error where it fails, or takes too long."""
    limit = float(os.environ.get("NPLLM_TASK_SECONDS", "inf"))  # ends before this process does
    ended = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=limit,
        cwd=ROOT,
    )
    if ended.returncode:
        raise RuntimeError(
            f"{' '.join(arguments)}: exit code {ended.returncode}: {ended.stderr[-1500:]}"
        )
    return json.loads(ended.stdout)


WORK = {
    "logits": logits,
    "parity": parity,
    "speed": speed,
    "context": context,
    "command": command,
    "generate": generate,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
