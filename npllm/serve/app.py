"""The application: which path does what."""

from __future__ import annotations  # starlette may be a stand-in while the reference is built

import asyncio
import json
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from npllm.continuous_batching.engine import Engine
from npllm.continuous_batching.metrics import Metrics
from npllm.errors import NpllmError
from npllm.progress import report
from npllm.serve.answers import Answers
from npllm.serve.embedding import Embedder, parse_embedding
from npllm.serve.errors import Refusal, as_refusal, body_of
from npllm.serve.live import Live
from npllm.serve.parsing import Ask, Limits, parse_chat, parse_completion, require_model
from npllm.serve.security import check_host, check_key, read_body

__all__ = ["Server", "make_app"]

Handler = Callable[[Request], Any]


@dataclass(frozen=True)
class Server:
    """What the paths need.

    Attributes
    ----------
    model : Model or Encoder
    names : tuple of str
        Of the model, for clients; the first is shown.
    worker : Engine or Embedder
        The thread that alone touches the model.
    limits : Limits
    metrics : Metrics
    max_body_bytes : int
    api_key : str or None
    """

    model: Any
    names: tuple[str, ...]
    worker: Any
    limits: Limits
    metrics: Metrics
    max_body_bytes: int = 2**22
    api_key: str | None = None
    started: float = 0.0

    async def chat(self, request: Request) -> Response:
        """Answer /v1/chat/completions."""
        return await self._generate(request, parse_chat)

    async def completions(self, request: Request) -> Response:
        """Answer /v1/completions."""
        return await self._generate(request, parse_completion)

    async def embeddings(self, request: Request) -> Response:
        """Answer /v1/embeddings."""
        body = await read_body(request, self.max_body_bytes)
        if not isinstance(self.worker, Embedder):
            raise _wrong_kind(
                f"{self.names[0]} is a language model and is no encoder: serve a "
                "folder of model_type bert for embeddings"
            )
        ask = await run_in_threadpool(parse_embedding, self.model, self.names, body, self.limits)
        answer = self.worker.answer(ask, self.names[0])
        return JSONResponse(await _unless_disconnected(request, answer))

    async def models(self, request: Request) -> Response:
        """List the model, or describe it by its name."""
        name = request.path_params.get("name")
        if name is not None:
            require_model(name, self.names)
        entry = {
            "id": self.names[0],
            "object": "model",
            "created": int(self.started),
            "owned_by": "npllm",
        }
        return JSONResponse({"object": "list", "data": [entry]} if name is None else entry)

    async def health(self, _: Request) -> Response:
        """Say that the server works."""
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, _: Request) -> Response:
        """Show counts for Prometheus."""
        text = self.metrics.text(self.worker.gauges())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _generate(self, request: Request, parse: Callable[..., Ask]) -> Response:
        body = await read_body(request, self.max_body_bytes)
        if not isinstance(self.worker, Engine):
            raise _wrong_kind(
                f"{self.names[0]} is an encoder and generates no text; it serves /v1/embeddings"
            )
        ask = await run_in_threadpool(parse, self.model, self.names, body, self.limits)
        live = Live(self.worker, Answers(self.model, self.names[0], ask))
        if ask.stream:
            return StreamingResponse(_stream(live), media_type="text/event-stream")
        try:
            return JSONResponse(await _unless_disconnected(request, live.whole()))
        finally:
            live.abort()


def make_app(server: Server) -> Starlette:
    """Make the ASGI application.

    Returns
    -------
    app : Starlette
        Starts and stops the server's worker with itself.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        server.worker.start()
        try:
            yield
        finally:
            await run_in_threadpool(server.worker.stop)

    routes = [
        Route("/v1/chat/completions", _guarded(server, server.chat), methods=["POST"]),
        Route("/v1/completions", _guarded(server, server.completions), methods=["POST"]),
        Route("/v1/embeddings", _guarded(server, server.embeddings), methods=["POST"]),
        Route("/v1/models", _guarded(server, server.models)),
        Route("/v1/models/{name:path}", _guarded(server, server.models)),
        Route("/health", server.health),
        Route("/metrics", _guarded(server, server.show_metrics)),
    ]
    handlers: Any = {HTTPException: _http_error}
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


def _guarded(server: Server, handler: Handler) -> Handler:
    """A path that checks who asks, counts, and reports every error in OpenAI's form."""

    async def guarded(request: Request) -> Response:
        start = time.monotonic()
        try:
            check_key(request.headers.get("authorization", ""), server.api_key)
            check_host(request.headers.get("host", ""), server.api_key)
            response = await handler(request)
        except ClientDisconnect:
            response = _error(Refusal("the client went away", code="disconnected", status=499))
        except Exception as error:
            if not isinstance(error, NpllmError):
                report("".join(traceback.format_exception(error)).strip())
            response = _error(as_refusal(error))
        seconds = time.monotonic() - start
        server.metrics.count_request(_path(request), response.status_code, seconds)
        return response

    return guarded


def _path(request: Request) -> str:
    """The path without the name of a model, which clients choose."""
    return "/v1/models" if request.path_params else request.url.path


def _error(error: Exception) -> Response:
    status, headers = getattr(error, "status", 400), getattr(error, "headers", None)
    return JSONResponse(body_of(error), status, headers)


def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: unknown paths and methods."""
    status = getattr(error, "status_code", 500)
    message = {
        404: f"there is no {request.url.path}; see /v1/models",
        405: f"{request.method} is not allowed for {request.url.path}",
    }.get(status, str(error))
    return _error(Refusal(message, code="not_found" if status == 404 else None, status=status))


def _wrong_kind(message: str) -> Refusal:
    return Refusal(message, "model", "wrong_kind_of_model")


async def _unless_disconnected(
    request: Request, coming: Coroutine[Any, Any, dict[str, Any]]
) -> dict[str, Any]:
    """Wait for an answer; give it up when the client goes away."""
    answer = asyncio.ensure_future(coming)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Refusal("the client went away", code="disconnected", status=499)
        return await answer
    finally:
        answer.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(live: Live) -> AsyncIterator[str]:
    """Write server-sent events; an error is the last one."""
    answers = live.answers
    try:
        for chunk in answers.opening():
            yield _data(chunk)
        async for choice, event in live.events():
            part = answers.piece(choice, event)
            if part is not None:
                yield _data(part)
        for chunk in answers.closing():
            yield _data(chunk)
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield _data(body_of(as_refusal(error)))
    finally:
        live.abort()


def _data(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
