"""From logits to a token: the filters in their order, and the draw."""

from typing import Any

import numpy as np

from npllm import ops
from npllm.arguments import to_python
from npllm.arrays import array_namespace, widen
from npllm.config.strict_json import quote
from npllm.decoding.generation_config import Sampling
from npllm.decoding.options import check_sampling
from npllm.errors import NpllmValueError
from npllm.finite_scores import check_scores

__all__ = [
    "FILTER_ORDERS",
    "choose",
    "filter_logits",
    "next_token_distribution",
    "uniforms",
]

Array = Any

# The order of the filters.  Engines agree on what each does, not on when.
FILTER_ORDERS = {
    "transformers": ("repetition_penalty", "temperature", "top_k", "top_p", "min_p"),
    "llama.cpp": ("repetition_penalty", "top_k", "top_p", "min_p", "temperature"),
}
NO_FILTER = {
    "repetition_penalty": 1,
    "temperature": 1,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
}  # the values that change nothing


def choose(
    logits: Array, sampling: Sampling, seen: Array | None = None, u: Array | None = None
) -> Array:
    """Choose the next token of each row.

    Parameters
    ----------
    logits : array [n_batch, n_vocab]
    sampling : Sampling
    seen : bool array [n_batch, n_vocab], optional
        Tokens of the prompt and of the answer so far, for the repetition penalty.
    u : array [n_batch], optional
        Uniform random numbers in [0, 1), for sampling.

    Returns
    -------
    token : integer array [n_batch]

    Notes
    -----
    Source: `GenerationMixin._sample` in Transformers, whose order of the filters it follows.
    """
    if not sampling.do_sample:
        return ops.greedy(
            filter_logits(logits, Sampling(repetition_penalty=sampling.repetition_penalty), seen)
        )
    return ops.sample(filter_logits(logits, sampling, seen), u)


def filter_logits(
    logits: Array, sampling: Sampling, seen: Array | None = None, order: str = "transformers"
) -> Array:
    """Apply the filters that are switched on, one after another.

        transformers:  repetition_penalty, temperature, top_k, top_p, min_p
        llama.cpp:     repetition_penalty, top_k, top_p, min_p, temperature

    Parameters
    ----------
    logits : array [..., n_vocab]
    sampling : Sampling
    seen : bool array [..., n_vocab], optional
        Tokens of the prompt and of the answer so far; needed for the repetition penalty.
    order : str
        "transformers" or "llama.cpp".

    Returns
    -------
    logits : array [..., n_vocab]
        -inf where a token is excluded.

    Raises
    ------
    NpllmValueError
        For another order, for a repetition penalty without `seen`, and where a filter leaves a row
        on the host that is no distribution: names the filter.

    Notes
    -----
    With the temperature last, top_p and min_p see the model's own probabilities, so that a high
    temperature lets no further tokens in.  The orders agree at temperature 1, and where only top_k
    is used.  Two things of llama.cpp are not followed: it cuts ties with the k-th largest logit
    arbitrarily, and its penalty looks at the last 64 tokens only (give `seen` accordingly).

    Source: `GenerationMixin._get_logits_processor` in Transformers;
    `common_params_sampling.samplers` in llama.cpp's common/common.h: penalties, dry, top_n_sigma,
    top_k, typ_p, top_p, min_p, xtc, temperature, of which the default leaves those that are not
    named here switched off.
    """
    if order not in FILTER_ORDERS:
        raise NpllmValueError(
            f"order must be one of {', '.join(FILTER_ORDERS)}, got {quote(order)}"
        )
    check_scores(logits, "logits")
    for name in FILTER_ORDERS[order]:
        value = getattr(sampling, name)
        if value is None or value == NO_FILTER[name]:
            continue
        if name == "repetition_penalty" and seen is None:
            raise NpllmValueError(
                f"repetition_penalty = {value} needs `seen`, the tokens so far as a bool array of "
                f"the shape {list(logits.shape)} of the logits; got None"
            )
        with np.errstate(over="ignore", invalid="ignore"):  # the check says what became of it
            logits = getattr(ops, name)(
                logits, *([seen] if name == "repetition_penalty" else []), value
            )
        check_scores(logits, f"logits after {name} = {value}", f"give another {name}")
    return logits


def next_token_distribution(
    logits: Array,
    *,
    order: str = "transformers",
    seen: Array | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
) -> Array:
    """Give the exact distribution that the next token is drawn from, after all filters.

        p = softmax(filter_logits(logits))

    Parameters
    ----------
    logits : array [..., n_vocab]
    order : str
        "transformers" or "llama.cpp": the order of the filters, see `filter_logits`.
    seen : bool array [..., n_vocab], optional
        Tokens so far; needed for the repetition penalty.
    temperature, top_k, top_p, min_p, repetition_penalty : number, optional
        None: off.  temperature=0 is greedy.

    Returns
    -------
    p : array [..., n_vocab]
        float64; every row sums to 1.  Greedy: 1 at the token that is chosen.

    Raises
    ------
    NpllmValueError
        For values out of range, another order, for a repetition penalty without `seen`, and for
        logits of which a row is no distribution (NaN, +inf, nothing but -inf), before the filters
        or after one.

    Notes
    -----
    It is the distribution that `ops.sample` inverts: token i is drawn for a part p[i] of all u.

    Source: `GenerationMixin._sample` in Transformers; `llama_sampler_dist` in llama.cpp.
    """
    xp = array_namespace(logits)
    values = map(to_python, (temperature, top_k, top_p, min_p, repetition_penalty))
    sampling = check_sampling(Sampling(True, *values))
    check_scores(logits, "logits", wait=True)
    if sampling.temperature != 0:
        filtered = check_scores(
            filter_logits(logits, sampling, seen, order), "logits after the filters", wait=True
        )
        return ops.softmax(widen(filtered, xp.float64))
    greedy = Sampling(repetition_penalty=sampling.repetition_penalty)
    penalised = filter_logits(logits, greedy, seen, order)
    chosen = ops.greedy(check_scores(penalised, "logits after the filters", wait=True))
    return xp.astype(xp.arange(logits.shape[-1]) == chosen[..., None], xp.float64)


def uniforms(seed: int, n_batch: int, step: int) -> Array:
    """Draw one uniform number in [0, 1) for each sequence: a function of (seed, sequence, step) and
    of nothing else.

    Notes
    -----
    Source: "Parallel Random Numbers: As Easy as 1, 2, 3" (Salmon et al. 2011), Philox 4x64; a
    counter-based generator replays the same numbers for any batch and backend.
    """
    keys = [
        np.array([seed, sequence], dtype=np.uint64) for sequence in range(n_batch)
    ]  # a list would go through float64
    return np.array(
        [
            np.random.Generator(np.random.Philox(key=key, counter=[0, step, 0, 0])).random()
            for key in keys
        ]
    )
