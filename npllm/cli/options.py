"""Options that several commands share."""

import functools
from collections.abc import Callable
from typing import Any

import click

from npllm.arrays import BACKENDS
from npllm.checkpoints.fetch import DEFAULT_MODEL
from npllm.encoder import Encoder
from npllm.errors import NpllmValueError
from npllm.kernels import SETS
from npllm.loading import load
from npllm.model import Model
from npllm.quantized.activations import ACTIVATIONS
from npllm.quantized.dtypes import NAMES
from npllm.threads import set_threads

__all__ = [
    "chat_option",
    "filter_options",
    "json_option",
    "load_causal",
    "model_options",
    "path_option",
    "sampling_options",
    "threads_option",
]

Command = Callable[..., Any]

path_option = click.option(
    "-m",
    "--model",
    "path",
    metavar="PATH",
    help=f"Checkpoint folder, GGUF file, or name of a fetched checkpoint. [{DEFAULT_MODEL}]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
chat_option = click.option(
    "--chat", is_flag=True, help="Put the prompt through the checkpoint's chat template."
)
_backend_option = click.option(
    "--backend", type=click.Choice(BACKENDS), default="numpy", show_default=True
)
_dtype_option = click.option(
    "--dtype", type=click.Choice(NAMES), help="Of the weights. [as stored]"
)
_ops_option = click.option(
    "--ops",
    "ops_name",
    type=click.Choice(SETS),
    default="fast",
    show_default=True,
    help="The fastest proven operations; the CUDA kernels; the definitions, with blockwise "
    "attention or without.",
)


_activations_option = click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    help="What a prefill rounds the inputs of linear maps to. [float32: nothing]",
)


def _set_threads(_context: click.Context, _parameter: click.Parameter, count: int | None) -> None:
    set_threads(count)


threads_option = click.option(
    "-t",
    "--threads",
    type=int,
    expose_value=False,
    callback=_set_threads,
    help="Exactly so many. [all cores, fewer beside busy programs]",
)


def model_options(command: Command) -> Command:
    """Add the options that choose a model; the command gets `model`, a function that loads it."""

    @path_option
    @_backend_option
    @_dtype_option
    @_ops_option
    @_activations_option
    @threads_option
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        path: str | None,
        backend: str,
        dtype: str | None,
        ops_name: str,
        activations: str | None,
        **options: Any,
    ) -> Any:
        how = {"backend": backend, "dtype": dtype, "ops": ops_name, "activations": activations}
        load_model = functools.partial(load_causal, path, **how)
        return command(*args, model=load_model, **options)

    return wrapped


def load_causal(path: str | None, **options: Any) -> Model:
    """Load a causal language model; raise for an encoder."""
    model = load(path, **options)
    if isinstance(model, Encoder):
        raise NpllmValueError(
            f"{path} is an encoder, which predicts no next token: this command needs a causal "
            "language model; `npllm embed` takes an encoder"
        )
    return model


_temperature_option = click.option(
    "--temp", "--temperature", "temperature", type=float, help="0 is greedy."
)
_FILTERS = (
    _temperature_option,
    click.option("--top-k", type=int),
    click.option("--top-p", type=float),
    click.option("--min-p", type=float),
    click.option("--repetition-penalty", type=float),
)
_GENERATION = (
    click.option(
        "-n", "--max-new-tokens", type=click.IntRange(min=0), default=256, show_default=True
    ),
    click.option(
        "--do-sample/--no-do-sample",
        default=None,
        help="Sample, or decode greedily. [as the checkpoint says]",
    ),
    *_FILTERS,
    click.option("--seed", type=int, help="Replays the same draw."),
    click.option(
        "--stop", multiple=True, metavar="TEXT", help="End before this text; may be given again."
    ),
    click.option(
        "--use-cache/--no-use-cache",
        default=True,
        help="Without the cache each step recomputes all tokens.",
    ),
    click.option(
        "--prompt-lookup-num-tokens",
        type=click.IntRange(min=1),
        help="Verify up to so many tokens in one pass, which followed the same words earlier.",
    ),
)


def _add_all(options: tuple[Any, ...], command: Command) -> Command:
    """Add options so that the help lists them in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def filter_options(command: Command) -> Command:
    """Add the options of `next_token_distribution`."""
    return _add_all(_FILTERS, command)


def sampling_options(command: Command) -> Command:
    """Add the options of `Model.generate`: Hugging Face's long names, llama.cpp's short ones."""
    return _add_all(_GENERATION, command)
