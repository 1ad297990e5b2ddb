"""`adapters`: decoding and prefill without an adapter, under one, and with it merged."""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from safetensors.numpy import save_file

import npllm
from bench.processes import MODEL_OPTION, cpu_name
from npllm.arrays import to_numpy
from npllm.checkpoints.adapters.modules import chosen_modules, model_modules, naming_of
from npllm.checkpoints.adapters.settings import AdapterSettings, read_settings
from npllm.checkpoints.adapters.tensors import WEIGHTS, factors_of


def random_adapter(config: Any, rank: int, folder: Path) -> Path:
    """Write an adapter of small random factors on every linear map of the layers."""
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    settings: AdapterSettings = read_settings(folder)
    modules = model_modules(config, naming_of([], config))
    draw, tensors = np.random.default_rng(0), {}
    for module in chosen_modules(settings, modules):
        for name, axes in factors_of(module, rank).items():
            tensors[name] = (0.02 * draw.standard_normal(tuple(axes.values()))).astype(np.float32)
    save_file(tensors, folder / WEIGHTS)
    return folder


def seconds_of(model: Any, n_prompt: int, n_new: int) -> tuple[float, float]:
    """Seconds of a prefill, and of a decode step (the median)."""
    cache = model.new_cache()
    ids = np.random.default_rng(1).integers(3, 1000, (1, n_prompt))
    start = time.perf_counter()
    new = model(ids, cache=cache, logits_to_keep=1)
    prefill, steps = time.perf_counter() - start, []
    for _ in range(n_new):
        new = np.argmax(to_numpy(new)[:, -1], axis=-1)[:, None]
        start = time.perf_counter()
        new = model(new, cache=cache, logits_to_keep=1)
        steps.append(time.perf_counter() - start)
    return prefill, statistics.median(steps)


@click.command()
@MODEL_OPTION
@click.option("--dtype", help="Of the weights. [as stored]")
@click.option("--rank", default=16, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("-p", "--n-prompt", default=256, show_default=True)
@click.option("-n", "--n-new", default=32, show_default=True)
def adapters(
    path: str | None, dtype: str | None, rank: int, rounds: int, n_prompt: int, n_new: int
) -> None:
    """Time a model without an adapter, under one on all linear maps, and with it merged."""
    model = npllm.load(path, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        adapted = npllm.load(path, dtype=dtype)
        adapted.load_adapter(random_adapter(model.config, rank, Path(folder)))
    contenders = {"base": model, f"adapter, rank {rank}": adapted}
    if dtype not in ("int8", "int4"):
        contenders["merged"] = adapted.merge_adapter()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for found in contenders.values():
        seconds_of(found, n_prompt, 2)  # compiles
    for _ in range(rounds):
        for name, found in contenders.items():
            times[name].append(seconds_of(found, n_prompt, n_new))
    click.echo(f"{cpu_name()}, npllm {npllm.__version__}")
    for name, pairs in times.items():
        prefill, step = (statistics.median(x) for x in zip(*pairs, strict=True))
        click.echo(
            f"{name:<18} prefill {n_prompt / prefill:8.1f} tokens/s, step {step * 1e3:7.2f} ms"
        )
