"""Commands that test other implementations: `npllm diagnose` and `npllm probes`."""

from pathlib import Path
from typing import Any

import click
import numpy as np

from npllm.cli.streams import print_json, usage_errors
from npllm.errors import NpllmOSError, NpllmValueError

__all__ = ["COMMANDS"]

EXIT_CODES = {"right": 0, "wrong": 1, "not decidable": 3}

OPS = (
    "attention",
    "attention_lse",
    "rope",
    "rms_norm",
    "swiglu",
    "linear",
    "qkv_projection",
    "embed",
    "lm_head",
    "sampler",
    "detokenize",
)
"""Operations of `diagnose`, written out so that `npllm --help` imports little."""


@click.command()
@click.argument("inputs", type=click.Path())
@click.argument("output", type=click.Path())
@click.option(
    "--op", required=True, type=click.Choice(OPS), help="Take the output for one of this operation."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def diagnose(context: click.Context, inputs: str, output: str, op: str, as_json: bool) -> None:
    """Name the convention that an OUTPUT breaks.

    INPUTS holds the operation's inputs under their names, numbers as arrays without axes; OUTPUT
    the output, alone or under the name `output` (q, k and v for qkv_projection).  Files are .npz or
    .safetensors; OUTPUT may be .npy.

    Exit codes: 0 right, 1 wrong, 2 usage, 3 not decidable.
    """
    from npllm.testing import diagnose as diagnosed

    with usage_errors():
        found = diagnosed(op, read_arrays(inputs), _output(op, read_arrays(output), output))
    if as_json:
        print_json(found.facts())
    else:
        click.echo(str(found))
    context.exit(EXIT_CODES[found.status])


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def probes(folder: str, as_json: bool) -> None:
    """Write the probes to DIR: files that diagnose a port in any language.

    Each probe has inputs, the right outputs with their budget, and the output of every wrong
    option; index.json lists the probes.
    """
    from npllm.testing import PROBES, write_probes

    paths = write_probes(folder)
    facts = {
        "index": str(paths[0]),
        "probes": len(PROBES),
        "files": len(paths),
        "bytes": sum(p.stat().st_size for p in paths),
    }
    if as_json:
        print_json(facts)
        return
    click.echo(
        f"{paths[0]}: {len(PROBES)} probes, {len(paths)} files, {facts['bytes'] / 1e6:.1f} MB"
    )


def read_arrays(path: str) -> dict[str, Any]:
    """Read the arrays of an .npz, .npy or .safetensors file by name.

    Raises
    ------
    NpllmOSError
        When the file cannot be read, or is not what its name says.
    NpllmValueError
        For another suffix.
    """
    suffix = Path(path).suffix
    if suffix not in (".npz", ".npy", ".safetensors"):
        raise NpllmValueError(
            f"{path}: the suffix must be .npz, .npy or .safetensors, got {suffix!r}"
        )
    try:
        if suffix == ".safetensors":
            return _read_safetensors(path)
        loaded = np.load(path, allow_pickle=False)
        return (
            {"output": loaded}
            if suffix == ".npy"
            else {name: loaded[name] for name in loaded.files}
        )
    except OSError as error:
        raise NpllmOSError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:
        raise NpllmOSError(f"{path}: is not a {suffix} file of plain arrays ({error})") from None


def _read_safetensors(path: str) -> dict[str, Any]:
    import ml_dtypes  # noqa: F401 - gives NumPy the type bfloat16
    from safetensors.numpy import load_file

    return dict(load_file(path))


def _output(op: str, arrays: dict[str, Any], path: str) -> Any:
    """Find the output of an operation among the arrays of a file."""
    if op == "qkv_projection" and {"q", "k", "v"} <= set(arrays):
        return arrays
    if "output" in arrays:
        return arrays["output"]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    raise NpllmValueError(
        f"{path}: must hold one array, or one called output; got {', '.join(arrays) or 'none'}"
    )


COMMANDS = (diagnose, probes)
"""What `npllm` registers."""
