"""Which RoPE frequencies a sequence uses: from the names of config.json to the functions of
`npllm.ops.frequencies`.
"""

from typing import Any

from npllm import ops

__all__ = ["BY_LENGTH", "attention_factor", "frequencies", "frequency_choice"]

Array = Any

BY_LENGTH = "longrope", "dynamic"  # types whose frequencies depend on the length of a sequence


def frequency_choice(config: Any, length: int) -> int:
    """Name the set of frequencies that a sequence of `length` tokens uses.

        longrope: 1 (long_factor) where length > original_max_position_embeddings,
                  else 0 (short_factor)
        dynamic:  max(length, max_position_embeddings), on which the base depends
        others:   0

    Parameters
    ----------
    config : Config
    length : int
        Largest position + 1.

    Returns
    -------
    choice : int
        A sequence whose choice changes must be computed anew: beyond the first layer, cached keys
        and values depend on hidden states that were computed with the old frequencies.

    Notes
    -----
    Each sequence goes by its own length.  Transformers goes by the longest of the batch, so that a
    short prompt gives other numbers beside a long one.

    Source: `dynamic_rope_update` in Transformers.
    """
    rope_type = config.rope_parameters.rope_type
    if rope_type == "longrope":
        return int(length > config.original_max_position_embeddings)
    return max(length, config.max_position_embeddings) if rope_type == "dynamic" else 0


def frequencies(config: Any, choice: int) -> Array:
    """Compute the inverse frequencies of a choice: NumPy float32 [d_rope/2]."""
    rope, d_rope, n_original = (
        config.rope_parameters,
        config.d_rope,
        config.original_max_position_embeddings,
    )
    if rope.rope_type == "longrope":
        return ops.rope_frequencies(
            d_rope, rope.rope_theta, rope.long_factor if choice else rope.short_factor
        )
    if rope.rope_type == "dynamic":
        base = ops.dynamic_base(
            d_rope, rope.rope_theta, rope.factor, choice, config.max_position_embeddings
        )
        return ops.rope_frequencies(d_rope, base)
    if rope.rope_type == "linear":
        return ops.linear_frequencies(d_rope, rope.rope_theta, rope.factor)
    if rope.rope_type == "llama3":
        return ops.llama3_frequencies(
            d_rope,
            rope.rope_theta,
            rope.factor,
            rope.low_freq_factor,
            rope.high_freq_factor,
            n_original,
        )
    if rope.rope_type == "yarn":
        return ops.yarn_frequencies(
            d_rope,
            rope.rope_theta,
            _stretch(config),
            n_original,
            rope.beta_fast or 32.0,
            rope.beta_slow or 1.0,
            rope.truncate,
        )
    return ops.rope_frequencies(d_rope, rope.rope_theta)


def attention_factor(config: Any) -> float:
    """By how much cos and sin are scaled: as the file says, else by the formula of the rope type,
    else 1.
    """
    rope = config.rope_parameters
    if rope.rope_type not in ("longrope", "yarn"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.rope_type == "longrope":
        return ops.longrope_scale(_stretch(config), config.original_max_position_embeddings)
    return ops.yarn_scale(_stretch(config), rope.mscale, rope.mscale_all_dim)


def _stretch(config: Any) -> float:
    """Context length over original context length, unless the file gives the factor."""
    factor = config.rope_parameters.factor
    return (
        factor
        if factor is not None
        else config.max_position_embeddings / config.original_max_position_embeddings
    )
