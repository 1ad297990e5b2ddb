"""Lists of ids of different lengths as one array."""

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["pad_left"]

Array = Any


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Array, Array]:
    """Put lists of ids of different lengths into one array, padded on the left.

    Returns
    -------
    ids : int64 array [n_batch, n_prompt]
    valid : bool array [n_batch, n_prompt]
    """
    n_prompt = max(map(len, rows))
    ids = np.full((len(rows), n_prompt), pad, dtype=np.int64)
    valid = np.zeros(ids.shape, dtype=bool)
    for row, tokens in enumerate(rows):
        ids[row, n_prompt - len(tokens) :] = tokens
        valid[row, n_prompt - len(tokens) :] = True
    return ids, valid
