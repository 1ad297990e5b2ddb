"""`scripts/bench.py lookup`: generation with prompt lookup beside generation without it.

Twenty prompts, written down before the code: summaries and edits of a program, whose answers repeat
the prompt, and plain questions, whose answers do not.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

import npllm

PROMPTS = Path(__file__).with_name("prompts_for_lookup.json")


def seconds_of(model: Any, prompt: Any, n_new: int, n_lookup: int | None) -> tuple[float, Any]:
    """Time one greedy generation; return the seconds and all ids."""
    start = time.perf_counter()
    ids = model.generate(
        prompt, max_new_tokens=n_new, temperature=0, prompt_lookup_num_tokens=n_lookup
    )
    return time.perf_counter() - start, ids


def measure(model: Any, prompt: str, n_new: int, n_lookup: int, repeat: int) -> dict[str, Any]:
    """Time a prompt with and without lookup, in turns."""
    messages = [{"role": "user", "content": prompt}]
    encoded = np.array([model.tokenizer.encode_chat(messages)])
    first, plain, lookup, same = [], [], [], True
    for _ in range(repeat):
        first.append(seconds_of(model, encoded, 1, None)[0])
        seconds, expected = seconds_of(model, encoded, n_new, None)
        plain.append(seconds)
        seconds, ids = seconds_of(model, encoded, n_new, n_lookup)
        lookup.append(seconds)
        same &= np.array_equal(ids, expected)
    all_plain, all_lookup, one = map(statistics.median, (plain, lookup, first))
    return {
        "prompt_tokens": encoded.size,
        "new_tokens": expected.size - encoded.size,
        "first": first,
        "plain": plain,
        "lookup": lookup,
        "ratio": all_plain / all_lookup,
        "ratio_behind_first": (all_plain - one) / (all_lookup - one),
        "same_ids": same,
    }


@click.command()
@click.option("-m", "--model", "path", default=None, help="A folder. [the default model]")
@click.option("--dtype", default=None, help="As in `npllm generate`.")
@click.option("-n", "n_new", default=128, show_default=True, help="New tokens.")
@click.option("--lookup", "n_lookup", default=15, show_default=True, help="Tokens to propose.")
@click.option("-r", "--repeat", default=5, show_default=True)
@click.option("--json", "json_path", default=None, help="Write the seconds there.")
def lookup(
    path: str | None,
    dtype: str | None,
    n_new: int,
    n_lookup: int,
    repeat: int,
    json_path: str | None,
) -> None:
    """Time 20 prompts with and without prompt lookup."""
    model = npllm.load(path, dtype=dtype) if path else npllm.load(dtype=dtype)
    prompts = json.loads(PROMPTS.read_text(encoding="utf-8"))
    measure(model, "a b c d a b c d a b", n_new=32, n_lookup=n_lookup, repeat=1)  # compiles
    rows = [row | measure(model, row["prompt"], n_new, n_lookup, repeat) for row in prompts]
    click.echo(
        "| kind | prompt | new | plain s | lookup s | faster | behind the first | same ids |"
    )
    click.echo("|---|---|---|---|---|---|---|---|")
    for row in rows:
        click.echo(
            f"| {row['kind']} | {row['prompt_tokens']} | {row['new_tokens']} "
            f"| {statistics.median(row['plain']):.3f} | {statistics.median(row['lookup']):.3f} "
            f"| {row['ratio']:.2f} | {row['ratio_behind_first']:.2f} | {row['same_ids']} |"
        )
    for kind in dict.fromkeys(row["kind"] for row in rows):
        some = [row for row in rows if row["kind"] == kind]
        for name, what in (("ratio", "in all"), ("ratio_behind_first", "behind the first token")):
            ratios = [row[name] for row in some]
            median = statistics.median(ratios)
            click.echo(f"{kind}, {what}: median {median:.2f}, smallest {min(ratios):.2f}")
    if json_path:
        Path(json_path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
