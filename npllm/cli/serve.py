"""The command `npllm serve`."""

from collections.abc import Callable
from typing import Any

import click

from npllm.checkpoints.extras import import_extra
from npllm.cli.options import any_model_options
from npllm.progress import report

__all__ = ["COMMANDS"]


@click.command()
@any_model_options
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Listen at this address; any but a loopback address needs an API key.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=8000,
    show_default=True,
    help="Listen at this TCP port.",
)
@click.option(
    "--api-key",
    envvar="NPLLM_API_KEY",
    metavar="KEY",
    help="Answer clients that send this key. [NPLLM_API_KEY, else none]",
)
@click.option(
    "--served-model-name",
    metavar="NAME",
    help="Answer to this name of a model. [the folder's name]",
)
@click.option(
    "--max-batch",
    type=click.IntRange(1, 16),
    default=16,
    show_default=True,
    help="Decode so many sequences in a step.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(min=0),
    default=256,
    show_default=True,
    help="Let so many sequences wait; more are refused with status 429.",
)
@click.option(
    "--max-prompt-tokens",
    type=click.IntRange(min=1),
    help="Refuse prompts of more tokens. [the context length]",
)
@click.option(
    "--max-body-bytes",
    type=click.IntRange(min=1),
    default=2**22,
    show_default=True,
    help="Refuse requests with a larger body.",
)
@click.option(
    "--cache-bytes",
    type=click.IntRange(min=0),
    default=2**30,
    show_default=True,
    help="Keep so many bytes of keys and values of earlier prompts.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600,
    show_default=True,
    help="End an answer after so many seconds, waiting included.",
)
@click.option(
    "--grace",
    type=click.IntRange(min=0),
    default=30,
    show_default=True,
    help="Let running requests take so many seconds after SIGTERM or Ctrl-C.",
)
def serve(
    model: Callable[[], Any],
    host: str,
    port: int,
    served_model_name: str | None,
    grace: int,
    **options: Any,
) -> None:
    """Serve a model under OpenAI's interface: /v1/chat/completions, /v1/completions,
    /v1/embeddings (an encoder), /v1/models, /health, /metrics.
    """
    import_extra("starlette", "npllm serve", "serve")
    import_extra("uvicorn", "npllm serve", "serve")
    from npllm.serve.run import listen, make_server, run_server
    from npllm.serve.security import require_key

    require_key(host, options["api_key"])
    with listen(host, port) as listener:
        loaded, given = model(), click.get_current_context().params["path"]
        names = [served_model_name] if served_model_name else [loaded.folder.name, given]
        server = make_server(loaded, names=tuple(filter(None, names)), **options)
        shown = f"[{host}]" if ":" in host else host
        report(f"serving {server.names[0]} at http://{shown}:{port}/v1; Ctrl-C ends it")
        run_server(server, host, port, grace=grace, listener=listener)


COMMANDS = (serve,)
