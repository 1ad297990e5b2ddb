"""RoPE frequencies: by how much each pair of channels turns from one position to the next, and how
contexts were lengthened.

These are constants of a checkpoint, made of numbers and not of arrays, so they are NumPy arrays on
the host.  A checkpoint was trained with their float32 values: they are rounded to float32 at the
steps where PyTorch rounds them, also for a run in float64.
"""

import math
from typing import Any

import numpy as np

from npllm.errors import NpllmValueError

__all__ = [
    "dynamic_base",
    "linear_frequencies",
    "llama3_frequencies",
    "longrope_scale",
    "rope_frequencies",
    "yarn_frequencies",
    "yarn_scale",
]

Array = Any


def rope_frequencies(d_rope: int, base: float = 10000.0, factors: Any = None) -> Array:
    """List the angle by which each pair of channels turns from one position to the next.

        inv_freq[i] = 1 / (factors[i] * base ** (2 * i / d_rope)),  i = 0 ... d_rope/2 - 1

    Parameters
    ----------
    d_rope : int
        Number of rotated channels of a head; even.
    base : float
        `rope_theta` in config.json.
    factors : sequence of d_rope/2 floats, optional
        By how much LongRoPE slows each pair: `short_factor` or `long_factor`; default: all 1.

    Returns
    -------
    inv_freq : array [d_rope/2]
        NumPy float32, in radians per position.

    Raises
    ------
    NpllmValueError
        When `d_rope` is odd or not positive, `base` is not positive, or the factors are not
        d_rope/2 positive numbers.

    Notes
    -----
    The power is taken in float64 and rounded, which agrees with PyTorch's float32 power in more
    entries than NumPy's own does.

    Source: "RoFormer" (Su et al. 2021), section 3.2.2, theta_i; "LongRoPE" (Ding et al. 2024),
    equation 1; `_compute_longrope_parameters` in Transformers.
    """
    power = _powers(d_rope, base)
    if factors is None:
        return np.float32(1) / power
    factors = np.asarray(factors, dtype=np.float32)
    if factors.shape != power.shape or not (np.isfinite(factors).all() and (factors > 0).all()):
        raise NpllmValueError(
            f"factors must be d_rope/2 = {d_rope // 2} positive numbers, got {factors.size}"
        )
    return np.float32(1) / (factors * power)


def longrope_scale(factor: float, n_original: int) -> float:
    """Give the attention factor of LongRoPE, which scales cos and sin.

        scale = sqrt(1 + ln(factor) / ln(n_original)),  1 where factor <= 1

    Parameters
    ----------
    factor : float
        Context length over original context length.
    n_original : int
        `original_max_position_embeddings`.

    Returns
    -------
    scale : float

    Notes
    -----
    Source: "LongRoPE" (Ding et al. 2024), as released with Phi-3; `_compute_longrope_parameters` in
    Transformers.
    """
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(n_original))


def linear_frequencies(d_rope: int, base: float, factor: float) -> Array:
    """Interpolate positions linearly: position m turns like position m / factor.

        inv_freq[i] = base ** (-2 * i / d_rope) / factor

    Parameters
    ----------
    d_rope : int
    base : float
    factor : float

    Returns
    -------
    inv_freq : array [d_rope/2]

    Notes
    -----
    Source: "Extending Context Window of Large Language Models via Positional Interpolation" (Chen
    et al. 2023), equation 3; `_compute_linear_scaling_rope_parameters` in Transformers.
    """
    return rope_frequencies(d_rope, base) / np.float32(factor)


def dynamic_base(d_rope: int, base: float, factor: float, n_ctx: int, n_original: int) -> float:
    """Raise the base as the sequence outgrows the context of the training (dynamic NTK scaling).

        base' = base * (factor * n / n_original - (factor - 1)) ** (d_rope / (d_rope - 2))
        n = max(n_ctx, n_original)

    Parameters
    ----------
    d_rope : int
        At least 4.
    base : float
    factor : float
    n_ctx : int
        Length of the sequence now.
    n_original : int
        Length of the training, `max_position_embeddings`.

    Returns
    -------
    base : float
        For `rope_frequencies`.

    Raises
    ------
    NpllmValueError
        When `d_rope` is below 4: a single pair has no slower one to be measured against.

    Notes
    -----
    Source: "YaRN" (Peng et al. 2023), section 3.3, after a post by emozilla;
    `_compute_dynamic_ntk_parameters` in Transformers.
    """
    if d_rope < 4:
        raise NpllmValueError(f"d_rope must be at least 4 for dynamic scaling, got {d_rope}")
    n = max(n_ctx, n_original)
    return base * (factor * n / n_original - (factor - 1)) ** (d_rope / (d_rope - 2))


def llama3_frequencies(
    d_rope: int,
    base: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    n_original: int,
) -> Array:
    """Scale down the low frequencies: fewer than low_freq_factor turns in the original context.

        turns[i] = n_original * inv_freq[i] / (2 * pi)
        keep[i]  = clip((turns[i] - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
        inv_freq'[i] = (1 - keep[i]) * inv_freq[i] / factor + keep[i] * inv_freq[i]

    Parameters
    ----------
    d_rope : int
    base : float
    factor, low_freq_factor, high_freq_factor : float
    n_original : int
        `original_max_position_embeddings`.

    Returns
    -------
    inv_freq : array [d_rope/2]

    Notes
    -----
    Source: "The Llama 3 Herd of Models" (2024) and the code released with it;
    `_compute_llama3_parameters` in Transformers.
    """
    inv_freq = rope_frequencies(d_rope, base)
    wavelength = np.float32(2 * math.pi) / inv_freq
    turns = np.float32(n_original) / wavelength
    keep = (turns - np.float32(low_freq_factor)) / np.float32(high_freq_factor - low_freq_factor)
    slow = inv_freq / np.float32(factor)
    blend = (np.float32(1) - keep) * slow + keep * inv_freq
    long_wave, short_wave = (
        wavelength > n_original / low_freq_factor,
        wavelength < n_original / high_freq_factor,
    )
    return np.where(long_wave, slow, np.where(short_wave, inv_freq, blend)).astype(np.float32)


def yarn_frequencies(
    d_rope: int,
    base: float,
    factor: float,
    n_original: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Array:
    """Interpolate the frequencies of slow pairs, keep those of fast pairs, blend between (YaRN).

        index(turns) = d_rope * ln(n_original / (2 * pi * turns)) / (2 * ln(base))
        slow[i]      = clip((i - index(beta_fast)) / (index(beta_slow) - index(beta_fast)), 0, 1)
        inv_freq'[i] = slow[i] * inv_freq[i] / factor + (1 - slow[i]) * inv_freq[i]

    Parameters
    ----------
    d_rope : int
    base : float
    factor : float
    n_original : int
        `original_max_position_embeddings`.
    beta_fast, beta_slow : float
        Turns.
    truncate : bool
        Round the two indices outwards to whole numbers.

    Returns
    -------
    inv_freq : array [d_rope/2]

    Notes
    -----
    Source: "YaRN" (Peng et al. 2023), section 3.2; `_compute_yarn_parameters` in Transformers.
    """

    def index(turns: float) -> float:
        return d_rope * math.log(n_original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = index(beta_fast), index(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d_rope - 1)
    high = high + 0.001 if low == high else high
    power = _powers(d_rope, base)
    slow = np.clip(
        (np.arange(d_rope // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1
    )
    keep = np.float32(1) - slow
    return (np.float32(1) / (np.float32(factor) * power)) * (np.float32(1) - keep) + (
        np.float32(1) / power
    ) * keep


def yarn_scale(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """Give the attention factor of YaRN, which scales cos and sin.

        m(a) = 0.1 * a * ln(factor) + 1,  1 where factor <= 1
        scale = m(mscale) / m(mscale_all_dim) where both are given, else m(1)

    Parameters
    ----------
    factor : float
    mscale, mscale_all_dim : float, optional

    Returns
    -------
    scale : float

    Notes
    -----
    Source: "YaRN" (Peng et al. 2023), equation 22; `_compute_yarn_parameters` in Transformers.
    """

    def m(a: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * a * math.log(factor) + 1.0

    return m(mscale) / m(mscale_all_dim) if mscale and mscale_all_dim else m(1.0)


def _powers(d_rope: int, base: float) -> Array:
    """Base ** (2 * i / d_rope) in float32: the exponent is float32, the power is taken in float64
    and rounded.
    """
    if d_rope < 2 or d_rope % 2:
        raise NpllmValueError(f"d_rope must be even and at least 2, got {d_rope}")
    if not (base > 0 and math.isfinite(base)):
        raise NpllmValueError(f"base (rope_theta) must be a positive number, got {base}")
    exponent = np.arange(0, d_rope, 2, dtype=np.float32) / np.float32(d_rope)
    return (float(base) ** exponent.astype(np.float64)).astype(np.float32)
