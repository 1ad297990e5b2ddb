"""From the hidden states of tokens to one vector for a text: pooling, dense layers, norms."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from npllm import ops

__all__ = [
    "ACTIVATIONS",
    "POOLINGS",
    "Dense",
    "Head",
    "Normalize",
    "mean_pool",
    "normalize",
    "pool",
]

SMALLEST_NORM = 1e-12  # what a vector is divided by at least

Array = Any


class Dense(NamedTuple):
    """A linear map with an activation, on vectors of texts."""

    weight: Array  # [d_out, d_in]
    bias: Array | None  # [d_out]
    activation: str  # a key of `ACTIVATIONS`

    def __call__(self, x: Array) -> Array:
        """Compute activation(x @ weight.T + bias)."""
        return ACTIVATIONS[self.activation](ops.linear(x, self.weight, self.bias))


class Normalize(NamedTuple):
    """Division of a vector by its length."""

    def __call__(self, x: Array) -> Array:
        """Compute `normalize(x)`."""
        return normalize(x)


class Head(NamedTuple):
    """How the hidden states of a text become its vector.

    Without any argument: the mean over the tokens.
    """

    poolings: tuple[str, ...] = ("mean",)  # keys of `POOLINGS`; the results are concatenated
    include_prompt: bool = True  # False: tokens of a prompt are left out of the pooling
    modules: tuple[Dense | Normalize, ...] = ()  # in the order in which they are applied
    dimension: int | None = None  # entries that are kept at the end; None: all

    def __call__(self, hidden: Array, valid: Array, n_prompt: int = 0) -> Array:
        """Turn hidden states into vectors.

        Parameters
        ----------
        hidden : array [n_batch, n_seq, d_model]
        valid : bool array [n_batch, n_seq]
            Where tokens stand; padding is on the right.
        n_prompt : int
            Tokens of the prompt that each text begins with, a token of the beginning included.

        Returns
        -------
        y : array [n_batch, d_out]
        """
        kept = valid.copy()
        if not self.include_prompt:
            kept[:, :n_prompt] = False
        y = np.concatenate([pool(hidden, kept, name) for name in self.poolings], axis=-1)
        for module in self.modules:
            y = module(y)
        return y[:, : self.dimension]

    def size(self, d_model: int) -> int:
        """Count the entries of a vector."""
        widths = [len(module.weight) for module in self.modules if isinstance(module, Dense)]
        width = widths[-1] if widths else d_model * len(self.poolings)
        return width if self.dimension is None else min(width, self.dimension)


def normalize(x: Array) -> Array:
    """Give each vector length 1.

        y[b, :] = x[b, :] / max(sqrt(sum_i x[b, i]**2), 1e-12)

    Parameters
    ----------
    x : array [n_batch, d]

    Returns
    -------
    y : array [n_batch, d]
        In the dtype of `x`; a vector of zeros stays one.

    Notes
    -----
    Source: `torch.nn.functional.normalize`.
    """
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), SMALLEST_NORM)


def pool(hidden: Array, valid: Array, name: str) -> Array:
    """Combine the hidden states of the tokens of each text into one vector.

        cls: that of the first token;  lasttoken: that of the last one
        max: the largest of every entry
        mean: see `mean_pool`;  mean_sqrt_len_tokens: sum_t hidden[b, t, :] / sqrt(n_tokens)
        weightedmean: sum_t (t + 1) * hidden[b, t, :] / sum_t (t + 1)

    Parameters
    ----------
    hidden : array [n_batch, n_seq, d_model]
    valid : bool array [n_batch, n_seq]
    name : str
        A key of `POOLINGS`.

    Returns
    -------
    y : array [n_batch, d_model]
        In the dtype of `hidden`; 0 for a row without a token.

    Notes
    -----
    Source: "Sentence-BERT" (Reimers and Gurevych 2019), section 3; "SGPT" (Muennighoff 2022),
    equation 2, for weightedmean; `Pooling` in sentence-transformers 6.2.
    """
    y = POOLINGS[name](hidden, valid)
    return np.where(valid.any(axis=1)[:, None], y, 0).astype(hidden.dtype, copy=False)


def mean_pool(hidden: Array, valid: Array) -> Array:
    """Average the hidden states of the tokens that are no padding.

        y[b, :] = sum_t valid[b, t] * hidden[b, t, :] / sum_t valid[b, t]

    Parameters
    ----------
    hidden : array [n_batch, n_seq, d_model]
    valid : bool array [n_batch, n_seq]

    Returns
    -------
    y : array [n_batch, d_model]
        In the dtype of `hidden`; 0 for a row of padding only.

    Notes
    -----
    Source: "Sentence-BERT" (Reimers and Gurevych 2019), section 3, the MEAN strategy.
    """
    return _sum(hidden, valid) / _count(hidden, valid)


def _sum(hidden: Array, valid: Array) -> Array:
    """Sum over the tokens; where padding holds NaN, a product would keep it."""
    return np.where(valid[:, :, None], hidden, 0).sum(axis=1)


def _count(hidden: Array, valid: Array) -> Array:
    """Number of tokens [n_batch, 1], at least 1, in the dtype of `hidden`."""
    return np.maximum(valid.sum(axis=1), 1)[:, None].astype(hidden.dtype)


def _sqrt_mean_pool(hidden: Array, valid: Array) -> Array:
    return _sum(hidden, valid) / np.sqrt(_count(hidden, valid))


def _weighted_mean_pool(hidden: Array, valid: Array) -> Array:
    weights = np.where(valid, np.arange(1, valid.shape[1] + 1), 0).astype(hidden.dtype)
    return _sum(hidden * weights[:, :, None], valid) / np.maximum(weights.sum(axis=1), 1)[:, None]


def _max_pool(hidden: Array, valid: Array) -> Array:
    return np.where(valid[:, :, None], hidden, -np.inf).max(axis=1)


def _first_token(hidden: Array, valid: Array) -> Array:
    return hidden[np.arange(len(hidden)), valid.argmax(axis=1)]


def _last_token(hidden: Array, valid: Array) -> Array:
    return hidden[np.arange(len(hidden)), valid.shape[1] - 1 - valid[:, ::-1].argmax(axis=1)]


# In the order in which sentence-transformers puts several side by side.
POOLINGS = {
    "cls": _first_token,
    "max": _max_pool,
    "mean": mean_pool,
    "mean_sqrt_len_tokens": _sqrt_mean_pool,
    "weightedmean": _weighted_mean_pool,
    "lasttoken": _last_token,
}

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "GELU": ops.gelu,
    "SiLU": ops.silu,
}
