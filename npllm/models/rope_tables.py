"""Which RoPE frequencies each row of a batch uses, and the tables of cosines and sines."""

from typing import Any

import numpy as np

from npllm.arrays import asarray, widen
from npllm.cache import KVCache
from npllm.config.config import Config
from npllm.models import rope
from npllm.ops.opset import Ops

__all__ = ["Rotations"]

Array = Any
N_KEPT = 4  # variants whose inverse frequencies are kept


class Rotations:
    """The rotary position embedding of one model.

    Parameters
    ----------
    config : Config
    dtype : dtype
        Of the inverse frequencies: the compute dtype of the weights.
    xp : module
        The array library of the weights.
    """

    def __init__(self, config: Config, dtype: Any, xp: Any):
        self._config, self._dtype, self._xp = config, dtype, xp
        self._frequencies: dict[int, Array] = {}

    def variants(self, positions: Array, n_batch: int, cache: KVCache | None) -> Array:
        """Name the RoPE frequencies of each row, by its own length: the largest position so far
        + 1; integers [n_batch].
        """
        if self._config.rope_parameters.rope_type not in rope.BY_LENGTH:
            return np.zeros(n_batch, np.int64)
        lengths = np.broadcast_to(positions.max(axis=-1) + 1, (n_batch,))
        if cache is not None and cache.n_ctx:
            lengths = np.maximum(lengths, cache.positions.max(axis=-1) + 1)
        return np.array([rope.frequency_choice(self._config, int(length)) for length in lengths])

    def tables(self, ops: Ops, positions: Array, variants: Array) -> tuple[Array, Array]:
        """Cosines and sines [n_seq, d_rope]; [n_batch, n_seq, d_rope] where positions or
        frequencies differ by row.
        """
        inv_freq = self._inverse_frequencies(int(variants[0]))
        if (variants != variants[0]).any():
            by_row = [self._inverse_frequencies(int(variant)) for variant in variants]
            inv_freq = self._xp.stack(by_row)[:, None, :]  # [n_batch, 1, d_rope/2]
        factor = rope.attention_factor(self._config)
        return ops.rope_tables(asarray(positions, self._xp), inv_freq, factor)

    def _inverse_frequencies(self, variant: int) -> Array:
        """Inverse frequencies in the library of the weights; the last few are kept."""
        known = self._frequencies
        if variant in known:
            return known[variant]
        inv_freq = asarray(rope.frequencies(self._config, variant), self._xp)
        wide = widen(inv_freq, self._dtype)
        self._frequencies = dict([*known.items()][1 - N_KEPT :]) | {variant: wide}
        return wide
