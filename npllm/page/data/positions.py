"""RoPE: the angles, the score as a function of distance, and the rotation matrix."""

from typing import Any

import numpy as np

from npllm import ops
from npllm.models import rope as frequencies
from npllm.page.data.rounding import significant
from npllm.page.run import Run

__all__ = ["rope"]

Array = Any
Data = dict[str, Any]

N_DISTANCES = 65
N_POSITIONS = 129


def rope(run: Run) -> Data:
    """Give the frequencies of the model, and the score of real vectors at every distance."""
    config = run.model.config
    choice = frequencies.frequency_choice(config, len(run.ids))
    inv_freq = frequencies.frequencies(config, choice)
    q = run.of_layer("self_attn.q_proj")[:, -1]
    k = run.of_layer("self_attn.k_proj")[:, -1]
    k = np.repeat(k, len(q) // len(k), axis=0)
    scale = config.head_dim**-0.5
    return {
        "layer": run.layer,
        "d_rope": config.d_rope,
        "d_head": config.head_dim,
        "base": significant(config.rope_parameters.rope_theta, 9),
        "inv_freq": significant(inv_freq, 7),
        "n_positions": N_POSITIONS,
        "last": run.token(run.ids[-1]),
        "starts": [0, 100],
        "scores": [significant(_scores(q, k, inv_freq, at) * scale, 7) for at in (0, 100)],
        "matrix": significant(_matrices(inv_freq), 4),
    }


def _scores(q: Array, k: Array, inv_freq: Array, start: int) -> Array:
    """Products of q at start + distance and k at start: float64 [n_head, n_distance]."""
    positions = np.arange(start, start + N_DISTANCES)
    cos, sin = ops.rope_tables(positions, inv_freq)
    rotated_k = ops.apply_rope(k[:, None], cos[:1], sin[:1])  # [n_head, 1, d_head]
    moved = np.repeat(q[:, None], N_DISTANCES, axis=1)
    return (ops.apply_rope(moved, cos, sin) * rotated_k).sum(axis=-1)


def _matrices(inv_freq: Array) -> Array:
    """The block of the first pair of channels of the rotation matrix, at every position."""
    whole = ops.rotation_matrix(np.arange(N_POSITIONS), np.asarray(inv_freq, np.float64)[:1])
    return whole.reshape(N_POSITIONS, 2, 2)
