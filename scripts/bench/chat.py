"""`chat`: time to the first piece of an answer after a long conversation, by its cache or anew."""

import statistics
import time
from typing import Any

import click

import npllm
from bench.processes import MODEL_OPTION, cpu_name

SENTENCE = "The river rises in the hills, passes three towns, and meets the sea in a wide bay. "
QUESTIONS = "What does the text say of the towns?", "And where does the river end?"


def conversation(model: Any, n_tokens: int) -> list[dict[str, str]]:
    """A first message of about so many tokens."""
    n_times = max(1, n_tokens // len(model.tokenizer.encode(SENTENCE)))
    return [{"role": "user", "content": f"{SENTENCE * n_times}{QUESTIONS[0]}"}]


def seconds_to_first(model: Any, messages: Any, cache: Any) -> float:
    """Seconds until the first piece of text."""
    start = time.perf_counter()
    next(iter(model.stream(messages, max_new_tokens=4, do_sample=False, cache=cache)))
    return time.perf_counter() - start


@click.command()
@MODEL_OPTION
@click.option("--dtype", help="Of the weights. [as stored]")
@click.option("-p", "--n-history", default=1000, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def chat(path: str | None, dtype: str | None, n_history: int, rounds: int) -> None:
    """Time the second answer of a conversation, whose first message is long."""
    model = npllm.load(path, dtype=dtype)
    messages, cache = conversation(model, n_history), model.new_cache()
    answer = model.generate(messages, max_new_tokens=16, do_sample=False, cache=cache)
    messages += [{"role": "assistant", "content": answer}]
    messages += [{"role": "user", "content": QUESTIONS[1]}]
    n_tokens = len(model.tokenizer.encode_chat(messages))
    seconds_to_first(model, messages, cache.copy())  # compiles
    kept = [seconds_to_first(model, messages, cache.copy()) for _ in range(rounds)]
    anew = [seconds_to_first(model, messages, None) for _ in range(rounds)]
    click.echo(f"{cpu_name()}, npllm {npllm.__version__}, {n_tokens} tokens in the conversation")
    for name, times in (("kept cache", kept), ("without", anew)):
        click.echo(f"{name:<12} first piece after {statistics.median(times) * 1e3:8.1f} ms")
