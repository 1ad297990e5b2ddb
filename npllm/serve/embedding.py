"""/v1/embeddings: texts to vectors, on a thread that alone touches the encoder."""

import asyncio
import base64
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from npllm.config.strict_json import quote
from npllm.continuous_batching.errors import EndedError, ExpiredError, QueueFullError
from npllm.errors import NpllmError
from npllm.serve.errors import Refusal
from npllm.serve.fields import EMBEDDING, checked_fields
from npllm.serve.parsing import Limits, require_model, texts_or_ids

__all__ = ["EmbeddingAsk", "Embedder", "parse_embedding"]

Array = Any
N_TEXTS = 16  # that are embedded at a time, before the next look at who still waits


@dataclass(frozen=True)
class EmbeddingAsk:
    """A request for vectors."""

    rows: list[list[int]]  # token ids
    is_base64: bool


def parse_embedding(
    encoder: Any, names: tuple[str, ...], body: Mapping[str, Any], limits: Limits
) -> EmbeddingAsk:
    """Read the body of /v1/embeddings.

    Raises
    ------
    Refusal
    """
    fields = checked_fields(body, EMBEDDING)
    require_model(fields.get("model"), names)
    if "input" not in fields:
        raise Refusal("input is missing", "input", "missing_required_parameter")
    inputs = texts_or_ids(fields["input"], "input")
    if len(inputs) > 2048:
        raise Refusal(f"input holds {len(inputs)} texts, more than 2048", "input")
    rows = [_row(encoder, one, limits.max_prompt_tokens) for one in inputs]
    wanted, width = fields.get("dimensions"), encoder.n_out
    if wanted not in (None, width):
        raise Refusal(
            f"dimensions must be {width}, the width of this model's vectors, got {wanted}",
            "dimensions",
            "invalid_value",
        )
    return EmbeddingAsk(rows, fields.get("encoding_format") == "base64")


def _row(encoder: Any, one: Any, most: int) -> list[int]:
    """The token ids of an input; raise where it would be cut."""
    n_vocab = encoder.config.vocab_size
    if isinstance(one, list):
        if max(one) >= n_vocab:
            raise Refusal(
                f"input must hold ids below vocab_size = {n_vocab}, got {quote(max(one))}", "input"
            )
        ids = one
    else:
        try:
            ids = encoder.encode(one)
        except NpllmError as error:
            raise Refusal(str(error), "input", "context_length_exceeded") from None
    if len(ids) > most:
        raise Refusal(
            f"an input has {len(ids)} tokens, but this model reads at most {most}",
            "input",
            "context_length_exceeded",
        )
    return ids


class Embedder:
    """A thread that embeds one request at a time, and a queue of limited length.

    Parameters
    ----------
    encoder : Encoder
    max_queue : int
        Requests that may wait.
    timeout : float
        Seconds for an answer.
    """

    def __init__(self, encoder: Any, max_queue: int = 256, timeout: float = 600):
        self._encoder, self._max_queue, self._timeout = encoder, max_queue, timeout
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="npllm embedder")
        self._n_waiting, self._is_stopping = 0, False
        self._counting = threading.Lock()

    def start(self) -> None:
        """Do nothing: the thread starts with the first request."""

    def stop(self) -> None:
        """Refuse what waits, and end the thread."""
        self._is_stopping = True
        self._executor.shutdown(cancel_futures=True)

    def gauges(self) -> dict[str, float]:
        """Count the running and the waiting requests."""
        n = self._n_waiting
        return {"npllm_running": min(n, 1), "npllm_waiting": max(n - 1, 0)}

    async def answer(self, ask: EmbeddingAsk, name: str) -> dict[str, Any]:
        """Embed the texts of a request.

        Raises
        ------
        QueueFullError, ExpiredError, EndedError
        """
        if self._is_stopping:
            raise EndedError()
        if self._n_waiting > self._max_queue:
            raise QueueFullError(self._n_waiting, 1)
        with self._counting:
            self._n_waiting += 1
        given_up = threading.Event()
        call = self._executor.submit(self._embed, ask.rows, given_up)
        call.add_done_callback(self._count_ended)
        try:
            vectors = await asyncio.wait_for(asyncio.wrap_future(call), self._timeout)
        except TimeoutError:
            raise ExpiredError(self._timeout) from None
        finally:
            given_up.set()
        return _written(vectors, ask, name)

    def _embed(self, rows: list[list[int]], given_up: threading.Event) -> Array:
        """Embed a few texts at a time, until no client waits for them."""
        parts = []
        for start in range(0, len(rows), N_TEXTS):
            if given_up.is_set():
                raise EndedError()
            parts.append(self._encoder.embed_ids(rows[start : start + N_TEXTS]))
        return np.concatenate(parts)

    def _count_ended(self, _: Any) -> None:
        with self._counting:
            self._n_waiting -= 1


def _written(vectors: Array, ask: EmbeddingAsk, name: str) -> dict[str, Any]:
    """The answer in OpenAI's form."""
    n = sum(map(len, ask.rows))
    data = [
        {"object": "embedding", "index": i, "embedding": _form(vector, ask.is_base64)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": n, "total_tokens": n}
    return {"object": "list", "data": data, "model": name, "usage": usage}


def _form(vector: Array, is_base64: bool) -> Any:
    narrow = vector.astype("<f4")
    return base64.b64encode(narrow.tobytes()).decode() if is_base64 else narrow.tolist()
