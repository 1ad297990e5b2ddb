"""`evaluate`: the same requests of lm-eval, answered by npllm and by lm-eval's own model "hf"."""

import json
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import click

from bench.processes import MODEL_OPTION, cpu_name, environment
from npllm.loading import checkpoint_folder

FACTS = [
    ("the capital of France", "Paris", "London", "Rome", "Madrid"),
    ("the largest planet of the solar system", "Jupiter", "Mars", "Venus", "Mercury"),
    ("what bees make from nectar", "honey", "milk", "paper made of wood", "sand"),
    ("the number of legs of a spider", "eight", "six", "ten", "four"),
    ("the colour of the sky on a clear day", "blue", "green", "purple", "brown"),
    ("the metal that a compass needle is made of", "iron", "gold", "lead", "tin"),
    ("the gas that plants take from the air", "carbon dioxide", "helium", "neon", "argon"),
    ("the author of the play Hamlet", "William Shakespeare", "Charles Dickens", "Homer", "Dante"),
]
ENGINES = {"npllm": {}, "hf bfloat16": {"dtype": "bfloat16"}, "hf float32": {"dtype": "float32"}}


def requests(n_shot: int) -> list[Any]:
    """Questions after n_shot answered ones, each with four answers."""
    texts = [f"Question: What is {fact[0]}?\nAnswer:" for fact in FACTS]
    solved = [f"{text} {fact[1]}\n\n" for text, fact in zip(texts, FACTS, strict=True)]
    return [
        SimpleNamespace(
            args=("".join((solved[:n] + solved[n + 1 :])[:n_shot]) + text, f" {answer}")
        )
        for n, text in enumerate(texts)
        for answer in FACTS[n][1:]
    ]


def language_model(engine: str, folder: str, batch_size: int) -> Any:
    """One of the contenders."""
    if engine == "npllm":
        from npllm.evaluation.harness import NpllmLM

        return NpllmLM(folder)
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=folder, device="cpu", batch_size=batch_size, **ENGINES[engine])


@click.command(name="evaluate-child", hidden=True)
@click.argument("engine")
@click.argument("folder")
@click.argument("n_shot", type=int)
@click.argument("batch_size", type=int)
def child(engine: str, folder: str, n_shot: int, batch_size: int) -> None:
    """Answer all requests once, after a warm-up; print seconds and answers."""
    lm = language_model(engine, folder, batch_size)
    asked = requests(n_shot)
    lm.loglikelihood(asked[:8], disable_tqdm=True)
    start = time.perf_counter()
    answers = lm.loglikelihood(asked, disable_tqdm=True)
    print(json.dumps({"seconds": time.perf_counter() - start, "answers": answers}))


@click.command()
@MODEL_OPTION
@click.option("--num-fewshot", "n_shot", default=4, show_default=True)
@click.option("--batch-size", default=8, show_default=True, help='Of the model "hf".')
@click.option("--rounds", default=1, show_default=True)
def evaluate(path: str | None, n_shot: int, batch_size: int, rounds: int) -> None:
    """Time log-likelihoods of multiple-choice questions, npllm beside lm-eval's model "hf"."""
    folder = str(checkpoint_folder(path))
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    for _ in range(rounds):
        for engine, kept in found.items():
            words = [sys.executable, sys.argv[0], "evaluate-child", engine, folder]
            ended = subprocess.run(
                [*words, str(n_shot), str(batch_size)],
                capture_output=True,
                text=True,
                check=True,
                env=environment(),
            )
            kept.append(json.loads(ended.stdout.splitlines()[-1]))
    click.echo(f"{cpu_name()}; {len(requests(n_shot))} requests, {n_shot} examples")
    right = found["hf float32"][0]["answers"]
    for engine, kept in found.items():
        seconds = statistics.median(x["seconds"] for x in kept)
        pairs = zip(kept[0]["answers"], right, strict=True)
        furthest = max(abs(mine[0] - theirs[0]) for mine, theirs in pairs)
        click.echo(
            f"{engine:<12} {seconds:7.2f} s, {len(right) / seconds:7.1f} requests/s, "
            f"furthest from hf float32: {furthest:.2g}"
        )
