"""`generate` and `first-token`: npllm and Transformers from a prompt to new tokens."""

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np

import npllm
from bench.processes import (
    MODEL_OPTION,
    Child,
    command,
    cpu_name,
    environment,
    json_of,
    machine,
    serve,
)
from npllm.analysis.machine import peak_memory
from npllm.arrays import backend_namespace, to_numpy
from npllm.loading import checkpoint_folder

MESSAGES = [
    {"role": "user", "content": "Explain to a child, in a few simple words, why the sky is blue."}
]
N_PROMPT = 51
Run = Callable[[int, bool], list[int]]  # of n_new and use_cache: the ids, prompt included


def npllm_contender(folder: str, dtype: str | None, ids: Any = None, backend: str = "numpy") -> Run:
    """Greedy decoding with npllm, stop ids ignored so that every run does the same work."""
    model = npllm.load(folder, dtype=dtype, backend=backend)
    prompt = prompt_ids(model) if ids is None else ids

    def run(n_new: int, use_cache: bool) -> list[int]:
        cache = model.new_cache() if use_cache else None
        ids = new = np.array([prompt])
        for _ in range(n_new):
            logits = model(new if use_cache else ids, cache=cache, logits_to_keep=1)
            new = np.argmax(to_numpy(logits)[:, -1], axis=-1)[:, None]
            ids = np.concatenate([ids, new], axis=1)
        return ids[0].tolist()

    return run


def transformers_contender(folder: str, dtype: str, ids: Any = None, device: str = "cpu") -> Run:
    """The same with Transformers' generate, on PyTorch."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    ids = torch.tensor([prompt_ids(npllm.load(folder)) if ids is None else ids], device=device)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
    model.generation_config.eos_token_id = None

    def run(n_new: int, use_cache: bool) -> list[int]:
        with torch.no_grad():
            return model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n_new,
                do_sample=False,
                use_cache=use_cache,
                pad_token_id=0,
            )[0].tolist()

    return run


CONTENDERS: dict[str, Callable[..., Run]] = {
    "npllm": npllm_contender,
    "npllm-cupy": functools.partial(npllm_contender, backend="cupy"),
    "transformers": transformers_contender,
    "transformers-cuda": functools.partial(transformers_contender, device="cuda"),
}
WARM_DTYPES = {"transformers": "float32", "transformers-cuda": "bfloat16"}  # else as stored
COLD_DTYPES = {"transformers": "bfloat16", "transformers-cuda": "bfloat16"}


def prompt_ids(model: Any) -> list[int]:
    """A chat prompt of N_PROMPT tokens; random ids where the folder has no tokenizer."""
    if model.tokenizer is None:
        return np.random.default_rng(0).integers(0, model.config.vocab_size, N_PROMPT).tolist()
    ids = model.tokenizer.encode_chat(MESSAGES)
    return (ids * (N_PROMPT // len(ids) + 1))[-N_PROMPT:]


def installed(name: str) -> bool:
    """Tell whether every package of a contender can be imported, and a GPU is there if it needs
    one.
    """
    if name.startswith("npllm"):
        return name == "npllm" or backend_namespace("auto").__name__ == "cupy"
    device = "; assert torch.cuda.is_available()" if name.endswith("cuda") else ""
    probe = [sys.executable, "-c", f"import torch, transformers{device}"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def version_of(name: str) -> str:
    """The version of the library behind a contender."""
    if name.startswith("npllm"):
        return npllm.__version__
    return __import__(name.partition("-")[0]).__version__


@click.command(hidden=True)
@click.argument("name")
@click.argument("folder")
@click.argument("dtype")
def child(name: str, folder: str, dtype: str) -> None:
    """Serve measurements of one contender."""
    run = CONTENDERS[name](folder, dtype or None)

    def work(task: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        ids = run(**task)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "ids": ids, "peak_bytes": peak_memory()}

    serve(version_of(name), work)


@click.command(hidden=True)
@click.argument("name")
@click.argument("folder")
@click.argument("dtype")
@click.argument("n_prompt", type=int)
@click.argument("n_new", type=int)
def cold(name: str, folder: str, dtype: str, n_prompt: int, n_new: int) -> None:
    """Load and generate once; print the clock at the first token and at the last."""
    ids = np.random.default_rng(0).integers(0, 1000, n_prompt).tolist()
    run = CONTENDERS[name](folder, dtype or None, ids)
    clock = {"loaded": time.time()}
    run(n_new=1, use_cache=True)
    clock["first"] = time.time()
    if n_new > 1:
        run(n_new=n_new, use_cache=True)
    clock["last"] = time.time()
    print(json.dumps(clock | {"peak_bytes": peak_memory()}), flush=True)


@click.command(name="first-token")
@MODEL_OPTION
@click.option("-p", "--n-prompt", default=16, show_default=True)
@click.option("-n", "--n-new", default=8, show_default=True)
@click.option("-r", "--repeat", default=1, show_default=True)
def first_token(path: str | None, n_prompt: int, n_new: int, repeat: int) -> None:
    """Time a cold process up to its first token, the weights as stored and in the page cache."""
    folder = checkpoint_folder(path)
    n_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    click.echo(
        f"{folder.name}: {n_bytes / 1e9:.2f} GB; {n_prompt} tokens of prompt; {cpu_name()}\n"
    )
    click.echo(
        "| | s to loaded | s to first token | s for prompt + "
        f"{n_new} tokens again | peak GB | of the weights |\n|---|---|---|---|---|---|"
    )
    for name in [name for name in CONTENDERS if installed(name)] * repeat:
        dtype = COLD_DTYPES.get(name, "")
        start = time.time()
        clock = json_of(command("cold", name, folder, dtype, n_prompt, n_new), environment())
        click.echo(f"| {name} | {' | '.join(first_token_cells(clock, start, n_bytes))} |")


def first_token_cells(clock: dict[str, float], start: float, n_bytes: int) -> list[str]:
    """Cells of one row: seconds, and the peak memory beside the bytes of the weights."""
    seconds = (
        clock["loaded"] - start,
        clock["first"] - start,
        clock["last"] - clock["first"],
        clock["peak_bytes"] / 1e9,
        clock["peak_bytes"] / n_bytes,
    )
    return [f"{value:.2f}" for value in seconds]


@click.command()
@MODEL_OPTION
@click.option("-n", "--n-new", default=100, show_default=True)
@click.option("-r", "--repeat", default=3, show_default=True)
@click.option(
    "--engines",
    default=",".join(CONTENDERS),
    show_default=True,
    help="Of these, those that are installed run.",
)
@click.option("--json", "as_json", is_flag=True)
def generate(path: str | None, n_new: int, repeat: int, engines: str, as_json: bool) -> None:
    """Time greedy generation from a 51-token chat prompt, with and without the KV cache."""
    folder = checkpoint_folder(path)
    children = {
        name: Child(command("child", name, folder, WARM_DTYPES.get(name, "")), environment())
        for name in engines.split(",")
        if installed(name)
    }
    if not children:
        raise SystemExit(f"none of {engines} is installed, or there is no device")
    show(
        {
            "task": f"{n_new} new tokens after {N_PROMPT}, greedy",
            "repeat": repeat,
            "versions": {name: contender.version for name, contender in children.items()},
            **measured(children, n_new, repeat),
            "machine": machine(),
        },
        as_json,
    )


def measured(children: dict[str, Child], n_new: int, repeat: int) -> dict[str, Any]:
    """Seconds of every contender, in turns, with the KV cache and without."""
    words = {True: "cached", False: "uncached"}
    seconds = {f"{name} {word}": [] for name in children for word in words.values()}
    texts, peaks = {}, {}
    for contender in children.values():
        contender.measure(n_new=2, use_cache=True)  # warm up
    for _ in range(repeat):
        for cached, word in words.items():
            for name, contender in children.items():
                answer = contender.measure(n_new=n_new, use_cache=cached)
                seconds[f"{name} {word}"].append(answer["seconds"])
                texts[name, cached], peaks[name] = answer["ids"], answer["peak_bytes"]
    same = len({tuple(ids) for ids in texts.values()}) == 1
    return {"peak_bytes": peaks, "seconds": seconds, "same_tokens": same}


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print the result as JSON, or as a Markdown table."""
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    medians = {name: statistics.median(runs) for name, runs in result["seconds"].items()}
    facts = result["machine"]
    click.echo(
        f"{result['task']}; median of {result['repeat']} alternating runs; {facts['cpu']}, "
        f"{facts['cores']} cores, BLAS {facts['blas']}, "
        f"same tokens from all: {result['same_tokens']}\n"
    )
    click.echo("| | seconds | min ... max | of transformers | peak MB |\n|---|---|---|---|---|")
    for name, median in medians.items():
        peer = medians.get("transformers " + name.split()[1])
        ratio = f"{median / peer:.2f}" if peer else "-"
        runs = result["seconds"][name]
        click.echo(
            f"| {name} | {median:.2f} | {min(runs):.2f} ... {max(runs):.2f} | {ratio} "
            f"| {result['peak_bytes'][name.split()[0]] / 1e6:.0f} |"
        )
