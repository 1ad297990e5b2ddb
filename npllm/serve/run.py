"""From a model and settings to a server that runs."""

from __future__ import annotations  # starlette and uvicorn may be stand-ins

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from npllm.arguments import check_integer
from npllm.continuous_batching.engine import MAX_BATCH, Engine
from npllm.continuous_batching.metrics import Metrics
from npllm.encoder import Encoder
from npllm.errors import NpllmOSError
from npllm.serve.app import Server, make_app
from npllm.serve.embedding import Embedder
from npllm.serve.parsing import Limits
from npllm.serve.security import require_key, require_sendable

__all__ = ["listen", "make_server", "run_server", "serving"]


def make_server(
    model: Any,
    *,
    names: tuple[str, ...] = (),
    max_batch: int = MAX_BATCH,
    max_queue: int = 256,
    max_prompt_tokens: int | None = None,
    max_body_bytes: int = 2**22,
    cache_bytes: int = 2**30,
    timeout: float = 600,
    api_key: str | None = None,
) -> Server:
    """Put a model behind the HTTP interface; `make_app` makes an ASGI application of it.

    Parameters
    ----------
    model : Model or Encoder
    names : tuple of str
        By which clients name the model.  Default: that of its folder.
    max_batch : int
        Sequences of a decoding step, 1 ... 16: the bits of a row do not depend on the others.
    max_queue : int
        Sequences that may wait.
    max_prompt_tokens : int, optional
        Default: the context length.
    max_body_bytes : int
    cache_bytes : int
        Keys and values kept of earlier prompts.
    timeout : float
        Seconds for an answer.
    api_key : str, optional

    Returns
    -------
    server : Server

    Raises
    ------
    NpllmValueError
        For a number out of range, and a key that no client can send.
    """
    max_batch = check_integer("max_batch", max_batch, 1, MAX_BATCH)
    max_queue = check_integer("max_queue", max_queue, 0, 10**6)
    is_encoder, metrics = isinstance(model, Encoder), Metrics()
    length = model.max_length if is_encoder else model.config.context_length
    most = check_integer("max_prompt_tokens", max_prompt_tokens or length, 1, length)
    worker: Any = (
        Embedder(model, max_queue, timeout)
        if is_encoder
        else Engine(
            model,
            max_batch=max_batch,
            max_queue=max_queue,
            cache_bytes=check_integer("cache_bytes", cache_bytes, 0, 2**62),
            timeout=timeout,
            metrics=metrics,
        )
    )
    folder = Path(model.folder).name if model.folder else "npllm"
    limits = Limits(most, max_batch + max_queue)
    shown = names or (folder,)
    key = require_sendable(api_key)
    return Server(model, shown, worker, limits, metrics, max_body_bytes, key, time.time())


def listen(host: str, port: int) -> socket.socket:
    """Take an address before a model is loaded.

    Raises
    ------
    NpllmOSError
        When it is in use, or is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small answers at once (TCP_NODELAY) where a socket names its protocol alone:
    # without it each answer waits 40 ms for the client's acknowledgement of its headers.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise NpllmOSError(
            f"cannot listen at {host}:{port} ({error.strerror}): give another --port or --host"
        ) from None
    return listener


def run_server(
    server: Server,
    host: str,
    port: int,
    *,
    grace: int = 30,
    listener: socket.socket | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; what is at work then may take `grace` seconds more.

    Raises
    ------
    NpllmValueError
        When the address can be reached from other machines and there is no API key.
    NpllmOSError
        As `listen`.
    """
    require_key(host, server.api_key)
    with contextlib.suppress(KeyboardInterrupt):  # raised again when all is finished
        listener = listen(host, port) if listener is None else listener
        uvicorn.Server(_settings(server, grace)).run([listener])


@contextlib.contextmanager
def serving(server: Server, *, grace: int = 5) -> Iterator[str]:
    """Serve on a free port of 127.0.0.1 while the body runs: for notebooks and tests.

    Yields
    ------
    url : str
        What OpenAI's client takes as base_url: "http://127.0.0.1:PORT/v1".
    """
    with listen("127.0.0.1", 0) as listener:
        runner = uvicorn.Server(_settings(server, grace))
        thread = threading.Thread(target=runner.run, args=([listener],), name="npllm serve")
        thread.start()
        try:
            while not runner.started and thread.is_alive():
                time.sleep(0.005)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            runner.should_exit = True
            thread.join()


def _settings(server: Server, grace: int, **address: Any) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(server),
        **address,
        log_level="warning",
        timeout_graceful_shutdown=grace,
        server_header=False,
        ws="none",
    )
