"""Commands that write checkpoints: `npllm quantize`, `merge`."""

from pathlib import Path
from typing import Any

import click

from npllm.analysis.inspect import checkpoint_facts
from npllm.checkpoints.gguf.tensor_types import FILE_TYPES, file_type_named
from npllm.cli.options import json_option, path_option
from npllm.cli.streams import print_json
from npllm.errors import NpllmValueError
from npllm.merge_to_folder import merge as merge_checkpoint
from npllm.progress import write_line
from npllm.quantize_to_gguf import quantize as quantize_checkpoint

__all__ = ["COMMANDS"]


def _adapters_option(*, required: bool = False) -> Any:
    """Make the option --adapter, which may be given again."""
    return click.option(
        "--adapter",
        "adapters",
        metavar="DIR",
        multiple=True,
        required=required,
        help="Add the LoRA adapter that PEFT saved in this folder; may be given again.",
    )


def _known_file_type(_context: Any, _option: Any, name: str) -> str:
    """Return the name of a file type; an unknown one is wrong usage."""
    try:
        return file_type_named(name).name
    except NpllmValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@path_option
@click.option(
    "--type",
    "file_type",
    metavar="TYPE",
    default="q4_k_m",
    show_default=True,
    callback=_known_file_type,
    help=f"Write one of {', '.join(FILE_TYPES)}.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write this file; its name ends with .gguf.",
)
@_adapters_option()
@click.option("--force", is_flag=True, help="Replace a file that exists.")
@json_option
def quantize(
    path: str | None,
    file_type: str,
    output: Path,
    adapters: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint as a GGUF file, rounded to blocks of a few bits."""
    quantize_checkpoint(path, output, file_type, adapters=adapters, overwrite=force)
    facts = checkpoint_facts(output)
    kept = {key: facts[key] for key in ("parameters", "bytes", "bits_per_weight", "types")}
    if as_json:
        print_json({"file": str(output), "type": file_type, **kept})
        return
    click.echo(str(output))
    write_line(f"{facts['bytes']:,} bytes, {facts['bits_per_weight']:.2f} bits a weight")


@click.command()
@path_option
@_adapters_option(required=True)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Write this folder.",
)
@click.option("--force", is_flag=True, help="Replace a checkpoint that exists.")
@json_option
def merge(
    path: str | None, adapters: tuple[str, ...], output: Path, force: bool, as_json: bool
) -> None:
    """Write a checkpoint folder with LoRA adapters added to its weights, in their own dtype."""
    merge_checkpoint(path, adapters, output, overwrite=force)
    facts = checkpoint_facts(output)
    if as_json:
        kept = {key: facts[key] for key in ("parameters", "bytes")}
        print_json({"folder": str(output), "adapters": list(adapters), **kept})
        return
    click.echo(str(output))
    write_line(f"{facts['bytes']:,} bytes")


COMMANDS = (quantize, merge)
