"""Options that several commands share."""

import functools
from collections.abc import Callable
from typing import Any

import click

from npllm.arrays import BACKENDS
from npllm.cache.state import CACHE_DTYPES
from npllm.checkpoints.fetch import DEFAULT_MODEL
from npllm.cli.streams import read_prompt
from npllm.encoder import Encoder
from npllm.errors import NpllmValueError
from npllm.kernels import SETS
from npllm.loading import load
from npllm.model import Model
from npllm.quantized.activations import ACTIVATIONS
from npllm.quantized.dtypes import NAMES
from npllm.threads import set_threads

__all__ = [
    "adapter_option",
    "any_model_options",
    "chat_option",
    "decoding_options",
    "filter_options",
    "given_options",
    "json_option",
    "load_causal",
    "model_options",
    "new_tokens_option",
    "path_option",
    "prompt_options",
    "sampling_options",
    "refuse_without",
    "threads_option",
]

Command = Callable[..., Any]

path_option = click.option(
    "-m",
    "--model",
    "path",
    metavar="PATH",
    help=f"Load this checkpoint folder, GGUF file, or fetched checkpoint. [{DEFAULT_MODEL}]",
)
adapter_option = click.option(
    "--adapter", metavar="DIR", help="Run with the LoRA adapter that PEFT saved in this folder."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
chat_option = click.option(
    "--chat", is_flag=True, help="Put the prompt through the checkpoint's chat template."
)
_backend_option = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="numpy",
    show_default=True,
    help="Keep the arrays in NumPy or CuPy; auto: in CuPy where it finds a device.",
)
_dtype_option = click.option(
    "--dtype", type=click.Choice(NAMES), help="Hold the weights in this type. [as stored]"
)
_ops_option = click.option(
    "--ops",
    "ops_name",
    type=click.Choice(SETS),
    default="fast",
    show_default=True,
    help="Run the fastest proven operations; the CUDA kernels; the definitions, with blockwise "
    "attention or without.",
)


_activations_option = click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    help="Round the inputs of linear maps to this in a prefill. [by the weights; float32: nothing]",
)


_cache_dtype_option = click.option(
    "--cache-dtype",
    type=click.Choice(CACHE_DTYPES),
    help="Keep keys and values in this type. [as computed: float32]",
)


def prompt_options(command: Command) -> Command:
    """Add the prompt: by position, as -p, or in a file; the command gets `prompt`, its text."""

    @click.argument("prompt", required=False)
    @click.option("-p", "--prompt", "named", metavar="TEXT", help="Give PROMPT as an option.")
    @click.option(
        "-f", "--file", metavar="FILE", type=click.Path(), help="Read the prompt from a file."
    )
    @functools.wraps(command)
    def wrapped(
        *args: Any, prompt: str | None, named: str | None, file: str | None, **options: Any
    ) -> Any:
        given = [x for x in (prompt, named, file) if x is not None]
        if len(given) > 1:
            raise click.UsageError(
                f"one prompt is needed, got {len(given)}: give PROMPT, -p TEXT or -f FILE"
            )
        text = read_prompt(prompt if named is None else named, file)
        return command(*args, prompt=text, **options)

    return wrapped


class _NewTokens(click.ParamType):
    """A number of new tokens: -1 is as many as come until a stop, or until the context is full."""

    name = "integer"

    def __init__(self, least: int):
        self.least = least

    def convert(self, value: Any, param: Any, ctx: Any) -> int | None:
        """Turn the text into a number; -1 into None."""
        n = click.INT.convert(value, param, ctx)
        if n != -1 and n < self.least:
            self.fail(f"{n} is neither -1 nor in the range x>={self.least}.", param, ctx)
        return None if n == -1 else n


def new_tokens_option(default: int, least: int = 0) -> Any:
    """Make the option -n; the command gets `max_new_tokens`, None for -1."""
    return click.option(
        "-n",
        "--max-new-tokens",
        "--max-tokens",
        "--n-predict",
        type=_NewTokens(least),
        default=default,
        show_default=True,
        help="Generate so many tokens; -1: until a stop, or the end of the context.",
    )


def given_options(*names: str) -> list[str]:
    """Which parameters of the running command were given by the caller: their long options."""
    context = click.get_current_context()
    source = click.core.ParameterSource.COMMANDLINE
    given = [p for p in context.command.params if context.get_parameter_source(p.name) is source]
    return [max(p.opts, key=len) for p in given if p.name in names]


def refuse_without(reason: str, *names: str) -> None:
    """Raise a usage error for options that would be ignored.

    Raises
    ------
    click.UsageError
        When one of the named parameters was given.
    """
    given = given_options(*names)
    if given:
        raise click.UsageError(f"{' and '.join(given)} would be ignored: {reason}")


def _set_threads(_context: click.Context, _parameter: click.Parameter, count: int | None) -> None:
    set_threads(count)


threads_option = click.option(
    "-t",
    "--threads",
    type=int,
    expose_value=False,
    callback=_set_threads,
    help="Use so many threads. [all cores, fewer beside busy programs]",
)


def model_options(command: Command) -> Command:
    """Add the options that choose a causal model; the command gets `model`, a function that loads
    it.
    """
    return _with_model(command, load_causal)


def any_model_options(command: Command) -> Command:
    """Add the options that choose a model or an encoder."""
    return _with_model(command, load)


def _with_model(command: Command, loader: Callable[..., Any]) -> Command:
    """Add the options of `npllm.load`."""

    @path_option
    @adapter_option
    @_backend_option
    @_dtype_option
    @_ops_option
    @_activations_option
    @_cache_dtype_option
    @threads_option
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        path: str | None,
        adapter: str | None,
        backend: str,
        dtype: str | None,
        ops_name: str,
        activations: str | None,
        cache_dtype: str | None,
        **options: Any,
    ) -> Any:
        how = {"backend": backend, "dtype": dtype, "ops": ops_name, "activations": activations}
        load_model = functools.partial(
            loader, path, adapter=adapter, cache_dtype=cache_dtype, **how
        )
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
    "--temp",
    "--temperature",
    "temperature",
    type=float,
    help="Divide the logits by this before the draw; 0 is greedy.",
)
_TOP_K_HELP = "Keep so many of the most likely tokens; 0 keeps all."
_FILTERS = (
    _temperature_option,
    click.option("--top-k", type=int, help=_TOP_K_HELP),
    click.option("--top-p", type=float, help="Draw from the most likely tokens of this sum."),
    click.option("--min-p", type=float, help="Leave out tokens below this share of the best one."),
    click.option(
        "--repetition-penalty", type=float, help="Make repeated tokens less likely, above 1."
    ),
)
_GENERATION = (
    new_tokens_option(256),
    click.option(
        "--do-sample/--no-do-sample",
        default=None,
        help="Sample, or decode greedily. [as the checkpoint says]",
    ),
    _temperature_option,
    click.option("-k", "--top-k", type=int, help=_TOP_K_HELP),
    *_FILTERS[2:],
    click.option(
        "--min-new-tokens",
        type=click.IntRange(min=0),
        help="Generate at least so many tokens before a stop.",
    ),
    click.option("-s", "--seed", type=int, help="Draw as every run with this seed does."),
    click.option(
        "--stop", multiple=True, metavar="TEXT", help="End before this text; may be given again."
    ),
    click.option(
        "--use-cache/--no-use-cache",
        default=True,
        help="Keep keys and values, or recompute all tokens at each step.",
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


def decoding_options(command: Command) -> Command:
    """Add those that concern the tokens alone, not how they are computed."""
    return _add_all(_GENERATION[:-2], command)


def sampling_options(command: Command) -> Command:
    """Add the options of `Model.generate`: Hugging Face's long names, llama.cpp's short ones."""
    return _add_all(_GENERATION, command)
