"""What `npllm cost` reports, as plain data."""

from typing import Any

from npllm.analysis.cost.cache_bytes import kv_cache_bytes, kv_table
from npllm.analysis.cost.operations import Cost
from npllm.analysis.cost.parameters import parameter_counts
from npllm.analysis.cost.passes import (
    decode_cost,
    forward_cost,
    prefill_cost,
    total,
    uncached_flops,
)
from npllm.analysis.cost.weight_bytes import (
    WeightBytes,
    activation_bytes,
    total_bytes,
    weight_bytes,
)
from npllm.arguments import check_integer
from npllm.config.config import Config

__all__ = ["cost_facts"]


def cost_facts(
    config: Config,
    n_context: int,
    *,
    n_batch: int = 1,
    dtype: str | None = None,
    weights: WeightBytes | None = None,
) -> dict[str, Any]:
    """Gather everything that `npllm cost` reports.

    Parameters
    ----------
    config : Config
    n_context : int
        Tokens of the prompt, and tokens in the cache at the decode step.
    n_batch : int
    dtype, weights
        As in `npllm.analysis.cost.forward_cost`.

    Returns
    -------
    facts : dict

    Raises
    ------
    NpllmValueError
        When the context and one token more exceed the context length, or the model has no LM head.
    """
    check_integer(
        "context",
        n_context,
        1,
        config.context_length - 1,
        f" (one new token has to fit the context length, max_position_embeddings = "
        f"{config.context_length}, as well)",
    )
    sizes = {"n_batch": n_batch, "itemsize": activation_bytes(config, dtype)}
    how: Any = {"n_batch": n_batch, "dtype": dtype, "weights": weights}
    return {
        "context": n_context,
        "batch": n_batch,
        "dtype": dtype or (config.dtype if weights is None else "the types of the file"),
        "window": config.sliding_window,
        **_weight_facts(config, dtype, weights),
        "kv_cache_bytes": kv_cache_bytes(config, n_context, window=config.sliding_window, **sizes),
        "kv_cache": kv_table(config, n_context, **sizes),
        **_pass_facts(config, n_context, how),
        "whole_run": _run_facts(config, n_context, n_batch),
    }


def _weight_facts(config: Config, dtype: str | None, weights: WeightBytes | None) -> dict[str, Any]:
    parameters = parameter_counts(config)
    held = weight_bytes(config, dtype) if weights is None else weights
    return {
        "parameters": sum(parameters.values()),
        "parameters_by_part": parameters,
        "weight_bytes": total_bytes(held, config),
    }


def _pass_facts(config: Config, n_context: int, how: Any) -> dict[str, Any]:
    def facts(costs: dict[str, Cost]) -> dict[str, Any]:
        by_op = {name: _cost(cost) for name, cost in costs.items()}
        return {**_cost(total(costs)), "by_op": by_op}

    uncached = forward_cost(config, n_context + 1, **how)
    return {
        "prefill": facts(prefill_cost(config, n_context, **how)),
        "decode_step": facts(decode_cost(config, n_context, **how)),
        "decode_step_uncached": facts(uncached),
    }


def _cost(cost: Cost) -> dict[str, Any]:
    return {"flops": cost.flops, "bytes": cost.bytes, "intensity": cost.intensity}


def _run_facts(config: Config, n_context: int, n_batch: int) -> dict[str, Any]:
    cached, uncached = uncached_flops(config, n_context, n_batch=n_batch)
    return {
        "tokens": n_context,
        "cached_flops": cached,
        "uncached_flops": uncached,
        "ratio": uncached / cached,
    }
