"""The `npllm` command: argument parsing only.  Results go to stdout, progress and statistics to
stderr.
"""

import functools
import io
import json
import sys
import warnings

import click

from npllm import __version__
from npllm.analysis import report
from npllm.analysis.cost import cost_facts
from npllm.analysis.plots import draw_masks, draw_weights
from npllm.analysis.profiling import profile
from npllm.analysis.score import perplexity_facts
from npllm.analysis.steps import attention_steps
from npllm.arrays import BACKENDS, DTYPES
from npllm.checkpoints.fetch import DEFAULT_MODEL, EMBEDDING_MODEL, fetch
from npllm.checkpoints.finite import find_nonfinite
from npllm.config.config import Config
from npllm.decoding.sampling import FILTER_ORDERS
from npllm.encoder import Encoder, cosine_similarities
from npllm.errors import NpllmError, NpllmOSError, NpllmValueError
from npllm.kernels import SETS
from npllm.model import checkpoint_folder, load
from npllm.text.tokenizer import Tokenizer


class _Group(click.Group):
    """Turns an NpllmError into one line on stderr and exit code 1; what a terminal's encoding
    cannot show, into question marks.
    """

    def invoke(self, ctx):
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        warnings.showwarning = lambda message, *_, **__: click.echo(
            f"npllm: warning: {message}", err=True
        )
        try:
            return super().invoke(ctx)
        except NpllmError as error:
            click.echo(f"npllm: {error}", err=True)
            ctx.exit(1)


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__)
def main():
    """Phi-3 language models in plain NumPy and CuPy."""


_path_option = click.option(
    "-m",
    "--model",
    "path",
    metavar="PATH",
    help=f"Checkpoint folder, or name of a fetched one. [{DEFAULT_MODEL}]",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_chat_option = click.option(
    "--chat", is_flag=True, help="Put the prompt through the checkpoint's chat template."
)


def _model_options(command):
    """Add the options that choose a model; the command gets `model`, a function that loads it."""

    @_path_option
    @click.option("--backend", type=click.Choice(BACKENDS), default="numpy", show_default=True)
    @click.option(
        "--dtype", type=click.Choice((*DTYPES, "int8")), help="Of the weights. [as stored]"
    )
    @click.option(
        "--ops",
        "ops_name",
        type=click.Choice(SETS),
        default="fast",
        show_default=True,
        help="The fastest proven operations; the CUDA kernels; the definitions, with blockwise attention or without.",
    )
    @functools.wraps(command)
    def wrapped(*args, path, backend, dtype, ops_name, **kwargs):
        return command(
            *args,
            model=lambda: _load_causal(path, backend=backend, dtype=dtype, ops=ops_name),
            **kwargs,
        )

    return wrapped


def _load_causal(path, **options):
    """Load a causal language model; raise for an encoder."""
    model = load(path, **options)
    if isinstance(model, Encoder):
        raise NpllmValueError(
            f"{path} is an encoder, which predicts no next token: this command needs a causal language model; "
            "`npllm embed` takes an encoder"
        )
    return model


def _sampling_options(command):
    """Add the options of `Model.generate`, under Hugging Face's long names and llama.cpp's short
    ones.
    """
    options = [
        click.option(
            "-n", "--max-new-tokens", type=click.IntRange(min=0), default=256, show_default=True
        ),
        click.option(
            "--do-sample/--no-do-sample",
            default=None,
            help="Sample, or decode greedily. [as the checkpoint says]",
        ),
        click.option("--temp", "--temperature", "temperature", type=float, help="0 is greedy."),
        click.option("--top-k", type=int),
        click.option("--top-p", type=float),
        click.option("--min-p", type=float),
        click.option("--repetition-penalty", type=float),
        click.option("--seed", type=int, help="Replays the same draw."),
        click.option(
            "--stop",
            multiple=True,
            metavar="TEXT",
            help="End before this text; may be given again.",
        ),
        click.option(
            "--use-cache/--no-use-cache",
            default=True,
            help="Without the cache every token computes all again.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _read_prompt(prompt, chat=False):
    """The prompt, from standard input where it is "-"; as a message where the chat template is
    wanted.
    """
    text = _from_stdin(sys.stdin.read) if prompt == "-" else prompt
    return [{"role": "user", "content": text}] if chat else text


def _from_stdin(read, *args):
    try:
        return read(*args)
    except UnicodeDecodeError as error:
        raise NpllmValueError(
            f"standard input is not valid {error.encoding} text ({error.reason} at byte {error.start})"
        ) from None


def _print_json(data):
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    click.echo(json.dumps(data, ensure_ascii=not is_utf8, indent=2))


def _write(text):
    """Print a piece of an answer at once."""
    click.echo(text, nl=False)
    sys.stdout.flush()


def _print_stats(stats):
    click.echo(
        f"prompt {stats['prompt_tokens']} tokens, {stats['prompt_tokens_per_second']:.1f} tokens/s; "
        f"generation {stats['new_tokens']} tokens, {stats['new_tokens_per_second']:.1f} tokens/s; "
        f"peak memory {stats['peak_bytes'] / 1e6:.0f} MB",
        err=True,
    )


@main.command()
@click.argument("prompt", default="-")
@_model_options
@_sampling_options
@_chat_option
@_json_option
def generate(prompt, model, chat, as_json, **options):
    """Continue PROMPT ("-": standard input) and stream the new text."""
    prompt, model = _read_prompt(prompt, chat), model()
    if as_json:
        _print_json(report.generate_timed(model, prompt, lambda _: None, **options))
        return
    stats = report.generate_timed(model, prompt, _write, echo=True, **options)
    click.echo()
    _print_stats(stats)


@main.command()
@_model_options
@_sampling_options
@click.option("--system", metavar="TEXT", help="System message.")
def chat(model, system, **options):
    """Talk with the model.  /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops
    an answer.
    """
    model = model()
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    model.stream(
        [*opening, {"role": "user", "content": "Hello"}], **options
    )  # what cannot work is said now, not at every line
    while True:
        line = _read_line()
        if line is None or line == "/exit":
            return
        if line == "/reset":
            messages = list(opening)
        elif line:
            messages = _answer(model, [*messages, {"role": "user", "content": line}], options)


def _read_line():
    """One line of the user, with line editing where the terminal has it; None at the end of input,
    empty after Ctrl-C.
    """
    try:
        import readline  # noqa: F401 - importing it is what switches line editing on
    except ImportError:
        pass
    try:
        return _from_stdin(input, "> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        click.echo()
        return ""


def _answer(model, messages, options):
    """Print the answer to a conversation and return the conversation with it; Ctrl-C keeps what was
    said so far.
    """
    said = []

    def write(piece):
        said.append(piece)
        _write(piece)

    try:
        stats = report.generate_timed(model, messages, write, **options)
        click.echo()
        _print_stats(stats)
    except KeyboardInterrupt:
        click.echo(" [stopped]")
    except NpllmError as error:  # a conversation that has outgrown the context: the program goes on
        click.echo(f"npllm: {error}; /reset begins anew", err=True)
        return messages[:-1]
    return [*messages, {"role": "assistant", "content": "".join(said)}]


@main.command()
@click.argument("prompt", default="-")
@_model_options
@click.option(
    "-k",
    "--top",
    "n",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="How many tokens.",
)
@click.option("--temp", "--temperature", "temperature", type=float, help="0 is greedy.")
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--min-p", type=float)
@click.option("--repetition-penalty", type=float)
@click.option(
    "--order",
    type=click.Choice(tuple(FILTER_ORDERS)),
    default="transformers",
    show_default=True,
    help="Of the filters.",
)
@_chat_option
@_json_option
def topk(prompt, model, n, chat, as_json, **filters):
    """Show the most likely next tokens after PROMPT, and their probabilities after the filters
    given.
    """
    rows = report.next_tokens(model(), _read_prompt(prompt, chat), n, **filters)
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        bar = "█" * round(40 * row["probability"])
        click.echo(f"{row['id']:>7}  {row['text']!r:<20} {row['probability']:8.4f}  {bar}")


@main.command()
@click.argument("prompt", default="-")
@_model_options
@click.option(
    "--num-beams",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Answers that run side by side.",
)
@click.option(
    "--num-return-sequences",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="At most --num-beams.",
)
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=1), default=50, show_default=True)
@click.option(
    "--length-penalty",
    type=float,
    default=1.0,
    show_default=True,
    help="The larger, the longer the answers.",
)
@click.option(
    "--early-stopping",
    type=click.Choice(("true", "false", "never")),
    default="false",
    show_default=True,
    help="End with the first finished answers; when no better one is likely; when none is possible.",
)
@click.option("--repetition-penalty", type=float)
@_chat_option
@_json_option
def beam(prompt, model, chat, early_stopping, as_json, **options):
    """Search for the likeliest answers to PROMPT ("-": standard input), several at a time."""
    prompt, early = (
        _read_prompt(prompt, chat),
        {"true": True, "false": False, "never": "never"}[early_stopping],
    )
    answers = model().beam_search(prompt, early_stopping=early, **options)
    if as_json:
        _print_json(answers)
        return
    for answer in answers:
        _write(f"{answer['score']:9.4f}  {answer['text']!r}\n")


@main.command()
@click.argument("text", default="-")
@_model_options
@_json_option
def score(text, model, as_json):
    """Show the log-probability of every token of TEXT after those before it."""
    facts = report.score_facts(model(), _read_prompt(text))
    if as_json:
        _print_json(facts)
        return
    for row in facts["tokens"]:
        value = "" if row["log_probability"] is None else f"{row['log_probability']:.4f}"
        _write(f"{row['id']:>7}  {row['text']!r:<20} {value:>9}\n")
    click.echo(
        f"log-probability {facts['log_probability']:.4f}, perplexity {facts['perplexity']:.4f}"
    )


@main.command()
@click.argument("file", default="-", type=click.Path(allow_dash=True))
@_model_options
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    help="Tokens of a window. [2048, or the context length]",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    help="Tokens from one window to the next. [half a window]",
)
@_json_option
def perplexity(file, model, max_length, stride, as_json):
    """Measure the perplexity of a text FILE ("-": standard input) of any length, with windows that
    overlap.
    """
    facts = perplexity_facts(
        model(), _read_file(file), max_length=max_length, stride=stride, progress=True
    )
    if as_json:
        _print_json(facts)
        return
    click.echo(
        f"perplexity {facts['perplexity']:.4f}, {facts['bits_per_byte']:.4f} bits per byte, {facts['tokens']} tokens"
    )
    click.echo(f"{facts['tokens_per_second']:.1f} tokens/s, {facts['seconds']:.1f} s", err=True)


def _read_file(file):
    """The text of a UTF-8 file, or of standard input."""
    try:
        if file == "-":
            return sys.stdin.read()
        with open(file, encoding="utf-8") as stream:
            return stream.read()
    except UnicodeDecodeError as error:
        raise NpllmValueError(
            f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    except OSError as error:
        raise NpllmOSError(f"{file}: cannot be read ({error.strerror})") from None


@main.command()
@click.argument("texts", metavar="TEXT TEXT ...", nargs=-1, required=True)
@click.option(
    "-m",
    "--model",
    "path",
    metavar="PATH",
    help=f"Folder of an encoder, or name of a fetched one. [{EMBEDDING_MODEL}, fetched on first use]",
)
@_json_option
def embed(texts, path, as_json):
    """Show how alike texts are: the cosine of every pair of their embeddings."""
    similarities = cosine_similarities(
        load(fetch(EMBEDDING_MODEL) if path is None else path).embed(list(texts))
    )
    if as_json:
        _print_json({"texts": list(texts), "similarities": similarities.tolist()})
        return
    for number, (row, text) in enumerate(zip(similarities, texts, strict=True), 1):
        _write(f"{number:>3}  {' '.join(f'{value:7.4f}' for value in row)}  {text[:80]!r}\n")


@main.command()
@_path_option
@click.option(
    "--context",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Tokens of the prompt.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Sequences side by side.",
)
@click.option(
    "--dtype", type=click.Choice(tuple(DTYPES)), help="Of the weights. [as config.json says]"
)
@_json_option
def cost(path, context, batch, dtype, as_json):
    """Show what a model costs: parameters, operations, bytes, KV cache.  Needs config.json alone,
    no weights.
    """
    config = Config.from_json(path if path and path.endswith(".json") else checkpoint_folder(path))
    facts = cost_facts(config, context, n_batch=batch, dtype=dtype)
    if as_json:
        _print_json(facts)
        return
    for line in report.cost_lines(facts):
        click.echo(line)


@main.command()
@click.argument("text", default="-")
@_path_option
@_chat_option
@_json_option
def tokens(text, path, chat, as_json):
    """Show how TEXT is cut into tokens."""
    tokenizer = Tokenizer.from_folder(checkpoint_folder(path))
    prompt = _read_prompt(text, chat)
    ids = tokenizer.encode_chat(prompt) if chat else tokenizer.encode(prompt)
    rows = [{"id": i, "text": tokenizer.token_text(i)} for i in ids]
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        click.echo(f"{row['id']:>7}  {row['text']!r}")
    click.echo(f"{len(rows)} tokens", err=True)


@main.command()
@_path_option
@click.option(
    "--check-finite",
    is_flag=True,
    help="Also look for NaN and infinity, at the speed of the disk; exit code 1 if any.",
)
@click.option(
    "--int8",
    is_flag=True,
    help="Also measure the error of every matrix under --dtype int8: |w - rounded| / |w|.",
)
@_json_option
def inspect(path, check_finite, int8, as_json):
    """Show a checkpoint's modules, parameters and bytes, from its headers alone."""
    folder = checkpoint_folder(path)
    facts = report.checkpoint_facts(folder)
    if int8:
        facts["int8_errors"] = report.int8_errors(folder)
    if check_finite:
        facts["not_finite"] = find_nonfinite(folder)
    _print_facts(facts, as_json)
    if facts.get("not_finite"):
        raise NpllmValueError(
            f"{len(facts['not_finite'])} tensors hold NaN or infinity; is the download complete?"
        )


def _print_facts(facts, as_json):
    if as_json:
        _print_json(facts)
        return
    click.echo(facts["tree"])
    click.echo(f"\n{facts['folder']}")
    click.echo(f"parameters     {facts['parameters']:>16,}")
    for part, count in facts["parameters_by_part"].items():
        click.echo(f"  {part:<12} {count:>16,}")
    click.echo(
        f"bytes          {facts['bytes']:>16,}  {', '.join(facts['dtypes'])}, {facts['files']} file(s)"
    )
    click.echo(f"context length {facts['context_length']:>16,}  tokens")
    click.echo(f"KV cache       {facts['kv_bytes_per_token']:>16,}  bytes per token in float32")
    for part, errors in facts.get("int8_errors", {}).items():
        click.echo(
            f"int8 error     {part:<24} "
            + "  ".join(f"{name} {error:.4f}" for name, error in errors.items())
        )
    for name, (n_nan, n_infinite) in facts.get("not_finite", {}).items():
        click.echo(f"{name}: {n_nan} NaN, {n_infinite} infinities")


@main.command(name="fetch")
@click.argument("name", default=DEFAULT_MODEL)
@click.option("--revision", help="Branch, tag or commit of a Hugging Face repository.")
@click.option(
    "--token", help="Hugging Face access token, for gated repositories.", envvar="HF_TOKEN"
)
def fetch_command(name, revision, token):
    """Fetch the default checkpoint, all-minilm-l6-v2, or any Hugging Face repository OWNER/NAME
    (safetensors, json, templates).
    """
    click.echo(str(fetch(name, revision=revision, token=token)))


@main.command()
@_model_options
@click.option(
    "-p",
    "--n-prompt",
    type=click.IntRange(min=1),
    default=51,
    show_default=True,
    help="Tokens of the prompt.",
)
@click.option(
    "-n", "--n-new", type=click.IntRange(min=1), default=32, show_default=True, help="New tokens."
)
@click.option("-r", "--repeat", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--profile",
    "by_op",
    is_flag=True,
    help="Time every operation, against the limits of the machine.",
)
@click.option(
    "--against",
    type=click.Choice(SETS),
    multiple=True,
    help="Measure the same model on another set of operations as well; may be given again.",
)
@_json_option
def bench(model, as_json, by_op, against, **sizes):
    """Measure prefill and decode tokens/s, with the cache and without."""
    if by_op and against:
        raise click.UsageError(
            "--profile measures one set of operations: leave out --against, and choose the set with --ops"
        )
    if against:
        facts = report.compare_sets(model(), against, **sizes) | {"machine": report.machine_facts()}
        return _print_json(facts) if as_json else click.echo("\n".join(report.set_lines(facts)))
    if by_op:
        facts = profile(model(), **sizes) | {"machine": report.machine_facts()}
        return _print_json(facts) if as_json else click.echo("\n".join(report.profile_lines(facts)))
    facts = report.speed(model(), **sizes) | {"machine": report.machine_facts()}
    if as_json:
        _print_json(facts)
        return
    for name, value in facts["tokens_per_second"].items():
        click.echo(f"{name:<16} {value:9.1f} tokens/s")
    click.echo(f"the cache makes decoding {facts['cache_speedup']:.1f} times as fast")
    click.echo(
        f"median of {facts['repeat']} runs, {facts['n_prompt']} prompt and {facts['n_new']} new tokens, {facts['ops']} ops, "
        f"peak memory {facts['peak_bytes'] / 1e6:.0f} MB",
        err=True,
    )


@main.command()
@_model_options
@click.option("-p", "--prompt", required=True)
@click.option("--layer", type=int, required=True)
@click.option("--head", type=int, required=True)
@click.option(
    "--position",
    type=int,
    default=-1,
    show_default=True,
    help="The token that asks; -1 is the last one.",
)
@click.option(
    "--plot",
    type=click.Path(),
    help="Draw the weights of all positions into this PNG; of all heads with --all-heads.",
)
@click.option("--all-heads", is_flag=True)
@_json_option
def attention(model, prompt, layer, head, position, plot, all_heads, as_json):
    """Show what one head looks at: relevance, weight and size of the weighted value, token by
    token.
    """
    steps = attention_steps(model(), prompt, layer=layer, head=head, position=position)
    if plot:
        draw_weights(
            plot,
            steps.all_weights if all_heads else steps.all_weights[head],
            steps.tokens,
            f"{prompt!r}, layer {layer}",
        )
    rows = report.attention_rows(steps)
    if as_json:
        _print_json(rows)
        return
    click.echo(f"{'token':<20} {'score':>9} {'weight':>8} {'|w v|':>8}")
    for row in rows:
        click.echo(
            f"{row['token']!r:<20} {row['score']:9.3f} {row['weight']:8.4f} {row['weighted_value']:8.4f}  "
            f"{'█' * round(40 * row['weight'])}"
        )


@main.command()
@click.argument("path", type=click.Path(), default="masks.png")
@click.option("-n", "--slots", type=click.IntRange(min=16), default=32, show_default=True)
def masks(path, slots):
    """Draw every mask rule into one picture."""
    draw_masks(path, n=slots)
    click.echo(path)


@main.command()
@_json_option
def doctor(as_json):
    """Show versions, BLAS and threads, CuPy and the GPU or why there is none."""
    facts = report.machine_facts()
    if as_json:
        _print_json(facts)
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            value = (
                ", ".join(
                    f"{key} {'-' if entry is None else entry}" for key, entry in value.items()
                )
                or "-"
            )
        click.echo(f"{name:<20} {value}")
    if "OPENBLAS_CORETYPE" in facts["environment"]:
        click.echo(
            "npllm: warning: OPENBLAS_CORETYPE fixes the kernels of OpenBLAS; unset it for full speed",
            err=True,
        )
