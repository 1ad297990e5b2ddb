#!/usr/bin/env python3
"""Measure npllm beside the peers that are installed, in one run.

    python scripts/bench.py COMMAND

    generate            100 new tokens from a 51-token chat prompt, with and without the KV cache
    first-token -m DIR  a new process up to the first token and the eighth, and its peak memory
    speed -m DIR        prefill and decoding of every installed engine, and the machine's limits;
                        -m FILE.gguf: of those that read it
    context -m DIR      a decode step at 128, 1k and 4k tokens of context, beside the bytes it reads
    batch -m DIR        tokens/s of decoding 1 ... 16 sequences at once
    checkouts A B       prefill and decoding of two checkouts of npllm
    lookup              20 prompts with and without prompt lookup
    contention          decoding beside 0, 1, 2 and 4 busy processes, and in two processes at once
    serve -m FILE.gguf  a server's tokens/s at 1, 4 and 16 clients, beside llama-cpp-python's
    adapters            decoding without a LoRA adapter, under one, and with it merged
    chat                the first piece of an answer after 1,000 tokens, with a kept cache or not
    evaluate            requests of lm-eval, beside lm-eval's model "hf" (needs lm_eval)
    attention           the definition, both schedules, a window, and torch, by sequence length

Every contender is a process of its own.  They run in turns (A B A B ...), so that a slow period of
the machine affects all of them.  The results are medians and ratios.  OPENBLAS_CORETYPE, which
fixes the kernels of OpenBLAS, is removed from the children's environment; the report names it.
The commands are in scripts/bench/; those that the processes run are hidden from --help.
"""

import click
from bench import (
    adapters,
    attention,
    chat,
    checkouts,
    contention,
    engines,
    evaluation,
    generation,
    lookup,
    serve,
    speed,
    steps,
)


@click.group()
def main() -> None:
    """Measure npllm beside its peers."""


for command in (
    generation.generate,
    generation.first_token,
    generation.child,
    generation.cold,
    speed.speed,
    engines.engine,
    engines.limits,
    steps.context,
    steps.batch,
    checkouts.checkouts,
    lookup.lookup,
    contention.contention,
    contention.decode_rates,
    serve.serve,
    attention.attention,
    attention.attend,
    adapters.adapters,
    chat.chat,
    evaluation.evaluate,
    evaluation.child,
):
    main.add_command(command)

if __name__ == "__main__":
    main()
