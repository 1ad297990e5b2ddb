"""What `npllm cost` reports, as plain data."""

from typing import Any

from npllm.analysis.cost.kv_cache import kv_cache_bytes, kv_table
from npllm.analysis.cost.operations import Cost
from npllm.analysis.cost.parameters import itemsizes, parameter_counts
from npllm.analysis.cost.passes import (
    decode_cost,
    forward_cost,
    prefill_cost,
    total,
    uncached_flops,
)
from npllm.config.config import Config

__all__ = ["cost_facts"]


def cost_facts(
    config: Config, n_context: int, *, n_batch: int = 1, dtype: str | None = None
) -> dict[str, Any]:
    """Gather everything that `npllm cost` reports.

    Parameters
    ----------
    config : Config
    n_context : int
        Tokens of the prompt, and tokens in the cache at the decode step.
    n_batch : int
    dtype : str, optional

    Returns
    -------
    facts : dict

    Raises
    ------
    NpllmValueError
        When the context and one token more exceed the context length, or the model has no LM head.
    """
    sizes = {"n_batch": n_batch, "itemsize": itemsizes(config, dtype)[1]}
    return {
        "context": n_context,
        "batch": n_batch,
        "dtype": dtype or config.dtype,
        "window": config.sliding_window,
        **_weight_facts(config, dtype),
        "kv_cache_bytes": kv_cache_bytes(config, n_context, window=config.sliding_window, **sizes),
        "kv_cache": kv_table(config, n_context, **sizes),
        **_pass_facts(config, n_context, n_batch, dtype),
        "whole_run": _run_facts(config, n_context, n_batch),
    }


def _weight_facts(config: Config, dtype: str | None) -> dict[str, Any]:
    parameters = parameter_counts(config)
    n = sum(parameters.values())
    return {
        "parameters": n,
        "parameters_by_part": parameters,
        "weight_bytes": n * itemsizes(config, dtype)[0],
    }


def _pass_facts(config: Config, n_context: int, n_batch: int, dtype: str | None) -> dict[str, Any]:
    def facts(costs: dict[str, Cost]) -> dict[str, Any]:
        by_op = {name: _cost(cost) for name, cost in costs.items()}
        return {**_cost(total(costs)), "by_op": by_op}

    uncached = forward_cost(config, n_context + 1, n_batch=n_batch, dtype=dtype)
    return {
        "prefill": facts(prefill_cost(config, n_context, n_batch=n_batch, dtype=dtype)),
        "decode_step": facts(decode_cost(config, n_context, n_batch=n_batch, dtype=dtype)),
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
