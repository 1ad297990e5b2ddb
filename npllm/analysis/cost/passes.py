"""The cost of a forward pass, of a prefill, of a decode step and of a whole run."""

from typing import Any

from npllm.analysis.cost.operations import FORMULAS, Cost, Sizes, pair_flops, visible_pairs
from npllm.analysis.cost.parameters import require_lm
from npllm.analysis.cost.weight_bytes import WeightBytes, activation_bytes, weight_bytes
from npllm.config.config import Config
from npllm.errors import NpllmValueError

__all__ = ["decode_cost", "forward_cost", "prefill_cost", "total", "uncached_flops"]

Costs = dict[str, Cost]


def forward_cost(
    config: Config,
    n_seq: int,
    *,
    n_past: int = 0,
    n_batch: int = 1,
    n_logits: int = 1,
    dtype: str | None = None,
    weights: WeightBytes | None = None,
) -> Costs:
    """Compute the cost of one pass of n_seq new tokens through the model, by operation.

        flops = T * per_token + rope_tables + n_batch * n_logits * 2 * d_model * n_vocab
              + n_batch * visible_pairs(n_seq, n_past, window) * n_layer * n_head * (4 * d_head + 6)
        T = n_batch * n_seq
        per_token = n_layer * (2 * parameters of a layer's linear maps
                               + 2 rms_norm + apply_rope + swiglu) + rms_norm

    Parameters
    ----------
    config : Config
    n_seq : int
        New tokens of each sequence.
    n_past : int
        Tokens in the KV cache.
    n_batch : int
    n_logits : int
        Positions of each sequence whose logits are computed: 1 to generate, n_seq to score.
    dtype : str, optional
        Of the weights; default: as the configuration says.  Activations are float32, float64 for
        "float64".
    weights : dict of str to int, optional
        Bytes of the weights, where they are not of one type: `weights.gguf_weight_bytes`.

    Returns
    -------
    costs : dict of str to Cost
        Name of the operation -> cost; `total` adds them up.

    Raises
    ------
    NpllmValueError
        When a number is below its minimum, or the tokens do not fit the context.

    Notes
    -----
    Without padding; no operation is fused.  With a cache and a window, attention gets min(n_past,
    window - 1) + n_seq keys.

    Source: "Scaling Laws for Neural Language Models" (Kaplan et al. 2020), table 1, with the terms
    that it leaves out.
    """
    _check(config, n_seq, n_past, n_batch, n_logits)
    held = weight_bytes(config, dtype) if weights is None else weights
    wide = activation_bytes(config, dtype)
    sizes = Sizes(config, n_seq, n_past, n_batch, n_logits, held, wide)
    return {name: formula(sizes) for name, formula in FORMULAS.items()}


def prefill_cost(
    config: Config,
    n_prompt: int,
    *,
    n_batch: int = 1,
    chunk: int = 512,
    dtype: str | None = None,
    weights: WeightBytes | None = None,
) -> Costs:
    """Compute the cost of a prefill in chunks, up to the logits of the first new token.

        cost = sum over the chunks of forward_cost(n, n_past = tokens before the chunk),
               with logits for the last position only

    Parameters
    ----------
    config : Config
    n_prompt, n_batch : int
    chunk : int
        Tokens of one pass through the layers; each pass reads the weights once.
    dtype, weights
        As in `forward_cost`.

    Returns
    -------
    costs : dict of str to Cost
    """
    how: Any = {"n_batch": n_batch, "dtype": dtype, "weights": weights}
    parts = []
    for start in range(0, n_prompt, chunk):
        n = min(chunk, n_prompt - start)
        n_logits = int(start + n == n_prompt)
        parts.append(forward_cost(config, n, n_past=start, n_logits=n_logits, **how))
    return {name: sum((part[name] for part in parts), Cost(0, 0)) for name in parts[0]}


def decode_cost(
    config: Config,
    n_context: int,
    *,
    n_batch: int = 1,
    dtype: str | None = None,
    weights: WeightBytes | None = None,
) -> Costs:
    """Compute the cost of a decode step with n_context cached tokens: `forward_cost` of one token
    for each sequence.
    """
    how: Any = {"n_batch": n_batch, "dtype": dtype, "weights": weights}
    return forward_cost(config, 1, n_past=n_context, **how)


def total(costs: Costs) -> Cost:
    """Add up the costs of all operations."""
    return sum(costs.values(), Cost(0, 0))


def uncached_flops(config: Config, n: int, *, n_batch: int = 1) -> tuple[int, int]:
    """Count the operations to produce n tokens one after another, with and without the KV cache.

        cached   = sum_(i = 1 ... n) flops(one token after i - 1 cached)    O(n**2)
        uncached = sum_(i = 1 ... n) flops(all i tokens again)              O(n**3)

    Parameters
    ----------
    config : Config
    n, n_batch : int

    Returns
    -------
    cached, uncached : int

    Notes
    -----
    In closed form, since flops are linear in tokens t, visible pairs p and logits: the cached run
    has t = n and p = visible_pairs(n); the other has t = n (n + 1) / 2 and the sum of
    visible_pairs(i), i = 1 ... n.
    """
    _check(config, n, 0, n_batch, 1)
    token, pair, logit = _rates(config, n_batch)
    pairs = _sum_of_visible_pairs(n, config.sliding_window)
    cached_pairs = visible_pairs(n, 0, config.sliding_window)
    return (
        n * token + cached_pairs * pair + n * logit,
        n * (n + 1) // 2 * token + pairs * pair + n * logit,
    )


def _sum_of_visible_pairs(n: int, window: int | None) -> int:
    """Sum of visible_pairs(i, 0, window) over i = 1 ... n."""
    w = n if window is None else min(window, n)
    tail = n - w  # lengths beyond the window: each adds w pairs to those of the length before it
    return w * (w + 1) * (w + 2) // 6 + tail * visible_pairs(w) + w * (tail * (tail + 1) // 2)


def _rates(config: Config, n_batch: int) -> tuple[int, int, int]:
    """Flops for each token, visible pair and row of logits of a sequence, times n_batch.

    `forward_cost` is linear in these three.
    """
    per_token = total(forward_cost(config, 1, n_batch=n_batch, n_logits=0)).flops
    pair = n_batch * pair_flops(config)
    return per_token - pair, pair, n_batch * 2 * config.hidden_size * config.vocab_size


def _check(config: Config, n_seq: int, n_past: int, n_batch: int, n_logits: int) -> None:
    require_lm(config)
    if n_seq < 1 or n_batch < 1 or n_past < 0 or not 0 <= n_logits <= n_seq:
        raise NpllmValueError(
            "n_seq and n_batch must be at least 1, n_past at least 0 and n_logits in 0 ... n_seq, "
            f"got n_seq = {n_seq}, n_batch = {n_batch}, n_past = {n_past}, n_logits = {n_logits}"
        )
    if n_past + n_seq > config.context_length:
        raise NpllmValueError(
            f"{n_past} cached + {n_seq} new tokens do not fit: the context length "
            f"(max_position_embeddings) is {config.context_length}"
        )
