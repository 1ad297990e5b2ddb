"""The logit lens, and a summary of attention, from one trace."""

from typing import Any, NamedTuple

import numpy as np

from npllm import ops
from npllm.arguments import check_integer
from npllm.arrays import to_numpy
from npllm.errors import NpllmValueError
from npllm.finite_scores import FROM_MODEL, check_finite
from npllm.tracing.record import trace
from npllm.tracing.trace import Trace

__all__ = ["HeadSummary", "LensRow", "lens", "lens_facts", "summarize_attention"]

Array = Any


class LensRow(NamedTuple):
    """What the residual stream behind a layer would predict."""

    name: str  # of the value: model.embed_tokens, model.layers.0, ...
    top: list[tuple[int, float]]  # ids and probabilities, the most likely first
    rank: int  # of the token that the model predicts, from 1
    probability: float  # of that token
    kl: float  # of the model's distribution from this one, in nats


class HeadSummary(NamedTuple):
    """Where a head looks, as means over the queries."""

    layer: int
    head: int
    entropy: float  # in nats; 0: one key, log(n): n keys alike
    first: float  # the weight of the first token
    distance: float  # tokens between query and key


def lens(model: Any, x: Trace, position: int = -1, n_top: int = 3) -> list[LensRow]:
    """Decode the residual stream behind each layer as if it were the last.

        p_l = softmax(lm_head(rms_norm(x_l))),   l = embedding, layer 0, ..., the last layer
        kl_l = sum_i p[i] * log(p[i] / p_l[i]),   p = p of the last layer

    Parameters
    ----------
    model : Model
        That ran.
    x : Trace
        Of one prompt, with `model.embed_tokens` and the outputs of the layers, uncut.
    position : int
        Of the sequence; negative numbers count from the end.
    n_top : int

    Returns
    -------
    rows : list of LensRow
        The embedding, then each layer.  The rank is 1 plus the number of tokens that score higher
        than the model's own.

    Raises
    ------
    NpllmValueError
        When the position is out of range, when the trace has several prompts or lacks positions,
        and when logits are not finite.
    NpllmKeyError
        When the trace lacks a layer.

    Notes
    -----
    The norm and the output matrix are those of the model, computed by its operations; the
    softmax in float64.

    Source: "interpreting GPT: the logit lens" (nostalgebraist 2020).
    """
    names = ["model.embed_tokens", *_outputs(model)]
    streams = [_of_one_prompt(x, name) for name in names]
    n_seq = streams[0].shape[0]
    check_integer("position", position, -n_seq, n_seq - 1)
    log_p = [_log_probabilities(model, stream[position]) for stream in streams]
    return [_row(name, one, log_p[-1], n_top) for name, one in zip(names, log_p, strict=True)]


def summarize_attention(x: Trace) -> list[HeadSummary]:
    """Summarize the attention weights of each head, over all queries of a trace.

        entropy  = mean_n -sum_j w[n, j] * log w[n, j]
        first    = mean_n w[n, 0]
        distance = mean_n sum_j w[n, j] * (n - j)

    Parameters
    ----------
    x : Trace
        Of one prompt, with `self_attn.weights` of the layers that are wanted.

    Returns
    -------
    heads : list of HeadSummary
        Of each head of each layer; float64 means.
    """
    rows = []
    for name in x:
        if name.endswith(".self_attn.weights"):
            layer = int(name.split(".")[2])
            weights = np.asarray(_of_one_prompt(x, name), np.float64)  # [n_head, n_seq, n_ctx]
            rows += [HeadSummary(layer, h, *_means(w)) for h, w in enumerate(weights)]
    return rows


def lens_facts(
    model: Any, prompt: Any, *, position: int = -1, n_top: int = 3, dtype: str | None = None
) -> dict[str, Any]:
    """Trace a prompt, and report the lens and the attention: what `npllm lens` prints.

    Parameters
    ----------
    model : Model
    prompt : str, list of messages or integers [1, n_prompt]
    position, n_top
        As in `lens`.
    dtype : str, optional
        As in `npllm.trace`.

    Returns
    -------
    facts : dict
        "token": the one at that position; "prediction": the model's most likely next token;
        "layers": the rows of `lens`, with texts; "attention": the rows of `summarize_attention`.

    Raises
    ------
    NpllmValueError
        For several prompts, and as `lens`.
    """
    layers = _outputs(model)
    names = ["model.embed_tokens", *layers, *(f"{name}.self_attn.weights" for name in layers)]
    found = trace(model, prompt, names=names, dtype=dtype)
    rows = lens(model, found, position, n_top)
    (ids,) = found.index["steps"][0]["input_ids"]
    return {
        "tokens": [_token(model, i) for i in ids],
        "token": _token(model, ids[position]),
        "prediction": _token(model, rows[-1].top[0][0]),
        "layers": [_facts(model, row) for row in rows],
        "attention": [head._asdict() for head in summarize_attention(found)],
    }


def _outputs(model: Any) -> list[str]:
    """Names of the outputs of the layers."""
    return [f"model.layers.{number}" for number in range(model.config.num_hidden_layers)]


def _of_one_prompt(x: Trace, name: str) -> Array:
    """A value of a trace without its axis n_batch."""
    value = x[name]
    if x.index["values"][name]["status"] != "whole" or len(value) != 1:
        raise NpllmValueError(
            f"the lens takes a trace of one prompt with all positions, got {name} "
            f"{list(value.shape)}, {x.index['values'][name]['status']}"
        )
    return value[0]


def _log_probabilities(model: Any, stream: Array) -> Array:
    """Compute log softmax(lm_head(rms_norm(x))) of one position: float64 [n_vocab]."""
    x, params = model.to_backend(np.array(stream[None])), model.params
    logits = model.lm_head(model.ops.rms_norm(x, params.norm, model.config.rms_norm_eps))
    finite = check_finite(to_numpy(logits)[0], "the lens's logits", FROM_MODEL)
    return ops.log_softmax(np.asarray(finite, np.float64))


def _row(name: str, log_p: Array, final: Array, n_top: int) -> LensRow:
    """Compare the distribution behind a layer with the final one."""
    best = np.argsort(-log_p, kind="stable")[:n_top]
    top = [(int(i), float(np.exp(log_p[i]))) for i in best]
    own = int(final.argmax())
    rank = 1 + int((log_p > log_p[own]).sum())
    kl = float(np.sum(np.exp(final) * (final - log_p)))
    return LensRow(name, top, rank, float(np.exp(log_p[own])), max(kl, 0.0))


def _means(weights: Array) -> tuple[float, float, float]:
    """Entropy, weight of the first key, and distance: means over the queries."""
    n_seq, n_ctx = weights.shape
    logs = np.log(np.where(weights > 0, weights, 1))
    away = np.arange(n_ctx - n_seq, n_ctx)[:, None] - np.arange(n_ctx)
    per_query = -(weights * logs).sum(-1), weights[:, 0], (weights * away).sum(-1)
    entropy, first, distance = (float(x.mean()) for x in per_query)
    return entropy, first, distance


def _token(model: Any, token: int) -> dict[str, Any]:
    """An id, and its text where there is a tokenizer."""
    text = model.tokenizer.token_text(token) if model.tokenizer else None
    return {"id": token, "text": text}


def _facts(model: Any, row: LensRow) -> dict[str, Any]:
    top = [_token(model, token) | {"probability": p} for token, p in row.top]
    return row._asdict() | {"top": top}
